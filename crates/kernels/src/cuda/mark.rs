//! Places in the queue: CUDA's events. Whoever needs what is queued before one waits for that, and for nothing behind it: the
//! processor, or another stream.

use std::fmt;
use std::sync::Arc;

use super::gpu::{Device, Gpu, GpuError};

/// What was queued before it is through once the GPU has come by. Clones are the same one.
#[derive(Clone)]
pub struct Mark(Arc<Kept>);

struct Kept {
    number: u64,
    gpu: Arc<dyn Gpu>,
}

impl Mark {
    pub fn is_past(&self) -> Result<bool, GpuError> {
        // SAFETY: the number is this GPU's, and not forgotten yet.
        unsafe { self.0.gpu.is_past(self.0.number) }
    }

    /// Keeps the caller until the GPU has come by.
    pub fn wait(&self) -> Result<(), GpuError> {
        // SAFETY: as above.
        unsafe { self.0.gpu.wait_for(self.0.number) }
    }

    /// The driver's event (`CUevent`), as long as this is kept.
    pub fn event(&self) -> u64 {
        self.0.number
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // SAFETY: as above, and nobody has it any more.
        unsafe { self.gpu.forget_mark(self.number) };
    }
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mark({:#x})", self.0.number)
    }
}

impl Device {
    /// The end of what is queued.
    pub fn mark(&self) -> Result<Mark, GpuError> {
        Ok(Mark(Arc::new(Kept { number: self.gpu().mark()?, gpu: self.gpu().clone() })))
    }
}
