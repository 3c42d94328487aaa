//! What is outstanding: every frame of every layer call, until its answer is in or its call has ended.
//!
//! A plain struct that is told what happened and says what to do. It keeps each frame until its call ends, so that a
//! frame which is lost can be sent again: `lose` is the one place where that is decided. At present it ends the call
//! with an error that names layer, experts and worker; sending to another holder would be one more `Action::Send`.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use moesaic_proto::{LayerId, WorkerId};

use crate::error::{Cause, DispatchError};
use crate::frame::{AnswerFrame, Header, RequestFrame};
use crate::shared::Shared;

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
    /// A layer call and its frames, in the order in which `Action::Done` gives their answers.
    Call { call: CallId, layer: LayerId, frames: Vec<(Destination, RequestFrame)> },
    /// A frame came back from this worker.
    Answer { worker: WorkerId, answer: AnswerFrame },
    /// A frame could not be handed to its edge.
    NotSent { key: FrameKey, cause: Cause },
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
        answers: Vec<Shared<f32>>,
    },
    Failed {
        call: CallId,
        error: DispatchError,
    },
}

/// Frames that changed nothing, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answers that nobody waited for: late, or there twice.
    pub unmatched: u64,
    /// Answers from another worker than the one that was asked.
    pub misdirected: u64,
    /// Answers that did not fit what was asked.
    pub rejected: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Tracker {
    hidden: usize,
    layer_deadline: Duration,
    next_sequence: u32,
    calls: BTreeMap<CallId, Call>,
    frames: HashMap<FrameKey, Outstanding>,
    counts: Counts,
}

#[derive(Debug)]
struct Call {
    layer: LayerId,
    deadline: Duration,
    frames: Vec<FrameKey>,
    answers: Vec<Option<Shared<f32>>>,
    missing: usize,
}

#[derive(Debug)]
struct Outstanding {
    call: CallId,
    /// The frame's place in its call.
    part: usize,
    to: Destination,
    frame: RequestFrame,
}

impl Tracker {
    pub fn new(hidden: usize, layer_deadline: Duration) -> Self {
        let (calls, frames) = (BTreeMap::new(), HashMap::new());
        Self { hidden, layer_deadline, next_sequence: 0, calls, frames, counts: Counts::default() }
    }

