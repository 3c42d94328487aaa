//! How the workers are doing, from what their edges show: who can be asked, who is silent, who is slow.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use moesaic_proto::WorkerId;

use super::{Destination, EdgeId};

/// A worker that has said nothing for this long is frozen or cut off: it sends pings back every 100 ms whatever it
/// computes, so that is four lost ones. Half of what a frozen worker may cost.
pub const SILENT_AFTER: Duration = Duration::from_millis(400);
/// A worker whose answers take this many times as long as the others' median is slow...
const SLOW_RATIO: f64 = 3.0;
/// ...if its usual frame is late by more seconds than a scheduler's whim.
const SLOW_MIN: f64 = 0.005;
/// ...and if it was asked so often: the first answers tell how warm its caches are.
const SLOW_ANSWERS_MIN: u32 = 3;
/// An answer is late after this many times what its worker needs as a rule...
const LATE_RATIO: f64 = 4.0;
/// ...and at least this long: shorter ones are no news on a busy machine.
const LATE_MIN: Duration = Duration::from_millis(20);
/// How often a slow worker is sent a copy of what another computes, to see whether it still is.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// A worker that refuses because it stops, or does not serve the epoch yet, is left alone for so long.
const AVOIDED_FOR: Duration = Duration::from_millis(500);
/// Weight of the newest answer in the smoothed time: bad news must repeat itself, good news is believed sooner...
const NEWEST: f64 = 0.2;
const NEWEST_GOOD: f64 = 0.5;
/// ...and however long an answer took, it counts as so many times what was usual before it, or this long: one is no
/// proof, and a worker that was frozen for a minute is not slow for the next.
const OUTLIER_RATIO: f64 = 8.0;
const OUTLIER_MIN: Duration = Duration::from_millis(100);
/// What a frame costs beside its terms, in terms.
const FRAME_TERMS: f64 = 16.0;

/// From the one that should be asked first to the one that cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    Good,
    Slow,
    Avoided,
    Silent,
    Down,
}

/// What is known of a worker.
#[derive(Clone, Debug, Default)]
struct Worker {
    /// The way to it; `None`: it is in this process.
    edge: Option<EdgeId>,
    /// `None`: the edge is down.
    heard: Option<Duration>,
    pace: Option<Pace>,
    is_slow: bool,
    avoided_until: Duration,
    probed: Duration,
    terms: u64,
    detours: Detours,
    /// How long the last frames took, the newest last.
    recent: VecDeque<Duration>,
}

/// Frames whose times are remembered for a worker.
const RECENT: usize = 256;

/// What was done while a worker was not well, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detours {
    /// Frames that others were asked for as well.
    pub hedged: u64,
    /// Frames that it lost, which others were asked for then.
    pub resent: u64,
    /// Terms that went to others, though it was its turn.
    pub steered: u64,
}

/// What is to be told of a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Terms that it has answered.
    pub terms: u64,
    /// How long a frame takes, smoothed.
    pub answer: Duration,
    pub detours: Detours,
    /// How long the last frames took, ascending.
    pub recent: Vec<Duration>,
}

/// How long a worker's answers take, smoothed.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Seconds for each unit of weight, and the weight of an answer.
    seconds: f64,
    weight: f64,
    answers: u32,
}

/// Of a frame: its terms and what it costs beside them.
fn weight(terms: usize) -> f64 {
    terms as f64 + FRAME_TERMS
}

impl Pace {
    /// After an answer to so many terms that took so long, or longer.
    fn after(before: Option<Self>, terms: usize, took: Duration) -> Self {
        let (weight, took) = (weight(terms), took.as_secs_f64());
        let Some(before) = before else { return Self { seconds: took / weight, weight, answers: 1 } };
        let usual = before.seconds * weight;
        let change = match took < usual {
            true => NEWEST_GOOD * (took - usual),
            false => NEWEST * (took.min((usual * OUTLIER_RATIO).max(OUTLIER_MIN.as_secs_f64())) - usual),
        };
        Self {
            seconds: before.seconds + change / weight,
            weight: before.weight + NEWEST * (weight - before.weight),
            answers: before.answers.saturating_add(1),
        }
    }

    /// How long an answer to so many terms takes.
    fn usual(&self, terms: usize) -> Duration {
        Duration::from_secs_f64(self.seconds * weight(terms))
    }

    fn is_slow(&self, median: f64) -> bool {
        let excess = (self.seconds - median) * self.weight;
        self.answers >= SLOW_ANSWERS_MIN && self.seconds > median * SLOW_RATIO && excess > SLOW_MIN
    }
}

/// See the module. Workers of this process are good for as long as they are known.
#[derive(Debug, Default)]
pub struct Health {
    workers: HashMap<WorkerId, Worker>,
    by_edge: HashMap<EdgeId, WorkerId>,
}

impl Health {
    /// The worker is reached in this way from now on; over an edge, it is down until it is heard.
    pub fn set_way(&mut self, to: &Destination) {
        let worker = self.workers.entry(to.worker.clone()).or_default();
        if worker.edge != to.edge {
            let old = worker.edge;
            *worker = Worker { edge: to.edge, terms: worker.terms, detours: worker.detours, ..Worker::default() };
            old.and_then(|old| self.by_edge.remove(&old));
        }
        if let Some(edge) = to.edge {
            self.by_edge.insert(edge, to.worker.clone());
        }
    }

