//! The engine as the rest of the process sees it: requests in, events out. Usable without any network, and without an
//! engine: whoever has the other end of a handle plays one.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use super::events::Reader;
use super::expert_counts::ExpertCounts;
use crate::core::batcher::{Counts, Refused, Request, SequenceId};
use crate::core::sampler::{Logprobs, Sampling};

/// Commands that may wait for the engine, which takes all of them between two steps of its work. Past it callers wait.
const COMMANDS_MAX: usize = 256;

/// A sequence to run. Its tokens and those of `sampling` are below the vocabulary size, and prompt and output together
/// fit the model's context: the caller has checked.
#[derive(Clone, Debug)]
pub struct Submit {
    pub request: Request,
    pub sampling: Sampling,
    /// What was generated elsewhere of this sequence: `request.emitted`, with log-probabilities.
    pub emitted: Vec<Token>,
    /// Log-probabilities of generated tokens, with that many alternatives.
    pub logprobs: Option<usize>,
    /// The same for prompt tokens after the first.
    pub prompt_logprobs: Option<usize>,
    /// The span that it is part of, if it is traced.
    pub traceparent: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub token: u32,
    pub logprobs: Option<Logprobs>,
}

/// A running sequence. When nobody holds its events any more the sequence is aborted at the engine's next step.
#[derive(Debug)]
pub struct Running {
    pub id: SequenceId,
    /// From the first token that is generated here.
    pub events: Reader,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("the engine has stopped")]
    Stopped,
}

/// What an engine hears.
pub enum Command {
    Submit(Box<Submit>, oneshot::Sender<Result<Running, Refused>>),
    Abort(SequenceId),
}

/// Clones share the engine, which ends when the last one is dropped.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    observer: Observer,
}

/// The engine's end of its handles.
pub struct Inbox {
    /// Ends when the last handle is dropped.
    pub commands: mpsc::Receiver<Command>,
    pub counts: watch::Sender<Counts>,
}

/// A handle and the engine's end of it.
pub fn channel(counts: Counts, experts: Arc<ExpertCounts>) -> (EngineHandle, Inbox) {
    let (sender, commands) = mpsc::channel(COMMANDS_MAX);
    let (counts, published) = watch::channel(counts);
    (EngineHandle { commands: sender, observer: Observer { counts: published, experts } }, Inbox { commands, counts })
}

impl EngineHandle {
    pub async fn submit(&self, submit: Submit) -> Result<Running, SubmitError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Submit(Box::new(submit), reply)).await;
        sent.map_err(|_| SubmitError::Stopped)?;
        Ok(answer.await.map_err(|_| SubmitError::Stopped)??)
    }

    /// The sequence's last event says when it has ended. Nothing happens if it has ended already.
    pub async fn abort(&self, id: SequenceId) {
        // A stopped engine runs nothing that could be aborted.
        let _ = self.commands.send(Command::Abort(id)).await;
    }

    /// As of the engine's last step, however long the present one takes; `None` if the engine has stopped.
    pub fn load(&self) -> Option<Counts> {
        self.observer.counts()
    }

    pub fn experts(&self) -> &ExpertCounts {
        self.observer.experts()
    }

    pub fn observer(&self) -> &Observer {
        &self.observer
    }
}

/// Sees what the engine counts, and does not keep it alive.
#[derive(Clone)]
pub struct Observer {
    /// As of the engine's last step.
    counts: watch::Receiver<Counts>,
    experts: Arc<ExpertCounts>,
}

impl Observer {
    /// As of the engine's last step, however long the present one takes; `None` if the engine has stopped.
    pub fn counts(&self) -> Option<Counts> {
        self.counts.has_changed().is_ok().then(|| *self.counts.borrow())
    }

    pub fn experts(&self) -> &ExpertCounts {
        &self.experts
    }
}
