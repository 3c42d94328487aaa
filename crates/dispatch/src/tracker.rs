//! What is outstanding: every frame of every layer call, until its answer is in or its call has ended.
//!
//! A plain struct that is told what happened and says what to do. It keeps each frame until its call ends. A frame that
//! is lost (its edge breaks, its worker refuses or gives a wrong answer) is asked of other holders of its experts, split
//! over several if none has all; one whose worker is silent, or that is late, is asked of others as well (`hedge`), and
//! the first answer counts: all holders give the same bits. Where no holder can be reached a frame waits for one, until
//! its call's deadline; then the call fails, naming layer, experts and worker. Nothing is ever taken as zero.

mod call;
mod health;
mod hedge;
mod ways;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use moesaic_proto::v1::RefusalReason;
use moesaic_proto::{ExpertId, LayerId, WorkerId};

use crate::error::{Cause, DispatchError};
use crate::frame::{AnswerFrame, Header, RequestFrame};
use crate::payload::Values;
use crate::plan::{self, Layout, Recipe};
use call::{Call, Part, PartId, Sent, Try};

pub use call::Answer;
pub use health::{Detours, Figures, Health, Rank, SILENT_AFTER};
pub use ways::{NOWHERE, Ways};

/// Between two tries of a frame that no holder takes.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// How often late frames are looked for while anything is outstanding.
const TICK: Duration = Duration::from_millis(10);
/// Terms that may be asked for twice, as a share of all...
const HEDGED_SHARE: f64 = 0.04;
/// ...and at most so many at a time.
const HEDGED_TERMS_MAX: f64 = 2048.0;

/// One call of `Dispatcher::dispatch`. Numbers grow, so that the oldest call is the first in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// What an answer is matched by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameKey {
    pub micro_batch: u8,
    pub sequence: u32,
}

impl FrameKey {
    pub fn of(header: &Header) -> Self {
        Self { micro_batch: header.micro_batch, sequence: header.sequence }
    }
}

/// One of the edges that there have been. A worker that moves or comes back has several, one after the other, and the
/// old one may end after the new one is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EdgeId(pub u64);

/// Where a frame goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub worker: WorkerId,
    /// `None` for a worker of this process.
    pub edge: Option<EdgeId>,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A layer call and its frames, in the order in which `Action::Done` gives their answers. A frame without a
    /// destination waits for one.
    Call { call: CallId, layer: LayerId, layout: Layout, frames: Vec<(Option<Destination>, RequestFrame)> },
    /// A frame came back from this worker.
    Answer { worker: WorkerId, answer: AnswerFrame },
    /// A frame could not be handed to its edge.
    NotSent { key: FrameKey, cause: Cause },
    /// Frames can go to these workers, under this placement.
    Ways(Arc<Ways>),
    /// An edge can be used, or its worker has sent a ping back.
    Heard { edge: EdgeId },
    /// An edge broke: nothing that was sent over it will be answered.
    EdgeDown { edge: EdgeId, reason: String },
    /// Nobody waits for this call any more.
    Abandoned { call: CallId },
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    Send {
        to: Destination,
        frame: RequestFrame,
    },
    /// All answers of a call.
    Done {
        call: CallId,
        answers: Vec<Answer>,
    },
    Failed {
        call: CallId,
        error: DispatchError,
    },
}

/// What became of frames, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that were sent, again after a loss, and as well: their worker was silent or late, or slow and probed.
    pub sent: u64,
    pub resent: u64,
    pub hedged: u64,
    /// Terms of all frames that were sent, and of those that were sent as well.
    pub terms: u64,
    pub terms_hedged: u64,
    /// Answers that nobody waited for: late, or there twice.
    pub unmatched: u64,
    /// Answers from another worker than the one that was asked.
    pub misdirected: u64,
    /// Answers that did not fit what was asked.
    pub rejected: u64,
    /// Of those sent: frames that had left before it was known what they ask.
    pub ahead: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Tracker {
    hidden: usize,
    layer_deadline: Duration,
    next_sequence: u32,
    calls: BTreeMap<CallId, Call>,
    frames: HashMap<FrameKey, Sent>,
    /// Frames whose answers nobody waits for any more: when they come they still tell how their workers do.
    given_up: HashMap<FrameKey, Sent>,
    ways: Option<Arc<Ways>>,
    health: Health,
    counts: Counts,
    /// Terms that may be asked for twice at present.
    credit: f64,
}

