//! The frames that wait, of all callers, up to a bound.

use std::collections::VecDeque;

use moesaic_dispatch::{Activations, Refusal, ReplySender, RequestFrame};
use moesaic_node::trace::{self, Kind, Span};
use moesaic_proto::v1::RefusalReason;
use moesaic_proto::{Epoch, LayerId};

/// A frame and the way back.
#[derive(Debug)]
pub struct Job {
    pub frame: RequestFrame,
    pub reply: ReplySender,
    /// From when the frame came; none unless it is traced.
    pub span: Span,
}

impl Job {
    pub fn new(frame: RequestFrame, reply: ReplySender) -> Self {
        let parent = frame.traceparent();
        let mut span = trace::part(Kind::Server, "experts", parent.as_deref().unwrap_or_default());
        span.set("moesaic.layer", i64::from(frame.header.layer.0));
        span.set("moesaic.epoch", i64::from(frame.header.epoch.0));
        span.set("moesaic.rows", frame.row_count() as i64);
        span.set("moesaic.terms", frame.terms().len() as i64);
        Self { frame, reply, span }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Inbox {
    waiting: VecDeque<Job>,
    frames_max: usize,
    stopping: bool,
}

/// Frames with the same key can be computed in one call of the kernels.
type Key = (Epoch, LayerId, bool);

impl Inbox {
    pub fn new(frames_max: usize) -> Self {
        Self { waiting: VecDeque::new(), frames_max, stopping: false }
    }

    /// Takes a frame, or gives it back with the reason.
    pub fn offer(&mut self, job: Job) -> Result<(), Box<(Job, Refusal)>> {
        if self.stopping {
            return Err(Box::new((job, Refusal::new(RefusalReason::Stopping, "the worker is stopping"))));
        }
        if self.waiting.len() >= self.frames_max {
            let detail = format!("the inbox is full: {} frames wait", self.frames_max);
            return Err(Box::new((job, Refusal::new(RefusalReason::Busy, detail))));
        }
        self.waiting.push_back(job);
        Ok(())
    }

    /// The oldest frame, and all that can be computed with it while their cost stays within `cost_max`.
    pub fn take(&mut self, cost_max: usize) -> Vec<Job> {
        let Some(first) = self.waiting.pop_front() else { return Vec::new() };
        let (key, mut cost) = (key(&first.frame), self::cost(&first.frame));
        let mut taken = vec![first];
        let mut left = VecDeque::with_capacity(self.waiting.len());
        for job in self.waiting.drain(..) {
            let with_it = cost + self::cost(&job.frame);
            if self::key(&job.frame) == key && with_it <= cost_max {
                cost = with_it;
                taken.push(job);
            } else {
                left.push_back(job);
            }
        }
        self.waiting = left;
        taken
    }

    /// Frames that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// From now on everything is refused; what waits stays.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Nothing waits, and what comes is taken.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && !self.stopping
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

fn key(frame: &RequestFrame) -> Key {
    (frame.header.epoch, frame.header.layer, matches!(frame.activations(), Activations::F32(_)))
}

/// Rows that a frame makes the worker hold: those it brings, or one for each term.
fn cost(frame: &RequestFrame) -> usize {
    frame.terms().len().max(frame.row_count())
}

#[cfg(test)]
mod tests;
