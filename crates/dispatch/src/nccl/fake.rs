//! A fabric in memory, for tests, which is as unhelpful as NCCL: a message needs its receive, sizes have to agree, whoever is
//! left alone waits for ever, and a side that aborts tells nobody.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fabric::{Breaker, Channel, Direction, Fabric, Id};

/// Clones are one fabric: what is connected over it.
#[derive(Clone, Default)]
pub struct FakeFabric(Arc<State>);

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
    /// What is being sent, and how much was received.
    offered: Option<Vec<u8>>,
    taken: u64,
}

impl FakeFabric {
    /// Messages that came.
    pub fn message_count(&self) -> usize {
        self.0.messages.load(Ordering::Relaxed)
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
        for pair in lock(&self.0.pairs).values() {
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
        id[..8].copy_from_slice(&self.0.next_id.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        Ok(id)
    }

    fn connect(&self, id: &Id, direction: Direction, timeout: Duration) -> Result<Box<dyn Channel>, String> {
        let pair = lock(&self.0.pairs).entry(*id).or_default().clone();
        let rank = direction as usize;
        lock(&pair.meeting).joined[rank] = true;
        pair.change.notify_all();
        let end = End { pair, rank, fabric: self.clone() };
        end.wait("connecting", Some(timeout), |meeting| meeting.joined[1 - rank].then_some(Ok(())))?;
        Ok(Box::new(end))
    }
}

struct End {
    pair: Arc<Pair>,
    rank: usize,
    fabric: FakeFabric,
}

impl End {
    fn check(&self, does: Direction) -> Result<(), String> {
        let is_right = self.rank == does as usize;
        is_right.then_some(()).ok_or_else(|| format!("rank {} does not {does:?}", self.rank))
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
            if !meeting.is_frozen
                && let Some(found) = look(&mut meeting)
            {
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
    fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<(), String> {
        self.check(Direction::Send)?;
        let taken = lock(&self.pair.meeting).taken;
        let mut bytes = Some(bytes.to_vec());
        self.wait("sending", Some(timeout), |meeting| {
            if let Some(bytes) = bytes.take() {
                meeting.offered = Some(bytes);
                self.pair.change.notify_all();
            }
            (meeting.taken > taken).then_some(Ok(()))
        })
    }

    fn receive(&mut self, bytes: &mut [u8], timeout: Option<Duration>) -> Result<(), String> {
        self.check(Direction::Receive)?;
        self.wait("receiving", timeout, |meeting| {
            let offered = meeting.offered.take()?;
            if offered.len() != bytes.len() {
                let reason = format!("{} bytes were sent and {} received", offered.len(), bytes.len());
                meeting.failed = Some(reason.clone());
                return Some(Err(reason));
            }
            bytes.copy_from_slice(&offered);
            meeting.taken += 1;
            self.fabric.0.messages.fetch_add(1, Ordering::Relaxed);
            Some(Ok(()))
        })
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        Arc::new(FakeBreaker { pair: self.pair.clone(), rank: self.rank })
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
    fn abort(&self) {
        lock(&self.pair.meeting).aborted[self.rank] = true;
        self.pair.change.notify_all();
    }
}