/// When something happens, and what is to be done about it.
struct Turn<'a> {
    now: Duration,
    out: &'a mut Vec<Action>,
}

/// Why a frame is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Call,
    Loss,
    Hedge,
}

impl Tracker {
    pub fn new(hidden: usize, layer_deadline: Duration) -> Self {
        Self {
            hidden,
            layer_deadline,
            next_sequence: 0,
            calls: BTreeMap::new(),
            frames: HashMap::new(),
            given_up: HashMap::new(),
            ways: None,
            health: Health::default(),
            counts: Counts::default(),
            credit: HEDGED_TERMS_MAX,
        }
    }

    /// `now` never runs backwards; what it counts from does not matter.
    pub fn on_event(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        let turn = &mut Turn { now, out };
        match event {
            Event::Call { call, layer, layout, frames } => self.open(turn, call, layer, layout, frames),
            Event::Answer { worker, answer } => self.answer(turn, &worker, answer),
            Event::NotSent { key, cause } => self.lose(turn, key, cause),
            Event::Ways(ways) => {
                self.ways = Some(ways);
                self.retry_waiting(turn, |_| true);
            }
            Event::Heard { edge } => {
                if self.health.heard(edge, now) {
                    self.retry_waiting(turn, |_| true);
                }
            }
            Event::EdgeDown { edge, reason } => self.edge_down(turn, edge, &reason),
            Event::Abandoned { call } => drop(self.close(now, call)),
            Event::Tick => self.tick(turn),
        }
    }

    /// When `Event::Tick` has something to do.
    pub fn next_tick(&self, now: Duration) -> Option<Duration> {
        (!self.calls.is_empty()).then_some(now + TICK)
    }

    /// The worker is reached in this way from now on; over an edge, it is down until it is heard.
    pub fn set_way(&mut self, to: &Destination) {
        self.health.set_way(to);
    }

    /// The worker cannot be reached in this way any more; nothing changes if there is another way by now.
    pub fn forget(&mut self, to: &Destination) {
        self.health.forget(to);
    }

