//! A communicator's handle, and the lock that every call to NCCL with it takes.
//!
//! NCCL wants one thread at a time on a communicator, and frees it when it is aborted, whoever uses it meanwhile. So
//! whoever calls NCCL with the handle holds the lock; since communicators are non-blocking, no call holds it for long.
//! Closing takes the handle out first, so that it happens once and nobody calls after it.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUcontext;
use cudarc::driver::{result, sys};
use cudarc::nccl::sys::{ncclComm, ncclComm_t};

use crate::config::Config;
use crate::error::Error;
use crate::library::{Api, IN_PROGRESS, SUCCESS};
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
    /// How closing went, once it has.
    closed: Mutex<Option<Result<(), Error>>>,
    closes: Condvar,
    /// The GPU that it is on, for the thread that closes it: NCCL would open the first one there.
    context: Option<Context>,
}

struct Context(CUcontext);

// SAFETY: a context may be made current on any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// This thread's, if there is a driver, and one.
    fn current() -> Option<Self> {
        // SAFETY: opens NVIDIA's library, and closes it.
        let has_driver = unsafe { sys::is_culib_present() };
        has_driver.then(result::ctx::get_current)?.ok()?.map(Self)
    }

    fn make_current(&self) {
        // SAFETY: contexts are kept to the end of the process. Where it fails the driver is lost, and so is what is closed.
        let _ = unsafe { result::ctx::set_current(self.0) };
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
    pub fn new(api: &'static Api, handle: ncclComm_t, rank: usize, size: usize, config: &Config) -> Self {
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
            closed: Mutex::new(None),
            closes: Condvar::new(),
            context: Context::current(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Handle> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock of a communicator that is not closed.
    pub fn open(&self) -> Result<MutexGuard<'_, Handle>, Error> {
        let handle = self.lock();
        if handle.0.is_null() { Err(self.aborted()) } else { Ok(handle) }
    }

    fn aborted(&self) -> Error {
        Error::Aborted { rank: self.rank, size: self.size }
    }

    fn late(&self, action: &'static str, after: Duration) -> Error {
        Error::Timeout { action, rank: self.rank, size: self.size, after }
    }

    /// Calls NCCL with the handle, and with the place for what it makes.
    pub fn call(
        &self,
        function: &'static str,
        call: impl FnOnce(ncclComm_t, *mut ncclComm_t) -> c_int,
    ) -> Result<(), Error> {
        let handle = self.open()?;
        self.api.check(function, call(handle.0, self.made.as_ptr()))
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
        let made = self.api.check("ncclCommInitRankConfig", init(self.made.as_ptr()));
        handle.0 = self.take_made();
        if handle.0.is_null() {
            // Libraries from about 2.27 on leave this thread inside of a group where there is no GPU: its later calls
            // would wait for the end of it. Elsewhere this is an error without consequences.
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
        match answered.and_then(|()| self.api.check("communicating", state)) {
            Err(error) => State::Failed(error),
            Ok(()) if state == IN_PROGRESS => State::InProgress,
            Ok(()) => State::Ready,
        }
    }

    /// Blocks until nothing is in progress. Aborts the communicator at the deadline.
    pub fn wait(self: &Arc<Self>, action: &'static str, timeout: Duration) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            match self.state() {
                State::Ready => return Ok(()),
                State::Failed(error) => return Err(error),
                State::InProgress => {}
            }
            let waited = start.elapsed();
            if waited >= timeout {
                // That it is late is what matters.
                let _ = self.close(Close::Abort);
                return Err(self.late(action, timeout));
            }
            rest(pause(waited, SPIN, LONGEST_PAUSE));
        }
    }

    /// Ends the communicator if nobody has, and waits for the end. Done on a thread of its own, for two reasons: NCCL
    /// blocks in it, for ever if a captured graph that uses the communicator is alive; and on a thread that is inside
    /// of a group it would do nothing.
    pub fn close(self: &Arc<Self>, how: Close) -> Result<(), Error> {
        if !self.is_closing.swap(true, Ordering::AcqRel) {
            let (shared, closing) = (self.clone(), Closing::begin());
            let close = move || {
                let _closing = closing;
                shared.close_here(how);
            };
            if thread::Builder::new().name("nccl-close".into()).spawn(close).is_err() {
                self.close_here(how);
            }
        }
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.closes.wait_timeout_while(closed, self.close_timeout, |closed| closed.is_none());
        let (closed, _) = waited.unwrap_or_else(PoisonError::into_inner);
        closed.clone().unwrap_or_else(|| Err(self.late("closing", self.close_timeout)))
    }

    fn close_here(&self, how: Close) {
        if let Some(context) = &self.context {
            context.make_current();
        }
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
        self.closes.notify_all();
    }
}

static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// Something is being closed or freed, on a thread of its own.
pub(crate) struct Closing;

impl Closing {
    pub fn begin() -> Self {
        CLOSING.fetch_add(1, Ordering::AcqRel);
        Self
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        CLOSING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Whether communicators are being closed, or memory of channels freed, in the background. A process that exits meanwhile
/// takes the library away from under NCCL's threads.
pub fn is_closing() -> bool {
    CLOSING.load(Ordering::Acquire) > 0
}

/// A group is queued in microseconds.
const SPIN: Duration = Duration::from_micros(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);
