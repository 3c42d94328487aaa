//! The engine as the rest of the process sees it: requests in, events out. Usable without any network.

use moesaic_dispatch::DispatchError;
use tokio::sync::{mpsc, oneshot};

use crate::core::batcher::{Counts, Finish, Refused, Request, SequenceId};
use crate::core::sampler::{Logprobs, Sampling};

/// Commands that may wait for the engine, which takes all of them between two steps of its work. Past it callers wait.
pub(super) const COMMANDS_MAX: usize = 256;

/// A sequence to run. Its tokens and those of `sampling` are below the vocabulary size, and prompt and output together
/// fit the model's context: the caller has checked.
#[derive(Clone, Debug)]
pub struct Submit {
    pub request: Request,
    pub sampling: Sampling,
    /// Log-probabilities of generated tokens, with that many alternatives.
    pub logprobs: Option<usize>,
    /// The same for prompt tokens after the first.
    pub prompt_logprobs: Option<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub token: u32,
    pub logprobs: Option<Logprobs>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Token {
        /// Counted from the first generated token.
        index: usize,
        token: Token,
        /// With the first token, if asked for: the prompt's tokens after the first.
        prompt: Vec<Token>,
        /// The last event.
        finish: Option<Finish>,
    },
    /// The last event.
    Aborted,
    /// The last event.
    Failed(DispatchError),
}

/// A running sequence. Dropping it aborts the sequence at the engine's next step.
#[derive(Debug)]
pub struct Running {
    pub id: SequenceId,
    /// Has room for every event there can be, so that the engine never waits for who reads: max_tokens and a last word.
    pub events: mpsc::Receiver<Event>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("the engine has stopped")]
    Stopped,
}

pub(super) enum Command {
    Submit(Box<Submit>, oneshot::Sender<Result<Running, Refused>>),
    Abort(SequenceId),
    Load(oneshot::Sender<Counts>),
}

/// Clones share the engine, which ends when the last one is dropped.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) commands: mpsc::Sender<Command>,
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

    /// `None` if the engine has stopped.
    pub async fn load(&self) -> Option<Counts> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Load(reply)).await.ok()?;
        answer.await.ok()
    }
}