    /// How each worker of `ways` stands, by its index.
    pub fn ranks(&self, now: Duration, ways: &Ways) -> Vec<Rank> {
        ways.ranks(&self.health, now)
    }

    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Counts terms that go to others than whose turn it is: `holders` as `Ways::holders` chose them for this turn.
    pub fn count_steered(
        &mut self,
        ways: &Ways,
        layer: LayerId,
        terms: impl Iterator<Item = ExpertId>,
        holders: &[u32],
        turn: u64,
    ) {
        for expert in terms {
            let due = ways.in_turn(layer, expert, turn).next().filter(|due| *due != holders[usize::from(expert.0)]);
            if let Some(to) = due.and_then(|due| ways.destination(due)) {
                self.health.detour(&to.worker, |detours| detours.steered += 1);
            }
        }
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether somebody waits for the answer to that frame.
    pub fn awaits(&self, frame: &FrameKey) -> bool {
        self.frames.contains_key(frame)
    }

    /// Frames that are with a worker and whose answers are waited for.
    pub fn outstanding(&self) -> usize {
        self.frames.len()
    }

    fn open(
        &mut self,
        turn: &mut Turn,
        id: CallId,
        layer: LayerId,
        layout: Layout,
        frames: Vec<(Option<Destination>, RequestFrame)>,
    ) {
        let (missing, deadline) = (frames.len(), turn.now + self.layer_deadline);
        let parts = frames.iter().map(|(_, frame)| Part::new(frame.clone())).collect();
        self.calls.insert(id, Call { layer, layout, deadline, parts, missing });
        for (index, (to, frame)) in frames.into_iter().enumerate() {
            let part = PartId { call: id, index };
            match to {
                Some(to) => self.send(turn, part, None, vec![(to, frame)], Why::Call),
                None => {
                    self.retry(turn, part);
                }
            }
        }
        self.probe(turn, id);
        self.finish_if_complete(turn, id);
    }

    fn answer(&mut self, turn: &mut Turn, worker: &WorkerId, answer: AnswerFrame) {
        let key = FrameKey::of(&answer.header);
        let Some(asked) = self.frames.get(&key) else {
            self.counts.unmatched += 1;
            let late = self.given_up.remove(&key).filter(|sent| sent.to.worker == *worker && answer.result.is_ok());
            if let Some(sent) = late {
                self.health.answered(&sent.to, sent.terms, turn.now.saturating_sub(sent.at), turn.now);
            }
            return;
        };
        if asked.to.worker != *worker {
            self.counts.misdirected += 1;
            return;
        }
        match asked.fitting(answer, self.hidden) {
            Ok(values) => {
                self.health.answered(&asked.to, asked.terms, turn.now.saturating_sub(asked.at), turn.now);
                self.accept(turn, key, values);
            }
            Err(cause) => {
                self.counts.rejected += u64::from(matches!(cause, Cause::Answer { .. }));
                self.lose(turn, key, cause);
            }
        }
    }

    fn accept(&mut self, turn: &mut Turn, key: FrameKey, values: Values) {
        let Some(Sent { part: id, .. }) = self.frames.remove(&key) else { return };
        let Some(call) = self.calls.get_mut(&id.call) else { return };
        let part = &mut call.parts[id.index];
        let Some(index) = part.tries.iter().position(|t| t.keys.contains(&key)) else { return };
        if !part.tries[index].take(key, values) {
            return;
        }
        (part.answer, part.retry_at) = (Some(part.tries.swap_remove(index).into_answer()), None);
        call.missing -= 1;
        let others = std::mem::take(&mut part.tries);
        others.into_iter().for_each(|other| self.give_up(turn.now, other));
        self.finish_if_complete(turn, id.call);
    }

    fn finish_if_complete(&mut self, turn: &mut Turn, id: CallId) {
        if self.calls.get(&id).is_some_and(|call| call.missing == 0)
            && let Some(call) = self.close(turn.now, id)
        {
            let answers = call.parts.into_iter().filter_map(|part| part.answer).collect();
            turn.out.push(Action::Done { call: id, answers });
        }
    }

    /// A frame will not be answered by the worker that it was sent to: another holder is asked.
    fn lose(&mut self, turn: &mut Turn, key: FrameKey, cause: Cause) {
        let Some(Sent { part: id, to, header, .. }) = self.frames.remove(&key) else { return };
        let epoch = self.ways.as_ref().map(|ways| ways.epoch());
        let Some(part) = self.part(id) else { return };
        let Some(lost) = part.tries.iter().position(|t| t.keys.contains(&key)) else { return };
        let lost = part.tries.swap_remove(lost);
        let refused = if let Cause::Refused(refusal) = &cause { Some(refusal.reason) } else { None };
        // A worker that is done with an older placement may be asked again under the one in use.
        let is_outdated = refused == Some(RefusalReason::Epoch) && epoch != Some(header.epoch);
        if !is_outdated {
            part.tried.push(to.worker.clone());
        }
        part.lost = Some((to.worker.clone(), cause.clone()));
        self.give_up(turn.now, lost);
        match (refused, cause) {
            // The frame is wrong: it would be so elsewhere.
            (Some(RefusalReason::Malformed), cause) => return self.fail(turn, id, Some((to.worker, cause))),
            (Some(RefusalReason::Busy), _) => {}
            (Some(_), _) | (_, Cause::Answer { .. }) if !is_outdated => self.health.avoid(&to, turn.now),
            _ => {}
        }
        if self.retry(turn, id) {
            self.health.detour(&to.worker, |detours| detours.resent += 1);
        }
    }

    /// Asks other holders for a part that nobody computes, or silent workers only; false if there are none, or no need: it
    /// waits then.
    fn retry(&mut self, turn: &mut Turn, id: PartId) -> bool {
        let (is_stuck, avoided) = (self.is_stuck(turn.now, id), self.asked(id));
        let Some(part) = self.part(id) else { return false };
        part.retry_at = None;
        if !is_stuck {
            return false;
        }
        let (worst, why) = match (part.tries.is_empty(), &part.lost) {
            (false, _) => (Rank::Avoided, Why::Hedge),
            (true, Some(_)) => (Rank::Silent, Why::Loss),
            (true, None) => (Rank::Silent, Why::Call),
        };
        let is_asked = self.ask(turn, id, &avoided, worst, why);
        if !is_asked && let Some(part) = self.part(id) {
            // All that are left have been asked: they are asked again later.
            part.tried.clear();
            part.backoff = (part.backoff * 2).clamp(RETRY_MIN, RETRY_MAX);
            part.retry_at = Some(turn.now + part.backoff);
        }
        is_asked
    }

    /// Has a part computed by the best holders that are not `avoided`; false, and nothing is sent, if an expert has no
    /// such holder that is `worst` or better.
    fn ask(&mut self, turn: &mut Turn, id: PartId, avoided: &[WorkerId], worst: Rank, why: Why) -> bool {
        let (Some(ways), Some(call)) = (self.ways.clone(), self.calls.get(&id.call)) else { return false };
        let frame = &call.parts[id.index].frame;
        let ranks = ways.ranks_without(&self.health, turn.now, avoided);
        let experts = frame.terms().iter().map(|term| term.expert());
        let holders = ways.holders(&ranks, call.layer, experts, id.call.0, worst);
        if holders.contains(&NOWHERE) {
            return false;
        }
        let plan = plan::resplit(&call.layout, frame, |expert| holders[usize::from(expert.0)]);
        let header = Header { epoch: ways.epoch(), ..frame.header };
        let (recipe, frames) = match &plan.parts[..] {
            // The frame as it is, under the epoch of today.
            [only] => (None, ways.destination(only.worker).map(|to| vec![(to.clone(), frame.under(header))])),
            _ => {
                let activations = frame.activations().clone();
                let frames = plan.parts.into_iter().map(|part| {
                    let part_frame = RequestFrame::new(header, activations.clone(), call.layout.hidden, part.content);
                    Some((ways.destination(part.worker)?.clone(), part_frame.within(frame.traceparent())))
                });
                (Some(Arc::new(plan.recipe)), frames.collect())
            }
        };
        let Some(frames) = frames else { return false };
        self.send(turn, id, recipe, frames, why);
        true
    }

    fn send(
        &mut self,
        turn: &mut Turn,
        id: PartId,
        recipe: Option<Arc<Recipe>>,
        frames: Vec<(Destination, RequestFrame)>,
        why: Why,
    ) {
        let answers = vec![None; frames.len()];
        let mut keys = Vec::with_capacity(frames.len());
        for (to, frame) in frames {
            let sent = self.send_one(turn, id, to, frame, why);
            let key = FrameKey::of(&sent.header);
            keys.push(key);
            self.frames.insert(key, sent);
        }
        if let Some(part) = self.part(id) {
            part.tries.push(Try { keys, answers, recipe });
        }
    }

    fn send_one(&mut self, turn: &mut Turn, part: PartId, to: Destination, mut frame: RequestFrame, why: Why) -> Sent {
        if frame.is_numbered() {
            self.counts.ahead += 1;
        } else {
            frame.header.sequence = self.number(frame.header.micro_batch);
        }
        let (header, outputs, terms) = (frame.header, frame.output_count(), frame.terms().len());
        self.count(terms, why);
        turn.out.push(Action::Send { to: to.clone(), frame });
        Sent { part, to, header, outputs, terms, at: turn.now }
    }

    /// A number for a frame that is to be sent: no other one has it.
    pub fn number(&mut self, micro_batch: u8) -> u32 {
        loop {
            let sequence = self.next_sequence;
            self.next_sequence = self.next_sequence.wrapping_add(1);
            // One of 2^32 frames ago may still be with its worker.
            let key = FrameKey { micro_batch, sequence };
            if !self.frames.contains_key(&key) && !self.given_up.contains_key(&key) {
                return sequence;
            }
        }
    }

    fn count(&mut self, terms: usize, why: Why) {
        let counts = &mut self.counts;
        (counts.sent, counts.terms) = (counts.sent + 1, counts.terms + terms as u64);
        match why {
            Why::Call => self.credit = (self.credit + terms as f64 * HEDGED_SHARE).min(HEDGED_TERMS_MAX),
            Why::Loss => counts.resent += 1,
            Why::Hedge => {
                (counts.hedged, counts.terms_hedged) = (counts.hedged + 1, counts.terms_hedged + terms as u64);
            }
        }
    }

    fn part(&mut self, id: PartId) -> Option<&mut Part> {
        self.calls.get_mut(&id.call).map(|call| &mut call.parts[id.index])
    }

    /// Looks for holders of the parts that wait for one.
    fn retry_waiting(&mut self, turn: &mut Turn, is_due: impl Fn(Duration) -> bool) {
        let mut waiting = Vec::new();
        for (&id, call) in &self.calls {
            let parts = call.parts.iter().enumerate().filter(|(_, part)| part.retry_at.is_some_and(&is_due));
            waiting.extend(parts.map(|(index, _)| PartId { call: id, index }));
        }
        for part in waiting {
            self.retry(turn, part);
        }
    }

    fn edge_down(&mut self, turn: &mut Turn, edge: EdgeId, reason: &str) {
        self.health.down(edge);
        self.given_up.retain(|_, sent| sent.to.edge != Some(edge));
        for key in self.keys(|sent| sent.to.edge == Some(edge)) {
            self.lose(turn, key, Cause::EdgeDown { reason: reason.to_owned() });
        }
    }

    /// Frames with a worker, oldest first.
    fn keys(&self, which: impl Fn(&Sent) -> bool) -> Vec<FrameKey> {
        let frames = self.frames.iter().filter(|(_, sent)| which(sent));
        let mut keys: Vec<_> = frames.map(|(key, sent)| (sent.at, *key)).collect();
        keys.sort_unstable_by_key(|(at, key)| (*at, key.sequence));
        keys.into_iter().map(|(_, key)| key).collect()
    }

    fn tick(&mut self, turn: &mut Turn) {
        let now = turn.now;
        self.expire(turn);
        self.given_up.retain(|_, sent| now < sent.at + self.layer_deadline);
        self.retry_waiting(turn, |at| at <= now);
        for key in self.keys(|sent| sent.to.edge.is_some()) {
            self.hedge(turn, key);
        }
    }

    fn expire(&mut self, turn: &mut Turn) {
        while let Some((&id, call)) = self.calls.first_key_value()
            && call.deadline <= turn.now
        {
            // A call that is still here waits for at least one of its parts.
            let Some(index) = call.parts.iter().position(|part| part.answer.is_none()) else { return };
            let silent = call.parts[index].tries.iter().flat_map(|t| &t.keys).find_map(|key| self.frames.get(key));
            let silent = silent.map(|sent| (sent.to.worker.clone(), Cause::Deadline { after: self.layer_deadline }));
            self.fail(turn, PartId { call: id, index }, silent);
        }
    }

    /// Ends a call because of one of its parts: by how a worker failed it, or because it has no holder.
    fn fail(&mut self, turn: &mut Turn, id: PartId, by: Option<(WorkerId, Cause)>) {
        let Some(mut call) = self.close(turn.now, id.call) else { return };
        let part = call.parts.swap_remove(id.index);
        let mut experts: Vec<_> = part.frame.terms().iter().map(|term| term.expert()).collect();
        experts.sort_unstable();
        experts.dedup();
        let (layer, experts) = (call.layer, experts.into());
        let error = match by.or(part.lost) {
            Some((worker, cause)) => DispatchError::Lost { layer, experts, worker, cause },
            None => {
                let (after, holders) = (self.layer_deadline, String::new());
                DispatchError::Unreachable { layer, experts, after, holders }
            }
        };
        turn.out.push(Action::Failed { call: id.call, error });
    }

    fn close(&mut self, now: Duration, id: CallId) -> Option<Call> {
        let mut call = self.calls.remove(&id)?;
        let tries = call.parts.iter_mut().flat_map(|part| std::mem::take(&mut part.tries));
        tries.for_each(|unfinished| self.give_up(now, unfinished));
        Some(call)
    }

    /// Nobody waits for the answers of these frames any more.
    fn give_up(&mut self, now: Duration, unfinished: Try) {
        for key in unfinished.keys {
            if let Some(sent) = self.frames.remove(&key) {
                self.health.unanswered(&sent.to, sent.terms, now.saturating_sub(sent.at), now);
                self.given_up.insert(key, sent);
            }
        }
    }
}

#[cfg(test)]
mod tests;
