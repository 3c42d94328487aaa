//! Calls of lanes that do not return.
//!
//! They have deadlines, but a driver's call inside may wait for all that runs on the GPU, and with it for a receive of another lane,
//! whose other side may wait in the same way for this one. Ending all lanes ends what it waits for: NCCL's kernels look at a flag,
//! which takes no call to the driver.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use moesaic_kernels::cuda::Buffer;

use super::TAKE_TIMEOUT;
use super::fabric::{Breaker, Channel, Source};
use super::lane::NotOpened;

/// Longer than connecting takes at most, with its first message and with giving up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// A call may take so much longer than it should.
const PATIENCE: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_millis(250);

/// A channel whose calls are watched.
pub(super) struct Watched {
    channel: Box<dyn Channel>,
    call: Arc<Call>,
}

/// The call in hand, if it should return by itself.
struct Call {
    deadline: Mutex<Option<Instant>>,
    /// Ends the lane.
    late: Box<dyn Fn() + Send + Sync>,
}

impl Watched {
    /// What `connect` makes. `late` is called on another thread, and makes no call to the driver.
    pub fn connect(
        late: impl Fn() + Send + Sync + 'static,
        connect: impl FnOnce() -> Result<Box<dyn Channel>, String>,
    ) -> Result<Self, String> {
        let call = Arc::new(Call { deadline: Mutex::new(None), late: Box::new(late) });
        watch(&call).map_err(|error| NotOpened::Thread(error).to_string())?;
        let channel = call.within(Some(CONNECT_TIMEOUT), connect)?;
        Ok(Self { channel, call })
    }
}

impl Channel for Watched {
    fn send(&mut self, len: usize, parts: &[(usize, Source<'_>)], timeout: Duration) -> Result<(), String> {
        self.call.within(Some(timeout), || self.channel.send(len, parts, timeout))
    }

    fn receive(&mut self, len: usize, beginning: &mut [u8], timeout: Option<Duration>) -> Result<(), String> {
        self.call.within(timeout, || self.channel.receive(len, beginning, timeout))
    }

    fn take(&mut self, at: usize, to: &mut [u8]) -> Result<(), String> {
        self.call.within(Some(TAKE_TIMEOUT), || self.channel.take(at, to))
    }

    fn take_there(&mut self, at: usize, to: &Buffer<u8>) -> Result<(), String> {
        self.call.within(Some(TAKE_TIMEOUT), || self.channel.take_there(at, to))
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        self.channel.breaker()
    }
}

impl Call {
    fn within<T>(&self, timeout: Option<Duration>, call: impl FnOnce() -> T) -> T {
        *self.deadline() = timeout.map(|timeout| Instant::now() + timeout + PATIENCE);
        let answer = call();
        *self.deadline() = None;
        answer
    }

    fn is_late(&self) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= Instant::now())
    }

    fn deadline(&self) -> MutexGuard<'_, Option<Instant>> {
        self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of the process. There is a thread that watches them as long as there are any.
fn watched() -> MutexGuard<'static, Vec<Weak<Call>>> {
    static ALL: Mutex<Vec<Weak<Call>>> = Mutex::new(Vec::new());
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(call: &Arc<Call>) -> std::io::Result<()> {
    let mut all = watched();
    if all.is_empty() {
        thread::Builder::new().name("lane-watch".into()).spawn(keep_watching)?;
    }
    all.push(Arc::downgrade(call));
    Ok(())
}

fn keep_watching() {
    let has_calls = || {
        let mut all = watched();
        all.retain(|call| call.strong_count() > 0);
        !all.is_empty()
    };
    loop {
        thread::sleep(EVERY);
        if !has_calls() {
            return;
        }
        if calls().iter().any(|call| call.is_late()) {
            end_all();
        }
    }
}

fn calls() -> Vec<Arc<Call>> {
    watched().iter().filter_map(Weak::upgrade).collect()
}

/// What is late may wait for any lane, also for one that does nothing.
pub(super) fn end_all() {
    calls().iter().for_each(|call| (call.late)());
}
