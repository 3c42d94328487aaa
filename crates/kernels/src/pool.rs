//! Threads for kernels. Decides where a task runs and never what it computes.
//!
//! ```text
//! caller:   publish the call, open it;  take tasks until none is left;  close it;  wait until no helper is inside
//! helper:   wait for an open call that it has not seen;  enter;  take tasks until none is left;  leave
//! ```
//! A layer makes some ten calls of a few dozen microseconds each, so a call must cost little:
//! 1. The caller works too. A helper that comes late finds the call closed and is not waited for.
//! 2. Tasks are taken from one counter; entering and leaving are one word. Nobody holds a lock.
//! 3. Between calls helpers spin for a moment, then offer their core to others, and soon sleep: an idle pool costs
//!    nothing, and a busy one leaves the core to whoever else wants it.
//! 4. A call while another is under way runs on its caller alone: it would find all helpers taken.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use core_affinity::CoreId;

/// Multiply-adds below which a call stays on its thread: waking others costs about as much (some 5 µs).
const PARALLEL_WORK_MIN: usize = 1 << 17;
/// How long a helper watches for the next call: longer than the gaps within a layer, then than those between tokens.
const SPIN: Duration = Duration::from_micros(20);
const YIELD: Duration = Duration::from_micros(200);

/// Threads for kernels; cheap to clone. Results never depend on it. Small work runs on the calling thread.
#[derive(Clone, Debug)]
pub struct Pool {
    /// None: everything on the calling thread.
    helpers: Option<Arc<Helpers>>,
    /// The core of the thread that calls, if threads keep to theirs.
    callers_core: Option<CoreId>,
}

impl Pool {
    /// `threads` counts the calling thread. If the system gives fewer, the pool has fewer; `threads()` tells.
    pub fn new(threads: usize) -> Self {
        Self::on(threads, &[])
    }

    /// The same, each thread on a core of its own among those that this process may use (in turn, if they are fewer): the
    /// calling thread on the first, once it has called `pin_caller`. For a machine, or a set of cores, with nothing else on it.
    pub fn pinned(threads: usize) -> Self {
        Self::on(threads, &core_affinity::get_core_ids().unwrap_or_default())
    }

    fn on(threads: usize, cores: &[CoreId]) -> Self {
        let helpers = Helpers::start(threads.saturating_sub(1), cores);
        Self { helpers: (!helpers.threads.is_empty()).then(|| Arc::new(helpers)), callers_core: cores.first().copied() }
    }

    /// Keeps this thread, from which the pool will be called, to its core if the pool is pinned.
    pub fn pin_caller(&self) {
        if let Some(core) = self.callers_core {
            pin(core);
        }
    }

    pub fn threads(&self) -> usize {
        1 + self.helpers.as_ref().map_or(0, |helpers| helpers.threads.len())
    }

    /// Into how many parts `work` multiply-adds are worth cutting.
    pub(crate) fn parts(&self, work: usize) -> usize {
        // A few parts for each thread, so that one that was late does not hold up the others.
        if self.is_inline(work) { 1 } else { self.threads() * 4 }
    }

    /// Whether so much work is done on the calling thread.
    pub(crate) fn is_inline(&self, work: usize) -> bool {
        self.helpers.is_none() || work < PARALLEL_WORK_MIN
    }

    /// Calls `task` with 0..tasks, on several threads if `work` is enough. A panic of a task is passed on when all
    /// threads have come back.
    pub(crate) fn each(&self, tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
        match &self.helpers {
            Some(helpers) if tasks > 1 && !self.is_inline(work) => helpers.run(tasks, &task),
            _ => (0..tasks).for_each(task),
        }
    }
}

/// Threads beside the caller's. They end with the last clone of the pool.
#[derive(Debug)]
struct Helpers {
    shared: Arc<Board>,
    threads: Vec<JoinHandle<()>>,
}

/// What callers and helpers see.
struct Board {
    /// A caller has the helpers.
    taken: AtomicBool,
    /// Number of the call (high half), whether it is open, and how many helpers are inside (low bits).
    state: AtomicU64,
    call: UnsafeCell<Call>,
    /// The next task of the call.
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: Mutex<usize>,
    /// As `asleep`, to be looked at without the lock.
    sleepers: AtomicUsize,
    wake: Condvar,
    stop: AtomicBool,
}

