//! A tracker over four workers, what it sent and how its calls ended.

use std::collections::BTreeMap;
use std::ops::Range;

use moesaic_proto::{Epoch, ExpertId, Placement};

use super::*;
use crate::dispatcher::Route;
use crate::fake;
use crate::frame::{Activations, FLAG_F32};

pub const HIDDEN: usize = 2;
pub const GROUP: usize = 3;
pub const TOP_K: usize = 2;
pub const LAYER: LayerId = LayerId(9);
pub const DEADLINE: Duration = Duration::from_secs(3);
pub const WORKERS: u64 = 4;

pub fn worker(number: u64) -> WorkerId {
    WorkerId::new(&format!("w{number}")).unwrap()
}

/// How a call ended: its sum, or the error.
type End = Result<Vec<f32>, DispatchError>;

/// What a call was made of.
struct Asked {
    at: Duration,
    x: Vec<f32>,
    routes: Vec<Route>,
    recipe: Recipe,
}

pub struct Bench {
    pub tracker: Tracker,
    pub now: Duration,
    pub sent: Vec<(Destination, RequestFrame)>,
    pub ends: BTreeMap<u64, End>,
    /// Of the placement in use, by expert.
    pub holders: Vec<Vec<u32>>,
    /// Workers that are not here have left.
    edges: BTreeMap<u64, EdgeId>,
    next_edge: u64,
    ways: Option<Arc<Ways>>,
    calls: BTreeMap<u64, Asked>,
}

impl Bench {
    /// All workers are up.
    pub fn new(holders: &[&[u32]]) -> Self {
        let mut bench = Self {
            tracker: Tracker::new(HIDDEN, DEADLINE),
            now: Duration::ZERO,
            sent: Vec::new(),
            ends: BTreeMap::new(),
            holders: holders.iter().map(|holders| holders.to_vec()).collect(),
            edges: BTreeMap::new(),
            next_edge: 0,
            ways: None,
            calls: BTreeMap::new(),
        };
        for number in 0..WORKERS {
            bench.new_edge(number);
            bench.heard(number);
        }
        bench.set_ways(5);
        bench
    }

    pub fn on(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.tracker.on_event(self.now, event, &mut actions);
        for action in actions {
            let (CallId(call), end) = match action {
                Action::Send { to, frame } => {
                    self.sent.push((to, frame));
                    continue;
                }
                Action::Done { call, answers } => (call, Ok(self.sum(call.0, answers))),
                Action::Failed { call, error } => (call, Err(error)),
            };
            let is_final = |cause: &Cause| matches!(cause, Cause::Refused(r) if r.reason == RefusalReason::Malformed);
            let is_early = self.now < self.calls[&call].at + DEADLINE;
            if let Err(error) = &end
                && is_early
            {
                assert!(matches!(error, DispatchError::Lost { cause, .. } if is_final(cause)), "too early: {error}");
            }
            let before = self.ends.insert(call, end);
            assert!(before.is_none(), "call {call} ended twice");
        }
    }

    fn sum(&self, call: u64, answers: Vec<Answer>) -> Vec<f32> {
        let answers: Vec<_> =
            answers.into_iter().map(|answer| answer.into_values(&fake::OPS, HIDDEN).brought()).collect();
        let Asked { x, recipe, .. } = &self.calls[&call];
        let mut y = vec![f32::NAN; x.len()];
        recipe.combine(&fake::OPS, &answers, HIDDEN, &mut y);
        y
    }

    /// A call with a row for each of these experts, ascending, as the dispatcher makes it; says which frames were sent.
    pub fn call(&mut self, call: u64, rows: &[[u16; TOP_K]]) -> Range<usize> {
        let first = self.sent.len();
        let route = |(i, &expert): (usize, &u16)| Route { expert: ExpertId(expert), weight: 0.3 + i as f32 * 0.17 };
        let routes: Vec<Route> = rows.iter().flatten().enumerate().map(route).collect();
        let x: Vec<f32> = (0..rows.len() * HIDDEN).map(|i| (call * 31 + i as u64) as f32 * 0.37 - 2.0).collect();

        let layout = Layout::new(HIDDEN, 4, GROUP, TOP_K);
        let ways = self.ways.clone().unwrap();
        let ranks = self.tracker.ranks(self.now, &ways);
        let holders = ways.holders(&ranks, LAYER, routes.iter().map(|route| route.expert), call, Rank::Silent);
        let plan = plan::split(&layout, &routes, |expert| holders[usize::from(expert.0)]);
        let header = Header {
            epoch: ways.epoch(),
            layer: LAYER,
            micro_batch: 2,
            flags: FLAG_F32,
            source: 1,
            slot: 0,
            sequence: 0,
        };
        let activations = Activations::from(x.clone());
        let frames = plan.parts.into_iter().map(|part| {
            let to = ways.destination(part.worker).cloned();
            (to, RequestFrame::new(header, activations.clone(), HIDDEN, part.content))
        });
        let frames = frames.collect();
        self.calls.insert(call, Asked { at: self.now, x, routes, recipe: plan.recipe });
        self.on(Event::Call { call: CallId(call), layer: LAYER, layout, frames });
        first..self.sent.len()
    }

