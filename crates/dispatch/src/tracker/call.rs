//! A layer call on its way: its parts, who computes them, and what has come of it.

use std::sync::Arc;
use std::time::Duration;

use moesaic_proto::{LayerId, WorkerId};

use super::{CallId, Destination, FrameKey};
use crate::combine::CombineOps;
use crate::error::Cause;
use crate::frame::{AnswerFrame, Header, RequestFrame};
use crate::payload::Values;
use crate::plan::{Layout, Recipe};

/// What a frame asked for: one value of [hidden] for each of its outputs.
#[derive(Clone, Debug)]
pub enum Answer {
    /// As one worker answered.
    Whole(Values),
    /// Of several workers, and how to put them together.
    Split { recipe: Arc<Recipe>, answers: Vec<Values> },
}

impl Answer {
    /// The values [outputs, hidden].
    pub fn into_values(self, ops: &CombineOps, hidden: usize) -> Values {
        match self {
            Self::Whole(values) => values,
            Self::Split { recipe, answers } => {
                let mut values = vec![0.0; recipe.rows() * hidden];
                let answers: Vec<_> = answers.into_iter().map(Values::brought).collect();
                recipe.combine(ops, &answers, hidden, &mut values);
                values.into()
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Call {
    pub layer: LayerId,
    pub layout: Layout,
    pub deadline: Duration,
    pub parts: Vec<Part>,
    pub missing: usize,
}

/// One of the parts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PartId {
    pub call: CallId,
    pub index: usize,
}

/// A frame as the call asked for it.
#[derive(Debug)]
pub(super) struct Part {
    pub frame: RequestFrame,
    pub answer: Option<Answer>,
    pub tries: Vec<Try>,
    /// Holders that have failed it, and how the last one did.
    pub tried: Vec<WorkerId>,
    pub lost: Option<(WorkerId, Cause)>,
    /// It waits for a holder: when to look for one again.
    pub retry_at: Option<Duration>,
    /// How long it waited the last time.
    pub backoff: Duration,
}

impl Part {
    pub fn new(frame: RequestFrame) -> Self {
        let (tries, tried, backoff) = (Vec::new(), Vec::new(), Duration::ZERO);
        Self { frame, answer: None, tries, tried, lost: None, retry_at: None, backoff }
    }
}

/// One way of having a part computed: as it is, or split.
#[derive(Debug)]
pub(super) struct Try {
    pub keys: Vec<FrameKey>,
    pub answers: Vec<Option<Values>>,
    pub recipe: Option<Arc<Recipe>>,
}

impl Try {
    /// Takes an answer; true if it was the last one.
    pub fn take(&mut self, key: FrameKey, values: Values) -> bool {
        if let Some(index) = self.keys.iter().position(|k| *k == key) {
            self.answers[index] = Some(values);
        }
        self.answers.iter().all(Option::is_some)
    }

    pub fn into_answer(self) -> Answer {
        let mut answers: Vec<_> = self.answers.into_iter().flatten().collect();
        match self.recipe {
            Some(recipe) => Answer::Split { recipe, answers },
            None => Answer::Whole(answers.swap_remove(0)),
        }
    }
}

/// A frame that is with a worker.
#[derive(Debug)]
pub(super) struct Sent {
    pub part: PartId,
    pub to: Destination,
    pub header: Header,
    pub outputs: usize,
    pub terms: usize,
    pub at: Duration,
}

impl Sent {
    /// The values of an answer that is what was asked for.
    pub fn fitting(&self, answer: AnswerFrame, hidden: usize) -> Result<Values, Cause> {
        let (want, got) = (&self.header, &answer.header);
        if (want.epoch, want.layer, want.source, want.slot) != (got.epoch, got.layer, got.source, got.slot) {
            let detail = format!("its header is {got:?}; asked was {want:?}");
            return Err(Cause::Answer { detail });
        }
        let values = answer.result.map_err(Cause::Refused)?;
        let (outputs, expected) = (self.outputs, self.outputs * hidden);
        if values.len() != expected {
            let detail = format!("it has {} values; asked were {outputs} rows of {hidden}", values.len());
            return Err(Cause::Answer { detail });
        }
        Ok(values)
    }
}
