//! Host memory that the GPU reads and writes at full speed.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::gpu::{Gpu, GpuError};

/// Pinned memory that was given back, kept to the end: to free it the driver waits for all that runs on the GPU, and other
/// queues may wait for other processes there.
pub(super) struct Pinned {
    gpu: Arc<dyn Gpu>,
    free: Mutex<Vec<Block>>,
}

#[derive(Clone, Copy)]
struct Block {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: whoever has the block has the memory, and nobody else.
unsafe impl Send for Block {}

impl Pinned {
    pub fn new(gpu: Arc<dyn Gpu>) -> Arc<Self> {
        Arc::new(Self { gpu, free: Mutex::default() })
    }

    pub fn staging(self: &Arc<Self>, bytes: usize) -> Result<Staging, GpuError> {
        Ok(Staging { block: self.take(bytes)?, bytes, pinned: self.clone() })
    }

    fn free(&self) -> MutexGuard<'_, Vec<Block>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The smallest block that is large enough, and not much larger, or a new one.
    fn take(&self, bytes: usize) -> Result<Block, GpuError> {
        let mut free = self.free();
        let fits = free.iter().enumerate().filter(|(_, block)| (bytes..=4 * bytes).contains(&block.bytes));
        match fits.min_by_key(|(_, block)| block.bytes).map(|(i, _)| i) {
            Some(i) => Ok(free.swap_remove(i)),
            None => Ok(Block { at: self.gpu.allocate_host(bytes)?, bytes }),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for Block { at, bytes } in self.free().drain(..) {
            // SAFETY: the memory is the block's, and whoever had it last has waited for the queue.
            unsafe { self.gpu.free_host(at, bytes) };
        }
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} free blocks)", self.free().len())
    }
}

/// Host memory of a GPU, of any content.
pub(super) struct Staging {
    block: Block,
    bytes: usize,
    pinned: Arc<Pinned>,
}

impl Staging {
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the block has so many bytes, which were zeroed once; nobody else has them.
        unsafe { std::slice::from_raw_parts(self.block.at, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.block.at, self.bytes) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Where waiting fails the GPU is lost, and reads nothing any more.
        let _ = self.pinned.gpu.finish();
        self.pinned.free().push(self.block);
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staging({} bytes)", self.bytes)
    }
}