    pub fn forget(&mut self, to: &Destination) {
        if self.of(to).is_some() {
            self.workers.remove(&to.worker);
            to.edge.and_then(|edge| self.by_edge.remove(&edge));
        }
    }

    /// The edge is up, or something has come over it; true if it was down before.
    pub fn heard(&mut self, edge: EdgeId, now: Duration) -> bool {
        self.of_edge(edge).is_some_and(|worker| worker.heard.replace(now).is_none())
    }

    pub fn down(&mut self, edge: EdgeId) {
        if let Some(worker) = self.of_edge(edge) {
            (worker.heard, worker.avoided_until) = (None, Duration::ZERO);
        }
    }

    /// The worker refuses for reasons that pass, or answers wrongly.
    pub fn avoid(&mut self, to: &Destination, now: Duration) {
        if let Some(worker) = self.of(to) {
            worker.avoided_until = now + AVOIDED_FOR;
        }
    }

    /// An answer came `after` it was asked for.
    pub fn answered(&mut self, to: &Destination, terms: usize, after: Duration, now: Duration) {
        let Some(worker) = self.of(to) else { return };
        worker.terms += terms as u64;
        if worker.recent.len() == RECENT {
            worker.recent.pop_front();
        }
        worker.recent.push_back(after);
        worker.heard = worker.heard.map(|_| now);
        worker.pace = Some(Pace::after(worker.pace, terms, after));
        self.judge(&to.worker);
    }

    /// There is no answer yet, `after` it was asked for, and nobody waits for it any more. Says something of a worker
    /// only if that is long; one that is silent is not slow.
    pub fn unanswered(&mut self, to: &Destination, terms: usize, after: Duration, now: Duration) {
        let is_silent = self.rank(to, now) >= Rank::Silent;
        let is_late = after > self.late_after(&to.worker, terms);
        let Some(worker) = self.of(to).filter(|_| !is_silent) else { return };
        if worker.pace.map_or(is_late, |pace| after > pace.usual(terms)) {
            worker.pace = Some(Pace::after(worker.pace, terms, after));
            self.judge(&to.worker);
        }
    }

    /// Whether the worker is slow, by the others' median.
    fn judge(&mut self, id: &WorkerId) {
        let others = self.workers.iter().filter(|(other, worker)| *other != id && worker.edge.is_some());
        let mut paces: Vec<f64> = others.filter_map(|(_, worker)| worker.pace).map(|pace| pace.seconds).collect();
        if paces.is_empty() {
            return;
        }
        let middle = paces.len() / 2;
        let median = *paces.select_nth_unstable_by(middle, f64::total_cmp).1;
        if let Some(worker) = self.workers.get_mut(id) {
            worker.is_slow = worker.edge.is_some() && worker.pace.is_some_and(|pace| pace.is_slow(median));
        }
    }

    /// How a worker stands that is to be reached in this way.
    pub fn rank(&self, to: &Destination, now: Duration) -> Rank {
        let Some(worker) = self.workers.get(&to.worker).filter(|worker| worker.edge == to.edge) else {
            return Rank::Down;
        };
        match worker.heard {
            None if to.edge.is_some() => Rank::Down,
            Some(heard) if now > heard + SILENT_AFTER => Rank::Silent,
            _ if now < worker.avoided_until => Rank::Avoided,
            _ if worker.is_slow => Rank::Slow,
            _ => Rank::Good,
        }
    }

    /// After what time a frame of so many terms is late.
    pub fn late_after(&self, id: &WorkerId, terms: usize) -> Duration {
        let pace = self.workers.get(id).and_then(|worker| worker.pace);
        pace.map_or(LATE_MIN, |pace| pace.usual(terms)).mul_f64(LATE_RATIO).max(LATE_MIN)
    }

    /// Whether it is time to see how a slow worker does.
    pub fn is_probe_due(&self, to: &Destination, now: Duration) -> bool {
        let is_due = |worker: &Worker| worker.is_slow && now >= worker.probed + PROBE_EVERY;
        self.workers.get(&to.worker).is_some_and(is_due) && self.rank(to, now) == Rank::Slow
    }

    pub fn probed(&mut self, to: &Destination, now: Duration) {
        if let Some(worker) = self.of(to) {
            worker.probed = now;
        }
    }

    pub fn figures(&self, id: &WorkerId) -> Figures {
        let Some(worker) = self.workers.get(id) else { return Figures::default() };
        let answer = worker.pace.map_or(0.0, |pace| pace.seconds * pace.weight);
        let mut recent: Vec<_> = worker.recent.iter().copied().collect();
        recent.sort_unstable();
        Figures { terms: worker.terms, answer: Duration::from_secs_f64(answer), detours: worker.detours, recent }
    }

    /// Counts something that was done because of a worker.
    pub fn detour(&mut self, id: &WorkerId, count: impl FnOnce(&mut Detours)) {
        if let Some(worker) = self.workers.get_mut(id) {
            count(&mut worker.detours);
        }
    }

    /// The worker, if it is reached in this way at present.
    fn of(&mut self, to: &Destination) -> Option<&mut Worker> {
        self.workers.get_mut(&to.worker).filter(|worker| worker.edge == to.edge)
    }

    fn of_edge(&mut self, edge: EdgeId) -> Option<&mut Worker> {
        self.workers.get_mut(self.by_edge.get(&edge)?)
    }
}
