//! Threads for kernels. Decides where a task runs and never what it computes.

use std::marker::PhantomData;
use std::sync::Arc;

use rayon::prelude::*;

/// Multiply-adds below which a call stays on its thread: waking others costs about as much (some 20 µs).
const PARALLEL_WORK_MIN: usize = 1 << 20;

/// Threads for kernels; cheap to clone. Results never depend on it. Small work runs on the calling thread.
#[derive(Clone, Debug)]
pub struct Pool {
    /// None: everything on the calling thread.
    threads: Option<Arc<rayon::ThreadPool>>,
}

impl Pool {
    /// If the system gives no threads the pool is the calling thread alone; `threads()` tells.
    pub fn new(threads: usize) -> Self {
        if threads <= 1 {
            return Self { threads: None };
        }
        let name = |i| format!("kernel-{i}");
        Self {
            threads: rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok().map(Arc::new),
        }
    }

    pub fn threads(&self) -> usize {
        self.threads.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// Into how many parts `work` multiply-adds are worth cutting.
    pub(crate) fn parts(&self, work: usize) -> usize {
        // A few parts for each thread, so that one that was late does not hold up the others.
        if self.is_inline(work) { 1 } else { self.threads() * 4 }
    }

    /// Whether so much work is done on the calling thread.
    pub(crate) fn is_inline(&self, work: usize) -> bool {
        self.threads.is_none() || work < PARALLEL_WORK_MIN
    }

    /// Calls `task` with 0..tasks, on several threads if `work` is enough.
    pub(crate) fn each(&self, tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
        match &self.threads {
            Some(pool) if tasks > 1 && !self.is_inline(work) => {
                pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(|i| task(i)));
            }
            _ => (0..tasks).for_each(task),
        }
    }
}

/// A slice that several tasks write to, each to places of its own.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<'_, T> {}

// SAFETY: it is a `&mut [T]` that only `Shared::part` reads or writes through, whose callers promise not to overlap.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The `len` values from `offset`; panics if they are not all inside.
    ///
    /// # Safety
    /// * While the result lives, nothing else may hold a part that overlaps with it.
    #[inline(always)]
    pub unsafe fn part(self, offset: usize, len: usize) -> &'a mut [T] {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: inside the slice by the assertion; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

#[cfg(test)]
mod tests;
