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
    /// What those that have arguments were called with, in NCCL's order, without the communicator and where it puts things.
    pub arguments: Vec<(&'static str, Vec<usize>)>,
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
        self.script().arguments.clear();
        connected
    }

    fn handle(&self) -> ncclComm_t {
        from_ref(self).cast_mut().cast()
    }

    fn called_with(&self, call: &'static str, arguments: impl Into<Vec<usize>>) -> c_int {
        self.script().arguments.push((call, arguments.into()));
        self.called(call)
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
    Api {
        version,
        last_error,
        unique_id,
        init,
        split,
        shrink,
        rank,
        size,
        async_error,
        finalize,
        destroy,
        abort,
        group_start,
        group_end,
        send,
        recv,
        broadcast,
        reduce,
        all_reduce,
        reduce_scatter,
        all_gather,
        all_to_all: (version >= Version::new(2, 28, 0)).then_some(all_to_all),
    }
}

unsafe extern "C" fn last_error(_: ncclComm_t) -> *const c_char {
    c"as it was told to\n".as_ptr()
}

unsafe extern "C" fn unique_id(_: *mut ncclUniqueId) -> c_int {
    SUCCESS
}

unsafe extern "C" fn init(to: *mut ncclComm_t, ranks: c_int, _: ncclUniqueId, own: c_int, _: *mut RawConfig) -> c_int {
    let code = current().called_with("init", numbers([ranks, own]));
    if code == SUCCESS {
        // SAFETY: the caller gave a place.
        unsafe { *to = current().handle() };
        return IN_PROGRESS;
    }
    code
}

unsafe extern "C" fn split(
    handle: ncclComm_t,
    color: c_int,
    key: c_int,
    to: *mut ncclComm_t,
    _: *mut RawConfig,
) -> c_int {
    make(of(handle), to);
    of(handle).called_with("split", numbers([color, key]))
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
    of(handle).called_with("shrink", numbers(ranks.iter().copied().chain([flags])))
}

/// As they are recorded; negative ones wrap.
fn numbers(arguments: impl IntoIterator<Item = c_int>) -> Vec<usize> {
    arguments.into_iter().map(|argument| argument as usize).collect()
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

unsafe extern "C" fn send(
    from: *const c_void,
    count: usize,
    of_type: c_int,
    peer: c_int,
    handle: ncclComm_t,
    stream: CUstream,
) -> c_int {
    of(handle).called_with("send", [from.addr(), count, of_type as usize, peer as usize, stream.addr()])
}

unsafe extern "C" fn recv(
    to: *mut c_void,
    count: usize,
    of_type: c_int,
    peer: c_int,
    handle: ncclComm_t,
    stream: CUstream,
) -> c_int {
    of(handle).called_with("recv", [to.addr(), count, of_type as usize, peer as usize, stream.addr()])
}

unsafe extern "C" fn reduce(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    of_type: c_int,
    op: c_int,
    root: c_int,
    handle: ncclComm_t,
    stream: CUstream,
) -> c_int {
    let (of_type, op, root) = (of_type as usize, op as usize, root as usize);
    of(handle).called_with("reduce", [from.addr(), to.addr(), count, of_type, op, root, stream.addr()])
}

macro_rules! collectives {
    ($($name:ident),*) => {
        $(unsafe extern "C" fn $name(
            from: *const c_void,
            to: *mut c_void,
            count: usize,
            of_type: c_int,
            handle: ncclComm_t,
            stream: CUstream,
        ) -> c_int {
            let arguments = [from.addr(), to.addr(), count, of_type as usize, stream.addr()];
            of(handle).called_with(stringify!($name), arguments)
        })*
    };
}

macro_rules! collectives_with {
    ($($name:ident),*) => {
        $(unsafe extern "C" fn $name(
            from: *const c_void,
            to: *mut c_void,
            count: usize,
            of_type: c_int,
            with: c_int,
            handle: ncclComm_t,
            stream: CUstream,
        ) -> c_int {
            let arguments = [from.addr(), to.addr(), count, of_type as usize, with as usize, stream.addr()];
            of(handle).called_with(stringify!($name), arguments)
        })*
    };
}

collectives!(all_gather, all_to_all);
collectives_with!(broadcast, all_reduce, reduce_scatter);
