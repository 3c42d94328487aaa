//! Multiprocessors that others keep busy, so that kernels do not count on them.
//!
//! A kernel here runs on as many blocks as the GPU holds at a time, each of which has an equal part of its work. If one of them
//! found no place it would begin when another ends, and the kernel would take twice as long.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::gpu::Device;

/// Of a multiprocessor.
pub const QUARTERS: u32 = 4;

/// What somebody has of a GPU, until it is dropped.
pub struct Lent {
    of: Arc<AtomicU32>,
    quarters: u32,
}

impl Device {
    /// Leaves so many quarters of multiprocessors to others, for what is queued from now on. Half of the GPU is never lent.
    pub fn lend(&self, quarters: u32) -> Lent {
        self.lent.fetch_add(quarters, Ordering::Relaxed);
        Lent { of: self.lent.clone(), quarters }
    }

    /// On which kernels run.
    pub(super) fn own_multiprocessors(&self) -> u32 {
        let all = self.properties().multiprocessors;
        all - self.lent.load(Ordering::Relaxed).div_ceil(QUARTERS).min(all / 2)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.of.fetch_sub(self.quarters, Ordering::Relaxed);
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lent({} quarters)", self.quarters)
    }
}
