//! The same process: a frame is handed over as it is, its activations shared with every other destination.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use moesaic_proto::WorkerId;
use moesaic_proto::v1::RefusalReason;

use crate::frame::{AnswerFrame, Header, Refusal, RequestFrame, Shape};
use crate::payload::Values;

/// An expert worker as its transports see it.
pub trait ExpertHost: Send + Sync {
    /// What received frames are checked against.
    fn shape(&self) -> Shape;

    /// Takes a frame without waiting; what cannot be taken is refused at once. Every reply is sent, or dropped, which
    /// refuses.
    fn submit(&self, frame: RequestFrame, reply: ReplySender);

    /// The same for a caller whose thread has nothing better to do than to compute the answer itself, which saves two
    /// changes of thread. May reply before it returns.
    fn answer(&self, frame: RequestFrame, reply: ReplySender) {
        self.submit(frame, reply);
    }
}

/// Answers one frame, once. Dropped unsent it refuses, so that nobody waits for a frame that was given up.
pub struct ReplySender {
    asked: Header,
    to: Option<Box<dyn FnOnce(AnswerFrame) + Send>>,
}

impl ReplySender {
    /// `to` must not block: it is called on the thread that computed the answer.
    pub fn new(asked: Header, to: impl FnOnce(AnswerFrame) + Send + 'static) -> Self {
        Self { asked, to: Some(Box::new(to)) }
    }

    pub fn send(mut self, result: Result<Values, Refusal>) {
        self.answer(result);
    }

    fn answer(&mut self, result: Result<Values, Refusal>) {
        if let Some(to) = self.to.take() {
            to(AnswerFrame::new(self.asked, result));
        }
    }
}

impl Drop for ReplySender {
    fn drop(&mut self) {
        self.answer(Err(Refusal::new(RefusalReason::Stopping, "the worker gave the frame up")));
    }
}

impl fmt::Debug for ReplySender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplySender").field("asked", &self.asked).finish_non_exhaustive()
    }
}

/// The expert workers of this process, by id. Clones share one table.
#[derive(Clone, Default)]
pub struct Hub {
    hosts: Arc<RwLock<HashMap<WorkerId, Arc<dyn ExpertHost>>>>,
}

impl Hub {
    /// From now on frames for this worker go to `host` without a copy.
    pub fn insert(&self, id: WorkerId, host: Arc<dyn ExpertHost>) {
        self.hosts.write().unwrap_or_else(PoisonError::into_inner).insert(id, host);
    }

    pub fn remove(&self, id: &WorkerId) {
        self.hosts.write().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    pub fn get(&self, id: &WorkerId) -> Option<Arc<dyn ExpertHost>> {
        self.hosts.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }
}
