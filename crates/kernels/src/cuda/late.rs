//! Memory that nobody holds any more and that the GPU may still write to. It goes back to the arena when somebody asks for memory:
//! whoever drops it may have locks that others wait for, and calls to the driver can take a while.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::gpu::{Buffer, GpuError};
use super::mark::Mark;

/// Of one arena.
#[derive(Debug, Default)]
pub(super) struct Late(Mutex<VecDeque<(Mark, Buffer<u8>)>>);

impl Late {
    /// `buffer` is written to until the mark is past.
    pub fn keep(&self, mark: Mark, buffer: Buffer<u8>) {
        self.all().push_back((mark, buffer));
    }

    /// Gives back what the GPU is through with, or all of it once it is: whether that was anything. Where a call fails the GPU is lost,
    /// and what is kept with it.
    pub fn give_back(&self, waits: bool) -> Result<bool, GpuError> {
        let mut any = false;
        // Not with the lock. Marks come by about in their order.
        while let Some((mark, buffer)) = self.oldest() {
            if waits {
                mark.wait()?;
            } else if !mark.is_past()? {
                self.all().push_front((mark, buffer));
                break;
            }
            any = true;
        }
        Ok(any)
    }

    fn oldest(&self) -> Option<(Mark, Buffer<u8>)> {
        self.all().pop_front()
    }

    fn all(&self) -> MutexGuard<'_, VecDeque<(Mark, Buffer<u8>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
