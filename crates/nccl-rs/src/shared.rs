//! A communicator's handle, and the lock that every call to NCCL with it takes.
//!
//! NCCL wants one thread at a time on a communicator, and frees it when it is aborted, whoever uses it meanwhile. So
//! whoever calls NCCL with the handle holds the lock; since communicators are non-blocking, no call holds it for long.
//! Closing takes the handle out first, so that it happens once and nobody calls after it.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUcontext;
use cudarc::driver::{result, sys};
use cudarc::nccl::sys::{ncclComm, ncclComm_t};

use crate::config::Config;
use crate::error::Error;
use crate::library::{Api, IN_PROGRESS, SUCCESS, UNHANDLED_CUDA};
use crate::rest::{pause, rest};

/// How a communicator is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// For the next operation. What was queued may still run.
    Ready,
    /// Being connected, or an operation is being queued.
    InProgress,
    /// No operation succeeds any more, whether it is failed or closed.
    Failed(Error),
}

pub(crate) struct Shared {
    pub api: &'static Api,
    pub rank: usize,
    pub size: usize,
    pub queue_timeout: Duration,
    close_timeout: Duration,
    handle: Mutex<Handle>,
    /// Where NCCL puts a communicator that it makes, which can be long after the call; so it is here and not on a
    /// stack.
    made: AtomicPtr<ncclComm>,
    is_closing: AtomicBool,
    /// Somebody has waited for the end as long as that may take, so that nobody waits again where nobody wants to know.
    was_awaited: AtomicBool,
    /// How closing went, once it has.
    closed: Mutex<Option<Result<(), Error>>>,
    closes: Condvar,
    /// The GPU that it is on, for threads that have another one or none: NCCL would open the first one there.
    pub context: Option<Context>,
}

/// A GPU's primary context, kept to the end of the process: NCCL does so too, and what is left behind needs it.
#[derive(Clone, Copy)]
pub(crate) struct Context(CUcontext);

// SAFETY: a context may be made current on any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// That of this thread's GPU, if it has one.
    pub fn current() -> Option<Self> {
        // SAFETY: opens NVIDIA's library, and closes it.
        let has_driver = unsafe { sys::is_culib_present() };
        has_driver.then(result::ctx::get_current)?.ok()??;
        let mut device = 0;
        // SAFETY: writes the number of the GPU whose context is current.
        unsafe { sys::cuCtxGetDevice(&mut device) }.result().ok()?;
        // SAFETY: the device is one, and its context is not given back.
        unsafe { result::primary_ctx::retain(device) }.ok().map(Self)
    }

    /// Does something with the context current, and leaves the thread as it was.
    fn enter<T>(&self, call: impl FnOnce() -> T) -> T {
        // None is current where the driver is lost, and so is what is called.
        let before = result::ctx::get_current().ok().flatten();
        // SAFETY: the context is kept.
        let _ = unsafe { result::ctx::set_current(self.0) };
        let value = call();
        // SAFETY: it was current, or none was.
        let _ = unsafe { result::ctx::set_current(before.unwrap_or(null_mut())) };
        value
    }
}