    pub fn right_answer(&self, sent: usize) -> AnswerFrame {
        let frame = &self.sent[sent].1;
        AnswerFrame::new(frame.header, Ok(fake::answer(frame, HIDDEN).into()))
    }

    /// The right answer to the frame that was sent as number `sent`.
    pub fn answer(&mut self, sent: usize) {
        let answer = self.right_answer(sent);
        self.on(Event::Answer { worker: self.sent[sent].0.worker.clone(), answer });
    }

    pub fn refuse(&mut self, sent: usize, reason: RefusalReason) {
        let (to, frame) = &self.sent[sent];
        let answer = AnswerFrame::new(frame.header, Err(Refusal::new(reason, "as told")));
        self.on(Event::Answer { worker: to.worker.clone(), answer });
    }

    pub fn key(&self, sent: usize) -> FrameKey {
        FrameKey::of(&self.sent[sent].1.header)
    }

    /// The number of the worker that a frame was sent to.
    pub fn number_of(&self, sent: usize) -> u64 {
        self.sent[sent].0.worker.as_str()[1..].parse().unwrap()
    }

    pub fn rank(&self, number: u64) -> Rank {
        let to = Destination { worker: worker(number), edge: self.edge(number) };
        self.tracker.health().rank(&to, self.now)
    }

    pub fn edge(&self, number: u64) -> Option<EdgeId> {
        self.edges.get(&number).copied()
    }

    /// The worker gets another edge, which is not up yet.
    pub fn new_edge(&mut self, number: u64) {
        let edge = EdgeId(self.next_edge);
        self.next_edge += 1;
        self.edges.insert(number, edge);
        self.tracker.set_way(&Destination { worker: worker(number), edge: Some(edge) });
    }

    pub fn leave(&mut self, number: u64) {
        let way = Destination { worker: worker(number), edge: self.edge(number) };
        self.edges.remove(&number);
        self.tracker.forget(&way);
    }

    pub fn heard(&mut self, number: u64) {
        if let Some(edge) = self.edge(number) {
            self.on(Event::Heard { edge });
        }
    }

    pub fn edge_down(&mut self, number: u64) {
        if let Some(edge) = self.edge(number) {
            self.on(Event::EdgeDown { edge, reason: "it fell".into() });
        }
    }

    /// The placement of this epoch comes into use, or the workers' edges have changed.
    pub fn set_ways(&mut self, epoch: u32) {
        let workers = (0..WORKERS).map(worker).collect();
        let layers = BTreeMap::from([(LAYER, self.holders.clone())]);
        let placement = Arc::new(Placement::new(Epoch(epoch), workers, layers).unwrap());
        let edge_of = |worker: &WorkerId| self.edge(worker.as_str()[1..].parse().unwrap()).map(Some);
        let ways = Arc::new(Ways::new(placement, edge_of));
        self.ways = Some(ways.clone());
        self.on(Event::Ways(ways));
    }

    pub fn pass(&mut self, time: Duration) {
        self.now += time;
        self.on(Event::Tick);
    }

    /// So much time, in which these workers send pings back.
    pub fn pass_with(&mut self, time: Duration, speaking: &[u64]) {
        let end = self.now + time;
        while self.now < end {
            self.pass(TICK.min(end - self.now));
            speaking.iter().for_each(|&number| self.heard(number));
        }
    }

    pub fn error(&self, call: u64) -> &DispatchError {
        self.ends[&call].as_ref().unwrap_err()
    }

    /// Just these calls are done, and each sum is right.
    pub fn assert_done(&self, calls: &[u64]) {
        let done: Vec<u64> = self.ends.iter().filter(|(_, end)| end.is_ok()).map(|(call, _)| *call).collect();
        assert_eq!(done, calls);
        self.assert_sums();
    }

    pub fn assert_sums(&self) {
        for (call, end) in &self.ends {
            let Ok(y) = end else { continue };
            let Asked { x, routes, .. } = &self.calls[call];
            let expected = fake::expected(x, HIDDEN, TOP_K, GROUP, routes);
            assert_eq!(fake::bits(y), fake::bits(&expected), "call {call}");
        }
    }
}
