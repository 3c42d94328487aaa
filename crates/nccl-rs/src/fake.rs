//! An NCCL for tests: it answers what it is told to, and remembers what it is asked.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{c_char, c_int, c_void};
use std::ptr::{from_ref, null_mut};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};

use crate::communicator::{Communicator, Connecting};
use crate::config::{Config, RawConfig};
use crate::error::Error;
use crate::library::{Api, IN_PROGRESS, SUCCESS, Version};
use crate::unique_id::UniqueId;

/// A fake communicator, whose address is its handle. Lasts to the end of the process.
pub(crate) struct Fake(Mutex<Script>);

#[derive(Default)]
pub(crate) struct Script {
    /// What was called with this communicator, and the groups of its thread.
    pub calls: Vec<&'static str>,
    /// Codes other than success.
    pub answers: HashMap<&'static str, c_int>,
    /// What polling finds, in turn; ready when there is nothing left.
    pub states: VecDeque<c_int>,
    /// What splitting and shrinking make.
    pub child: Option<&'static Fake>,
    pub abort_takes: Duration,
    /// The ranks and the flags that shrinking was called with.
    pub shrunk: (Vec<c_int>, c_int),
}

thread_local! {
    /// The one that connecting on this thread makes, and that sees this thread's groups.
    static CURRENT: Cell<Option<&'static Fake>> = const { Cell::new(None) };
}

impl Fake {
    pub fn new(script: Script) -> &'static Self {
        Box::leak(Box::new(Self(Mutex::new(script))))
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().expect("no test panics inside")
    }

    /// How often a function was called.
    pub fn count(&self, call: &str) -> usize {
        self.script().calls.iter().filter(|made| **made == call).count()
    }

    /// Waits for a call that another thread makes.
    pub fn wait_for(&self, call: &str) {
        while self.count(call) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn begin(&'static self, version: (u32, u32, u32), config: &Config) -> Result<Connecting, Error> {
        CURRENT.set(Some(self));
        let api: &'static Api = Box::leak(Box::new(api(version)));
        Communicator::begin_with(api, &UniqueId::from_bytes([7; UniqueId::BYTES]), 1, 4, config)
    }

    /// Rank 1 of 4, connected; its calls so far are forgotten.
    pub fn connected(&'static self, config: &Config) -> Communicator {
        let connecting = self.begin((2, 28, 9), config).expect("the fake connects");
        let connected = connecting.wait(Duration::from_secs(1)).expect("the fake connects");
        self.script().calls.clear();
        connected
    }

    fn handle(&self) -> ncclComm_t {
        from_ref(self).cast_mut().cast()
    }

    fn called(&self, call: &'static str) -> c_int {
        let mut script = self.script();
        script.calls.push(call);
        script.answers.get(call).copied().unwrap_or(SUCCESS)
    }
}

fn current() -> &'static Fake {
    CURRENT.get().expect("the test has a fake")
}

fn of(handle: ncclComm_t) -> &'static Fake {
    // SAFETY: handles come from `Fake::handle` alone, and fakes last.
    unsafe { &*handle.cast() }
}

/// Puts the child where the caller wants it.
fn make(fake: &Fake, to: *mut ncclComm_t) {
    let child = fake.script().child.map_or(null_mut(), Fake::handle);
    // SAFETY: the caller gave a place.
    unsafe { *to = child };
}

pub(crate) fn api((major, minor, patch): (u32, u32, u32)) -> Api {
    let version = Version::new(major, minor, patch);
    let has_shrink = version >= Version::new(2, 27, 0);
    Api {
        version,
        last_error,
        unique_id,
        init,
        split,
        shrink: has_shrink.then_some(shrink),
        rank,
        size,
        async_error,
        finalize,
        destroy,
        abort,
        group_start,
        group_end,
        send,
        receive,
        all_reduce,
        all_gather,
    }
}

unsafe extern "C" fn last_error(_: ncclComm_t) -> *const c_char {
    c"as it was told to\n".as_ptr()
}

unsafe extern "C" fn unique_id(_: *mut ncclUniqueId) -> c_int {
    SUCCESS
}

unsafe extern "C" fn init(to: *mut ncclComm_t, _: c_int, _: ncclUniqueId, _: c_int, _: *mut RawConfig) -> c_int {
    let code = current().called("init");
    if code == SUCCESS {
        // SAFETY: the caller gave a place.
        unsafe { *to = current().handle() };
        return IN_PROGRESS;
    }
    code
}

unsafe extern "C" fn split(handle: ncclComm_t, _: c_int, _: c_int, to: *mut ncclComm_t, _: *mut RawConfig) -> c_int {
    make(of(handle), to);
    of(handle).called("split")
}

unsafe extern "C" fn shrink(
    handle: ncclComm_t,
    ranks: *mut c_int,
    count: c_int,
    to: *mut ncclComm_t,
    _: *mut RawConfig,
    flags: c_int,
) -> c_int {
    make(of(handle), to);
    // SAFETY: the caller gave so many.
    let ranks = unsafe { std::slice::from_raw_parts(ranks, count as usize) };
    of(handle).script().shrunk = (ranks.to_vec(), flags);
    of(handle).called("shrink")
}

unsafe extern "C" fn rank(_: ncclComm_t, to: *mut c_int) -> c_int {
    // SAFETY: the caller gave a place.
    unsafe { *to = 0 };
    SUCCESS
}

unsafe extern "C" fn size(_: ncclComm_t, to: *mut c_int) -> c_int {
    // SAFETY: the caller gave a place.
    unsafe { *to = 2 };
    SUCCESS
}

unsafe extern "C" fn async_error(handle: ncclComm_t, to: *mut c_int) -> c_int {
    let state = of(handle).script().states.pop_front().unwrap_or(SUCCESS);
    // SAFETY: the caller gave a place.
    unsafe { *to = state };
    of(handle).called("state")
}

unsafe extern "C" fn finalize(handle: ncclComm_t) -> c_int {
    of(handle).called("finalize")
}

unsafe extern "C" fn destroy(handle: ncclComm_t) -> c_int {
    of(handle).called("destroy")
}

unsafe extern "C" fn abort(handle: ncclComm_t) -> c_int {
    let code = of(handle).called("abort");
    let takes = of(handle).script().abort_takes;
    thread::sleep(takes);
    code
}

unsafe extern "C" fn group_start() -> c_int {
    current().called("start")
}

unsafe extern "C" fn group_end() -> c_int {
    current().called("end")
}

unsafe extern "C" fn send(_: *const c_void, _: usize, _: c_int, _: c_int, handle: ncclComm_t, _: CUstream) -> c_int {
    of(handle).called("send")
}

unsafe extern "C" fn receive(_: *mut c_void, _: usize, _: c_int, _: c_int, handle: ncclComm_t, _: CUstream) -> c_int {
    of(handle).called("receive")
}

unsafe extern "C" fn all_reduce(
    _: *const c_void,
    _: *mut c_void,
    _: usize,
    _: c_int,
    _: c_int,
    handle: ncclComm_t,
    _: CUstream,
) -> c_int {
    of(handle).called("all_reduce")
}

unsafe extern "C" fn all_gather(
    _: *const c_void,
    _: *mut c_void,
    _: usize,
    _: c_int,
    handle: ncclComm_t,
    _: CUstream,
) -> c_int {
    of(handle).called("all_gather")
}