/// Null once the communicator is closed.
pub(crate) struct Handle(pub ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time.
unsafe impl Send for Handle {}

/// The two ways to end a communicator.
#[derive(Clone, Copy)]
pub(crate) enum Close {
    Abort,
    Destroy,
}

impl Shared {
    /// Of one rank of so many.
    pub fn new(
        api: &'static Api,
        handle: ncclComm_t,
        (rank, size): (usize, usize),
        config: &Config,
        context: Option<Context>,
    ) -> Self {
        let Config { queue_timeout, close_timeout, .. } = *config;
        Self {
            api,
            rank,
            size,
            queue_timeout,
            close_timeout,
            handle: Mutex::new(Handle(handle)),
            made: AtomicPtr::new(null_mut()),
            is_closing: AtomicBool::new(false),
            was_awaited: AtomicBool::new(false),
            closed: Mutex::new(None),
            closes: Condvar::new(),
            context,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Handle> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock of a communicator that is not closed.
    pub fn open(&self) -> Result<MutexGuard<'_, Handle>, Error> {
        let handle = self.lock();
        let is_closed = handle.0.is_null() || self.is_closing.load(Ordering::Acquire);
        if is_closed { Err(self.aborted()) } else { Ok(handle) }
    }

    fn aborted(&self) -> Error {
        Error::Aborted { rank: self.rank, size: self.size }
    }

    fn late(&self, action: &'static str, after: Duration) -> Error {
        Error::Timeout { action, rank: self.rank, size: self.size, after }
    }

    /// Calls NCCL with the handle, and with the place for what it makes, on the communicator's GPU.
    pub fn call(
        &self,
        function: &'static str,
        call: impl FnOnce(ncclComm_t, *mut ncclComm_t) -> c_int,
    ) -> Result<(), Error> {
        let handle = self.open()?;
        let call = || call(handle.0, self.made.as_ptr());
        let code = match &self.context {
            Some(context) => context.enter(call),
            None => call(),
        };
        self.api.check(function, code)
    }

    /// What NCCL made; null where it made nothing. Where the communicator is closed, whoever did that ends what was
    /// made.
    pub fn made(&self) -> Result<ncclComm_t, Error> {
        let _open = self.open()?;
        Ok(self.take_made())
    }

    fn take_made(&self) -> ncclComm_t {
        self.made.swap(null_mut(), Ordering::AcqRel)
    }

    /// Starts to connect; the handle is what NCCL made.
    pub fn init(&self, init: impl FnOnce(*mut ncclComm_t) -> c_int) -> Result<(), Error> {
        let mut handle = self.lock();
        let code = init(self.made.as_ptr());
        let made = self.api.check("ncclCommInitRankConfig", code);
        handle.0 = self.take_made();
        if code == UNHANDLED_CUDA {
            // NCCL leaves this thread inside of a group where there is no GPU, and the thread's later calls would wait for
            // the end of it. Where another of CUDA's errors is behind it, this is one more error, without consequences.
            // SAFETY: this crate opens no group around this call.
            unsafe { (self.api.group_end)() };
        }
        made
    }

    pub fn state(&self) -> State {
        let handle = match self.open() {
            Ok(handle) => handle,
            Err(aborted) => return State::Failed(aborted),
        };
        let mut state = SUCCESS;
        // SAFETY: the handle is open, and locked.
        let code = unsafe { (self.api.async_error)(handle.0, &mut state) };
        let answered = self.api.check("ncclCommGetAsyncError", code);
        match answered.and_then(|()| self.api.check("a queued operation", state)) {
            Err(error) => State::Failed(error),
            Ok(()) if state == IN_PROGRESS => State::InProgress,
            Ok(()) => State::Ready,
        }
    }

    /// Blocks until nothing is in progress. At the deadline, starts to abort the communicator.
    pub fn wait(self: &Arc<Self>, action: &'static str, start: Instant, timeout: Duration) -> Result<(), Error> {
        loop {
            match self.state() {
                State::Ready => return Ok(()),
                State::Failed(error) => return Err(error),
                State::InProgress => {}
            }
            let waited = start.elapsed();
            if waited >= timeout {
                self.start_closing(Close::Abort);
                return Err(self.late(action, timeout));
            }
            rest(pause(waited, SPIN, LONGEST_PAUSE));
        }
    }

    /// Starts to end the communicator, if nobody has. Done on a thread of its own, for two reasons: NCCL blocks in it, for
    /// ever if a captured graph that uses the communicator is alive; and on a thread that is inside of a group it would
    /// do nothing.
    pub fn start_closing(self: &Arc<Self>, how: Close) {
        if self.is_closing.swap(true, Ordering::AcqRel) {
            return;
        }
        let (shared, closing) = (self.clone(), Closing::begin());
        let close = move || {
            let _closing = closing;
            shared.close_here(how);
        };
        if thread::Builder::new().name("nccl-close".into()).spawn(close).is_err() {
            self.close_here(how);
        }
    }

    /// Aborts what is given up, and waits for the end if `waits`, unless somebody has.
    pub fn give_up(self: &Arc<Self>, waits: bool) {
        self.start_closing(Close::Abort);
        if waits && !self.was_awaited.load(Ordering::Acquire) {
            // Whoever gives it up does not want to know.
            let _ = self.wait_closed();
        }
        self.was_awaited.store(true, Ordering::Release);
    }

    /// Ends the communicator if nobody has, and waits for the end.
    pub fn close(self: &Arc<Self>, how: Close) -> Result<(), Error> {
        self.start_closing(how);
        let closed = self.wait_closed();
        self.was_awaited.store(true, Ordering::Release);
        closed
    }

    fn wait_closed(&self) -> Result<(), Error> {
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.closes.wait_timeout_while(closed, self.close_timeout, |closed| closed.is_none());
        let (closed, _) = waited.unwrap_or_else(PoisonError::into_inner);
        closed.clone().unwrap_or_else(|| Err(self.late("closing", self.close_timeout)))
    }

    fn close_here(&self, how: Close) {
        match &self.context {
            Some(context) => context.enter(|| self.close_on_gpu(how)),
            None => self.close_on_gpu(how),
        }
        self.closes.notify_all();
    }

    fn close_on_gpu(&self, how: Close) {
        let handle = std::mem::replace(&mut *self.lock(), Handle(null_mut()));
        let (function, close) = match how {
            Close::Abort => ("ncclCommAbort", self.api.abort),
            Close::Destroy => ("ncclCommDestroy", self.api.destroy),
        };
        // SAFETY: nobody else has the handle any more.
        let code = if handle.0.is_null() { SUCCESS } else { unsafe { close(handle.0) } };
        let closed = self.api.check(function, code);
        // Nobody can take it any more.
        let made = self.take_made();
        if !made.is_null() {
            // SAFETY: nobody else has the handle.
            unsafe { (self.api.abort)(made) };
        }
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = Some(closed);
    }
}

/// How many are at it.
static CLOSING: Mutex<usize> = Mutex::new(0);
static NONE_CLOSING: Condvar = Condvar::new();

/// Something is being closed or freed, on a thread of its own.
pub(crate) struct Closing;

impl Closing {
    pub fn begin() -> Self {
        *Self::count() += 1;
        Self
    }

    fn count() -> MutexGuard<'static, usize> {
        CLOSING.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        let mut count = Self::count();
        *count -= 1;
        if *count == 0 {
            NONE_CLOSING.notify_all();
        }
    }
}

/// Whether communicators or channels are being closed in the background.
pub fn is_closing() -> bool {
    *Closing::count() > 0
}

/// Blocks until none is, or `timeout` is over; then it is false. To be called before the process exits: whoever exits
/// earlier takes the library away from under NCCL's threads.
pub fn wait_closed(timeout: Duration) -> bool {
    let waited = NONE_CLOSING.wait_timeout_while(Closing::count(), timeout, |count| *count > 0);
    let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
    *count == 0
}

/// A group is queued in microseconds.
const SPIN: Duration = Duration::from_micros(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);