struct Call {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

fn number(state: u64) -> u64 {
    state >> 32
}

// SAFETY: `call` is written by the caller that holds `taken` while the call is closed and nobody is inside, and read by
// helpers that have entered an open call: entering acquires what opening released. The task it points to is `Sync` and
// lives until nobody is inside, which its caller waits for.
unsafe impl Sync for Board {}
// SAFETY: as above.
unsafe impl Send for Board {}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Helpers {
    fn start(count: usize, cores: &[CoreId]) -> Self {
        let nothing: &'static (dyn Fn(usize) + Sync) = &|_| {};
        let shared = Arc::new(Board {
            taken: AtomicBool::new(false),
            state: AtomicU64::new(0),
            call: UnsafeCell::new(Call { task: nothing, tasks: 0 }),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            asleep: Mutex::new(0),
            sleepers: AtomicUsize::new(0),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let helper = |i| {
            let board = shared.clone();
            let core = cores.get(i % cores.len().max(1)).copied();
            let help = move || {
                if let Some(core) = core {
                    pin(core);
                }
                board.help();
            };
            std::thread::Builder::new().name(format!("kernel-{i}")).spawn(help).ok()
        };
        let threads = (1..=count).map_while(helper).collect();
        Self { shared, threads }
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let board = &*self.shared;
        if board.taken.swap(true, Ordering::Acquire) {
            return (0..tasks).for_each(task);
        }
        // SAFETY: `taken` is ours, so the last call is closed and nobody is inside. The lifetime is erased; nobody reads
        // the task after `close` has returned, and this function does not end before.
        unsafe {
            let task = std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(task);
            *board.call.get() = Call { task, tasks };
        }
        board.next.store(0, Ordering::Relaxed);
        board.open();
        let own = catch_unwind(AssertUnwindSafe(|| board.take_tasks(task, tasks)));
        board.close();
        let helpers = board.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        board.taken.store(false, Ordering::Release);
        if let Some(panic) = own.err().or(helpers) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake_all();
        for thread in self.threads.drain(..) {
            // A pool may be dropped by a task of another pool, never by its own.
            let _ = thread.join();
        }
    }
}

impl Board {
    fn open(&self) {
        let next = number(self.state.load(Ordering::Relaxed)) + 1;
        // Sequentially consistent with `sleepers`: either the helper sees the call, or the caller sees the sleeper.
        self.state.store((next & u64::from(u32::MAX)) << 32 | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake_all();
        }
    }

    /// Lets nobody in any more and waits until all are out.
    fn close(&self) {
        // Whoever panics leaves tasks behind that nobody shall start.
        self.next.store(usize::MAX / 2, Ordering::Relaxed);
        let mut inside = self.state.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE;
        let start = Instant::now();
        while inside > 0 {
            relax(start);
            inside = self.state.load(Ordering::Acquire) & INSIDE;
        }
    }

    fn take_tasks(&self, task: &(dyn Fn(usize) + Sync), tasks: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            task(i);
        }
    }

    fn help(&self) {
        let mut seen = 0;
        while self.wait(seen) {
            let mut state = self.state.load(Ordering::Acquire);
            seen = number(state);
            while state & OPEN != 0 && number(state) == seen {
                match self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => {
                        self.inside();
                        break;
                    }
                    Err(now) => state = now,
                }
            }
        }
    }

    fn inside(&self) {
        // SAFETY: this thread is inside, so the call is not changed and its task is alive.
        let (task, tasks) = unsafe { (&*(*self.call.get()).task, (*self.call.get()).tasks) };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_tasks(task, tasks))) {
            self.next.store(usize::MAX / 2, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        self.state.fetch_sub(1, Ordering::AcqRel);
    }

    /// Until there is a call after `seen`; false when it is time to end.
    fn wait(&self, seen: u64) -> bool {
        let start = Instant::now();
        loop {
            if self.stop.load(Ordering::Acquire) {
                return false;
            }
            if number(self.state.load(Ordering::Acquire)) != seen {
                return true;
            }
            if !relax(start) {
                self.sleep(seen);
            }
        }
    }

    fn sleep(&self, seen: u64) {
        let mut asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        *asleep += 1;
        self.sleepers.store(*asleep, Ordering::SeqCst);
        while number(self.state.load(Ordering::SeqCst)) == seen && !self.stop.load(Ordering::Acquire) {
            asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        }
        *asleep -= 1;
        self.sleepers.store(*asleep, Ordering::SeqCst);
    }

    fn wake_all(&self) {
        // Whoever is about to sleep holds the lock until it waits.
        drop(self.asleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }
}

/// Where the system refuses, the thread runs wherever it is put.
fn pin(core: CoreId) {
    core_affinity::set_for_current(core);
}

/// A moment's wait, by the time it has been: spinning, then leaving the core to others. False: it has been long.
fn relax(since: Instant) -> bool {
    let waited = since.elapsed();
    if waited < SPIN {
        for _ in 0..16 {
            std::hint::spin_loop();
        }
    } else {
        std::thread::yield_now();
    }
    waited < YIELD
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
