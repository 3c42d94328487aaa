//! Launches that are kept and queued as one, which costs the processor one call: CUDA's graphs.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::gpu::{Device, Gpu, GpuError, Launch};

/// Launches, one after the other, that a GPU keeps.
pub(crate) struct Recording {
    number: u64,
    launches: Vec<Launch>,
    gpu: Arc<dyn Gpu>,
}

impl Recording {
    /// Queues all of them.
    ///
    /// # Safety
    ///
    /// That of [`Gpu::queue_launch`], for each.
    pub unsafe fn queue(&self) -> Result<(), GpuError> {
        // SAFETY: the number is this GPU's; the rest is the caller's promise.
        unsafe { self.gpu.queue_recording(self.number) }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.gpu.forget_recording(self.number);
    }
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recording({} launches)", self.launches.len())
    }
}

impl Device {
    /// Keeps the launches that `queue` makes on the device that it is given.
    pub(crate) fn record(&self, queue: impl FnOnce(&Device) -> Result<(), GpuError>) -> Result<Recording, GpuError> {
        self.recording_of(self.launches_of(queue)?)
    }

    fn launches_of(&self, queue: impl FnOnce(&Device) -> Result<(), GpuError>) -> Result<Vec<Launch>, GpuError> {
        let kept = Arc::new(Mutex::default());
        queue(&self.keeping(kept.clone()))?;
        Ok(std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn recording_of(&self, launches: Vec<Launch>) -> Result<Recording, GpuError> {
        let gpu = self.gpu().clone();
        Ok(Recording { number: gpu.record(&launches)?, launches, gpu })
    }
}

/// Recordings of what is queued again and again.
#[derive(Debug, Default)]
pub(crate) struct Replays(Vec<Recording>);

/// For more, the one is forgotten that was queued longest ago.
const REPLAYS_MAX: usize = 64;

impl Replays {
    /// Queues the launches that `queue` makes on the device that it is given, by the recording of equal ones: the first time,
    /// one is made.
    pub fn queue(
        &mut self,
        device: &Device,
        queue: impl FnOnce(&Device) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let launches = device.launches_of(queue)?;
        let known = self.0.iter().position(|recording| recording.launches == launches);
        let recording = match known {
            Some(at) => self.0.remove(at),
            None => {
                if self.0.len() == REPLAYS_MAX {
                    self.0.remove(0);
                }
                device.recording_of(launches)?
            }
        };
        // SAFETY: equal launches were queued just now, by who saw to what they work on.
        let queued = unsafe { recording.queue() };
        self.0.push(recording);
        queued
    }
}
