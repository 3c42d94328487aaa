//! A fabric in memory, for tests, which is as unhelpful as NCCL: sizes have to agree, whoever is left alone waits for ever, a side
//! that aborts tells nobody, and that a message has left does not say that it comes.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moesaic_kernels::cuda::{Buffer, Device};

use super::LANES_MAX;
use super::fabric::{Breaker, Channel, Direction, Fabric, Id, Source};

/// Clones are one fabric: what is connected over it.
#[derive(Clone, Default)]
pub struct FakeFabric {
    state: Arc<State>,
    device: Option<Device>,
    lanes_max: Option<usize>,
}

impl fmt::Debug for FakeFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeFabric")
    }
}

#[derive(Default)]
struct State {
    pairs: Mutex<HashMap<Id, Arc<Pair>>>,
    next_id: AtomicU64,
    messages: AtomicUsize,
    taken_there: AtomicUsize,
}

/// Two ranks.
#[derive(Default)]
struct Pair {
    meeting: Mutex<Meeting>,
    change: Condvar,
}

#[derive(Default)]
struct Meeting {
    joined: [bool; 2],
    aborted: [bool; 2],
    /// Why the network failed, as both sides see it.
    failed: Option<String>,
    is_frozen: bool,
    /// What is on its way.
    sent: VecDeque<Vec<u8>>,
}

/// Who sends is through when no more than that has not been received.
const BUFFERED: usize = 128 << 10;

impl FakeFabric {
    /// The same fabric, for a worker whose rows lie on a GPU.
    pub fn on(&self, device: Device) -> Self {
        Self { device: Some(device), ..self.clone() }
    }

    /// The same fabric, for a process that has so many lanes at most.
    pub fn limited(&self, lanes_max: usize) -> Self {
        Self { lanes_max: Some(lanes_max), ..self.clone() }
    }

    /// Ids that were made.
    pub fn id_count(&self) -> u64 {
        self.state.next_id.load(Ordering::Relaxed)
    }

    /// Messages that came.
    pub fn message_count(&self) -> usize {
        self.state.messages.load(Ordering::Relaxed)
    }

    /// Loads that went on to a GPU.
    pub fn taken_there(&self) -> usize {
        self.state.taken_there.load(Ordering::Relaxed)
    }

    /// Both sides of all that is connected fail.
    pub fn fail_all(&self, reason: &str) {
        self.each(|meeting| meeting.failed = Some(reason.to_owned()));
    }

    /// Nothing moves any more over what is connected, and nobody is told.
    pub fn freeze_all(&self) {
        self.each(|meeting| meeting.is_frozen = true);
    }

