//! Calls of lanes that do not return.
//!
//! They have deadlines, but a driver's call inside may wait for all that runs on the GPU, and with it for a receive of another lane,
//! whose other side may wait in the same way for this one. Ending all lanes ends what it waits for: NCCL's kernels look at a flag,
//! which takes no call to the driver.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use moesaic_kernels::cuda::Buffer;

use super::fabric::{Breaker, Channel, Source};
use super::lane::NotOpened;

/// Longer than connecting takes at most, with its first message and with giving up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// For what a channel does without a deadline of its caller's.
const TAKE_TIMEOUT: Duration = Duration::from_secs(2);
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

    fn deadline(&self) -> MutexGuard<'_, Option<Instant>> {
        self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Watch {
    calls: Vec<Weak<Call>>,
    is_running: bool,
}

fn watched() -> MutexGuard<'static, Watch> {
    static ALL: Mutex<Watch> = Mutex::new(Watch { calls: Vec::new(), is_running: false });
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// By a thread of the process, which lives as long as there are channels.
fn watch(call: &Arc<Call>) -> std::io::Result<()> {
    let mut all = watched();
    if !all.is_running {
        thread::Builder::new().name("lane-watch".into()).spawn(keep_watching)?;
        all.is_running = true;
    }
    all.calls.push(Arc::downgrade(call));
    Ok(())
}

fn keep_watching() {
    loop {
        thread::sleep(EVERY);
        let mut all = watched();
        all.calls.retain(|call| call.strong_count() > 0);
        if all.calls.is_empty() {
            all.is_running = false;
            return;
        }
        let calls: Vec<_> = all.calls.iter().filter_map(Weak::upgrade).collect();
        drop(all);
        let now = Instant::now();
        if calls.iter().any(|call| call.deadline().is_some_and(|deadline| deadline <= now)) {
            end_all(calls);
        }
    }
}

/// A lane has not ended in time: what it waits for has to end, too.
pub(super) fn end_others() {
    let calls = watched().calls.iter().filter_map(Weak::upgrade).collect();
    end_all(calls);
}

/// A call that is late may wait for any lane, also for one that does nothing.
fn end_all(calls: Vec<Arc<Call>>) {
    calls.iter().for_each(|call| (call.late)());
}