    /// `now` never runs backwards; what it counts from does not matter.
    pub fn on_event(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Call { call, layer, frames } => self.open(now, call, layer, frames, out),
            Event::Answer { worker, answer } => self.answer(&worker, answer, out),
            Event::NotSent { key, cause } => self.lose(key, cause, out),
            Event::EdgeDown { edge, reason } => self.edge_down(edge, &reason, out),
            Event::Abandoned { call } => {
                self.close(call);
            }
            Event::Tick => self.expire(now, out),
        }
    }

    /// When `Event::Tick` has something to do.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.calls.first_key_value().map(|(_, call)| call.deadline)
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    pub fn outstanding(&self) -> usize {
        self.frames.len()
    }

    fn open(
        &mut self,
        now: Duration,
        id: CallId,
        layer: LayerId,
        frames: Vec<(Destination, RequestFrame)>,
        out: &mut Vec<Action>,
    ) {
        let missing = frames.len();
        let mut keys = Vec::with_capacity(missing);
        for (part, (to, mut frame)) in frames.into_iter().enumerate() {
            frame.header.sequence = self.next_sequence;
            self.next_sequence = self.next_sequence.wrapping_add(1);
            let key = FrameKey::of(&frame.header);
            keys.push(key);
            out.push(Action::Send { to: to.clone(), frame: frame.clone() });
            self.frames.insert(key, Outstanding { call: id, part, to, frame });
        }
        let deadline = now + self.layer_deadline;
        self.calls.insert(id, Call { layer, deadline, frames: keys, answers: vec![None; missing], missing });
        self.finish_if_complete(id, out);
    }

    fn answer(&mut self, worker: &WorkerId, answer: AnswerFrame, out: &mut Vec<Action>) {
        let key = FrameKey::of(&answer.header);
        let Some(asked) = self.frames.get(&key) else {
            self.counts.unmatched += 1;
            return;
        };
        if asked.to.worker != *worker {
            self.counts.misdirected += 1;
            return;
        }
        match fitting(asked, answer, self.hidden) {
            Ok(values) => self.accept(key, values, out),
            Err(cause) => {
                self.counts.rejected += u64::from(matches!(cause, Cause::Answer { .. }));
                self.lose(key, cause, out);
            }
        }
    }

    fn accept(&mut self, key: FrameKey, values: Shared<f32>, out: &mut Vec<Action>) {
        let Some(asked) = self.frames.remove(&key) else { return };
        if let Some(call) = self.calls.get_mut(&asked.call) {
            call.answers[asked.part] = Some(values);
            call.missing -= 1;
        }
        self.finish_if_complete(asked.call, out);
    }

    fn finish_if_complete(&mut self, id: CallId, out: &mut Vec<Action>) {
        if self.calls.get(&id).is_some_and(|call| call.missing == 0)
            && let Some(call) = self.close(id)
        {
            out.push(Action::Done { call: id, answers: call.answers.into_iter().flatten().collect() });
        }
    }

    /// A frame will not be answered by the worker that it was sent to.
    fn lose(&mut self, key: FrameKey, cause: Cause, out: &mut Vec<Action>) {
        let Some(lost) = self.frames.get(&key) else { return };
        let mut experts: Vec<_> = lost.frame.terms().iter().map(|term| term.expert()).collect();
        experts.sort_unstable();
        experts.dedup();
        let (id, worker) = (lost.call, lost.to.worker.clone());
        let Some(call) = self.close(id) else { return };
        let error = DispatchError::Lost { layer: call.layer, experts: experts.into(), worker, cause };
        out.push(Action::Failed { call: id, error });
    }

    fn edge_down(&mut self, edge: EdgeId, reason: &str, out: &mut Vec<Action>) {
        let mut lost: Vec<FrameKey> =
            self.frames.iter().filter(|(_, f)| f.to.edge == Some(edge)).map(|(k, _)| *k).collect();
        lost.sort_unstable_by_key(|key| key.sequence);
        for key in lost {
            self.lose(key, Cause::EdgeDown { reason: reason.to_owned() }, out);
        }
    }

    fn expire(&mut self, now: Duration, out: &mut Vec<Action>) {
        while let Some((_, call)) = self.calls.first_key_value()
            && call.deadline <= now
        {
            // A call that is still here waits for at least one of its frames.
            let waiting = call.frames.iter().copied().find(|key| self.frames.contains_key(key));
            let Some(key) = waiting else { return };
            self.lose(key, Cause::Deadline { after: self.layer_deadline }, out);
        }
    }

    fn close(&mut self, id: CallId) -> Option<Call> {
        let call = self.calls.remove(&id)?;
        for key in &call.frames {
            self.frames.remove(key);
        }
        Some(call)
    }
}

/// The values of an answer that is what was asked for.
fn fitting(asked: &Outstanding, answer: AnswerFrame, hidden: usize) -> Result<Shared<f32>, Cause> {
    let (want, got) = (&asked.frame.header, &answer.header);
    if (want.epoch, want.layer, want.source, want.slot) != (got.epoch, got.layer, got.source, got.slot) {
        let detail = format!("its header is {got:?}; asked was {want:?}");
        return Err(Cause::Answer { detail });
    }
    let values = answer.result.map_err(Cause::Refused)?;
    let expected = asked.frame.output_count() * hidden;
    if values.len() != expected {
        let detail =
            format!("it has {} values; asked were {} rows of {hidden}", values.len(), asked.frame.output_count());
        return Err(Cause::Answer { detail });
    }
    Ok(values)
}

#[cfg(test)]
mod tests;