    fn each(&self, change: impl Fn(&mut Meeting)) {
        for pair in lock(&self.state.pairs).values() {
            change(&mut lock(&pair.meeting));
            pair.change.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fabric for FakeFabric {
    fn version(&self) -> String {
        "fake".into()
    }

    fn new_id(&self) -> Result<Id, String> {
        let mut id = [0; 128];
        id[..8].copy_from_slice(&self.state.next_id.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        Ok(id)
    }

    fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    fn lanes_max(&self) -> usize {
        self.lanes_max.unwrap_or(LANES_MAX)
    }

    fn connect(
        &self,
        id: &Id,
        direction: Direction,
        _: usize,
        timeout: Duration,
        begun: &dyn Fn(Arc<dyn Breaker>),
    ) -> Result<Box<dyn Channel>, String> {
        let pair = lock(&self.state.pairs).entry(*id).or_default().clone();
        let rank = direction as usize;
        lock(&pair.meeting).joined[rank] = true;
        pair.change.notify_all();
        begun(Arc::new(FakeBreaker { pair: pair.clone(), rank }));
        let end = End { pair, rank, fabric: self.clone(), received: Vec::new() };
        end.wait("connecting", Some(timeout), |meeting| meeting.joined[1 - rank].then_some(Ok(())))?;
        Ok(Box::new(end))
    }
}

struct End {
    pair: Arc<Pair>,
    rank: usize,
    fabric: FakeFabric,
    /// The message that came last.
    received: Vec<u8>,
}

impl End {
    fn check(&self, does: Direction) -> Result<(), String> {
        let is_right = self.rank == does as usize;
        is_right.then_some(()).ok_or_else(|| format!("rank {} does not {does:?}", self.rank))
    }

    fn received(&self, at: usize, len: usize) -> Result<&[u8], String> {
        self.received.get(at..at + len).ok_or_else(|| "the message has no such bytes".into())
    }

    /// Until `look` finds something, this side is aborted, the network fails, or time is over.
    fn wait<T>(
        &self,
        what: &str,
        timeout: Option<Duration>,
        mut look: impl FnMut(&mut Meeting) -> Option<Result<T, String>>,
    ) -> Result<T, String> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut meeting = lock(&self.pair.meeting);
        loop {
            if meeting.aborted[self.rank] {
                return Err("aborted".into());
            }
            if let Some(reason) = &meeting.failed {
                return Err(reason.clone());
            }
            if let Some(found) = look(&mut meeting) {
                self.pair.change.notify_all();
                return found;
            }
            let left = deadline.map_or(Duration::from_secs(60), |deadline| deadline - Instant::now().min(deadline));
            if left.is_zero() {
                meeting.aborted[self.rank] = true;
                return Err(format!("{what} took longer than {timeout:?}"));
            }
            meeting = self.pair.change.wait_timeout(meeting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Channel for End {
    fn send(&mut self, len: usize, parts: &[(usize, Source<'_>)], timeout: Duration) -> Result<(), String> {
        self.check(Direction::Send)?;
        // What no part says is any.
        let mut bytes = vec![0xa5; len];
        for (at, part) in parts {
            let part = match part {
                Source::Here(part) => Cow::Borrowed(*part),
                Source::There(part) => part.read().map_err(|error| error.to_string())?.into(),
            };
            bytes[*at..][..part.len()].copy_from_slice(&part);
        }
        lock(&self.pair.meeting).sent.push_back(bytes);
        self.pair.change.notify_all();
        let has_left = |meeting: &mut Meeting| meeting.sent.iter().map(Vec::len).sum::<usize>() <= BUFFERED;
        self.wait("sending", Some(timeout), |meeting| has_left(meeting).then_some(Ok(())))
    }

    fn receive(&mut self, len: usize, beginning: &mut [u8], timeout: Option<Duration>) -> Result<(), String> {
        self.check(Direction::Receive)?;
        self.received = self.wait("receiving", timeout, |meeting| {
            let offered = if meeting.is_frozen { None } else { meeting.sent.pop_front() }?;
            if offered.len() != len {
                let reason = format!("{} bytes were sent and {len} received", offered.len());
                meeting.failed = Some(reason.clone());
                return Some(Err(reason));
            }
            self.fabric.state.messages.fetch_add(1, Ordering::Relaxed);
            Some(Ok(offered))
        })?;
        self.take(0, beginning)
    }

    fn take(&mut self, at: usize, to: &mut [u8]) -> Result<(), String> {
        to.copy_from_slice(self.received(at, to.len())?);
        Ok(())
    }

    fn take_there(&mut self, at: usize, to: Buffer<u8>) -> Result<Buffer<u8>, String> {
        let device = self.fabric.device.as_ref().ok_or("rows of this side lie on no GPU")?;
        let taken = self.received(at, to.len())?;
        self.fabric.state.taken_there.fetch_add(1, Ordering::Relaxed);
        device.write(&to, 0, taken).map_err(|error| error.to_string()).map(|()| to)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        lock(&self.pair.meeting).aborted[self.rank] = true;
    }
}

struct FakeBreaker {
    pair: Arc<Pair>,
    rank: usize,
}

impl Breaker for FakeBreaker {
    fn abort(&self) -> bool {
        lock(&self.pair.meeting).aborted[self.rank] = true;
        self.pair.change.notify_all();
        true
    }
}
