//! Calls of lanes that do not return.
//!
//! They have deadlines, but a driver's call inside may wait for all that runs on the GPU, and with it for a receive of another lane,
//! whose other side may wait in the same way for this one. Ending all lanes ends what it waits for: NCCL's kernels look at a flag,
//! which takes no call to the driver.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use moesaic_kernels::cuda::Buffer;

use super::fabric::{Channel, Source};
use super::lane::NotOpened;
use super::{TAKE_TIMEOUT, WRITTEN_TIMEOUT};

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

/// What a call that does not return ends.
pub(super) trait Late: Send + Sync {
    /// Makes no call to the driver, takes no lock that is held over one, and tells nobody. False if it has ended already.
    fn end(&self) -> bool;
    /// Says that it has ended.
    fn tell(&self);
}

/// The call in hand, if it should return by itself.
struct Call {
    deadline: Mutex<Option<Deadline>>,
    /// The lane.
    late: Weak<dyn Late>,
}

#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    /// Lanes were ended for it.
    has_passed: bool,
}

impl Watched {
    /// What `connect` makes, for the lane `late`.
    pub fn connect<L: Late + 'static>(
        late: &Arc<L>,
        connect: impl FnOnce() -> Result<Box<dyn Channel>, String>,
    ) -> Result<Self, String> {
        let late: Weak<dyn Late> = Arc::<L>::downgrade(late);
        let call = Arc::new(Call { deadline: Mutex::new(None), late });
        watch(&call).map_err(|error| NotOpened::Thread(error).to_string())?;
        let channel = call.within(Some(CONNECT_TIMEOUT), connect)?;
        Ok(Self { channel, call })
    }
}

impl Channel for Watched {
    fn send(&mut self, len: usize, parts: &[(usize, Source<'_>)], timeout: Duration) -> Result<(), String> {
        let is_written = |part: &(usize, Source<'_>)| match part.1 {
            Source::Here(_) => true,
            Source::There(bytes) => bytes.written().is_none_or(|mark| mark.is_past().unwrap_or(true)),
        };
        let are_written = self.call.within(Some(TAKE_TIMEOUT), || parts.iter().all(is_written));
        let written = if are_written { Duration::ZERO } else { WRITTEN_TIMEOUT };
        self.call.within(Some(written + timeout), || self.channel.send(len, parts, timeout))
    }

    fn receive(&mut self, len: usize, beginning: &mut [u8], timeout: Option<Duration>) -> Result<(), String> {
        self.call.within(timeout, || self.channel.receive(len, beginning, timeout))
    }

    fn take(&mut self, at: usize, to: &mut [u8]) -> Result<(), String> {
        self.call.within(Some(TAKE_TIMEOUT), || self.channel.take(at, to))
    }

    fn take_there(&mut self, at: usize, to: Buffer<u8>) -> Result<Buffer<u8>, String> {
        self.call.within(Some(TAKE_TIMEOUT), || self.channel.take_there(at, to))
    }
}

impl Call {
    fn within<T>(&self, timeout: Option<Duration>, call: impl FnOnce() -> T) -> T {
        let deadline = |timeout| Deadline { at: Instant::now() + timeout + PATIENCE, has_passed: false };
        *self.deadline() = timeout.map(deadline);
        let answer = call();
        *self.deadline() = None;
        answer
    }

    fn is_late(&self) -> bool {
        self.deadline().is_some_and(|deadline| deadline.at <= Instant::now())
    }

    /// The same, once for each call.
    fn has_become_late(&self) -> bool {
        let is_late = self.is_late();
        let mut deadline = self.deadline();
        let before = deadline.as_mut().map(|deadline| std::mem::replace(&mut deadline.has_passed, is_late));
        is_late && before == Some(false)
    }

    fn deadline(&self) -> MutexGuard<'_, Option<Deadline>> {
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
        let slept = Instant::now();
        thread::sleep(EVERY);
        if !has_calls() {
            return;
        }
        // A process that has been stopped goes on everywhere at a time: what is late by that may be about to return.
        let was_stopped = slept.elapsed() > PATIENCE;
        if !was_stopped && calls().iter().filter(|call| call.has_become_late()).count() > 0 {
            end_all();
        }
    }
}

fn calls() -> Vec<Arc<Call>> {
    watched().iter().filter_map(Weak::upgrade).collect()
}

/// Whether a call does not return: no lane would fare better.
pub(super) fn is_late() -> bool {
    calls().iter().any(|call| call.is_late())
}

/// What is late may wait for any lane, also for one that does nothing. All are ended before anybody is told, who might have to wait.
pub(super) fn end_all() {
    let lanes = calls().into_iter().filter_map(|call| call.late.upgrade());
    let ended: Vec<_> = lanes.filter(|lane| lane.end()).collect();
    ended.iter().for_each(|lane| lane.tell());
}
