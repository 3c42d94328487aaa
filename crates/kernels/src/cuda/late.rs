//! Memory that nobody holds any more and that the GPU may still write to. It goes back to the arena when somebody asks for memory:
//! whoever drops it may have locks that others wait for, and calls to the driver can take a while.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use bytemuck::Pod;

use super::gpu::{Buffer, Device, GpuError};
use super::mark::Mark;

/// Of one arena.
#[derive(Debug, Default)]
pub(super) struct Late {
    /// In the order in which they were dropped, which is about that of their marks.
    all: Mutex<VecDeque<(Mark, Buffer<u8>)>>,
    /// Held by who gives them back.
    giving: Mutex<()>,
}

impl Late {
    /// `buffer` is written to until the mark is past.
    pub fn keep(&self, mark: Mark, buffer: Buffer<u8>) {
        self.all().push_back((mark, buffer));
    }

    /// How much it is.
    pub fn bytes(&self) -> usize {
        self.all().iter().map(|(_, buffer)| buffer.len()).sum()
    }

    /// Gives back what the GPU is through with, unless somebody is at it.
    fn give_back(&self) -> Result<(), GpuError> {
        let _giving = match self.giving.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Poisoned(giving)) => giving.into_inner(),
            Ok(giving) => giving,
        };
        while let Some(mark) = self.oldest() {
            if !mark.is_past()? {
                break;
            }
            self.pop();
        }
        Ok(())
    }

    /// The oldest's. It stays meanwhile.
    fn oldest(&self) -> Option<Mark> {
        self.all().front().map(|(mark, _)| mark.clone())
    }

    fn pop(&self) {
        let oldest = self.all().pop_front();
        // Not with the lock.
        drop(oldest);
    }

    fn all(&self) -> MutexGuard<'_, VecDeque<(Mark, Buffer<u8>)>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device {
    /// `len` values that say nothing yet. Where there is no room for them, waits for memory that the GPU may still write to.
    pub fn buffer<T: Pod>(&self, len: usize) -> Result<Buffer<T>, GpuError> {
        if let Some(buffer) = GpuError::if_room(self.buffer_if_free(len))? {
            return Ok(buffer);
        }
        let _giving = self.late.giving.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody may have given back what is needed.
        let mut taken = self.take(len);
        while let (Err(GpuError::Full { .. }), Some(mark)) = (&taken, self.late.oldest()) {
            mark.wait()?;
            self.late.pop();
            taken = self.take(len);
        }
        taken
    }

    /// The same, but waits for nothing.
    pub fn buffer_if_free<T: Pod>(&self, len: usize) -> Result<Buffer<T>, GpuError> {
        self.late.give_back()?;
        self.take(len)
    }
}
