//! Why a layer call failed, in words that name layer, experts and worker.

use std::fmt;
use std::time::Duration;

use moesaic_proto::{ExpertId, LayerId, WorkerId};

use crate::frame::Refusal;

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DispatchError {
    #[error("layer {layer}: there is no placement of experts yet")]
    NoPlacement { layer: LayerId },
    #[error("layer {layer}, {experts}: no holder was to be had for {} ms ({holders})", after.as_millis())]
    Unreachable { layer: LayerId, experts: ExpertList, after: Duration, holders: String },
    #[error("layer {layer}, {experts}: worker {worker} {cause}")]
    Lost { layer: LayerId, experts: ExpertList, worker: WorkerId, cause: Cause },
    #[error("layer {layer}: {error}")]
    Gpu { layer: LayerId, error: String },
    #[error("dispatch was called with what does not fit: {detail}")]
    Input { detail: String },
    #[error("the dispatcher has stopped")]
    Stopped,
}

/// What became of a frame that has no answer. Reads on after "worker w0".
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Cause {
    #[error("is gone: {reason}")]
    EdgeDown { reason: String },
    #[error("did not answer within {} ms", after.as_millis())]
    Deadline { after: Duration },
    #[error("refused: {0}")]
    Refused(Refusal),
    #[error("gave a wrong answer: {detail}")]
    Answer { detail: String },
    #[error("takes no more frames: {limit} wait to be sent to it")]
    QueueFull { limit: usize },
}

/// The experts that a lost frame asked for, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertList(Vec<ExpertId>);

impl From<Vec<ExpertId>> for ExpertList {
    fn from(experts: Vec<ExpertId>) -> Self {
        Self(experts)
    }
}

impl ExpertList {
    pub fn as_slice(&self) -> &[ExpertId] {
        &self.0
    }
}

impl fmt::Display for ExpertList {
    /// "experts 1, 2, 3", the first few of many.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN_MAX: usize = 8;
        let shown: Vec<String> = self.0.iter().take(SHOWN_MAX).map(ExpertId::to_string).collect();
        let (noun, more) = (if self.0.len() == 1 { "expert" } else { "experts" }, self.0.len() - shown.len());
        write!(f, "{noun} {}", shown.join(", "))?;
        if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
    }
}
