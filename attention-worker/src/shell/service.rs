//! The gRPC service for coordinators: Run, Abort, Load.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use moesaic_dispatch::Dispatcher;
use moesaic_kernels::PAGE_TOKENS;
use moesaic_model::Checkpoint;
use moesaic_node::handshake;
use moesaic_proto::limits::WORKER_MESSAGE_BYTES_MAX;
use moesaic_proto::v1::attention_worker_server::{AttentionWorker, AttentionWorkerServer};
use moesaic_proto::v1::{self, Role, RunEvent, RunRequest, TokenInfo, TopLogprob};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::request::check;
use crate::core::batcher::{Finish, SequenceId};
use crate::engine::handle::{EngineHandle, Event, Running, SubmitError, Token};

/// The service's name in health checks.
pub const NAME: &str = "moesaic.v1.AttentionWorker";

pub struct Service {
    pub hello: v1::Hello,
    pub checkpoint: Arc<Checkpoint>,
    pub engine: EngineHandle,
    pub dispatcher: Dispatcher,
    pub waiting_max: usize,
    /// Refuses new sequences once cancelled.
    pub stop: CancellationToken,
    pub requests: Requests,
}

/// Running requests by id; `None` until the engine has taken the sequence.
#[derive(Clone, Default)]
pub struct Requests(Arc<Mutex<HashMap<String, Option<SequenceId>>>>);

/// Keeps a request's id taken.
struct Ticket {
    requests: Requests,
    id: String,
}

impl Service {
    pub fn server(self) -> AttentionWorkerServer<impl AttentionWorker> {
        AttentionWorkerServer::new(self)
            .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(WORKER_MESSAGE_BYTES_MAX)
    }

    /// Whether a token could be produced: a model without routed experts needs nobody.
    pub fn is_reachable(checkpoint: &Checkpoint, dispatcher: &Dispatcher) -> bool {
        checkpoint.config().moe_layers().is_empty() || dispatcher.reachable()
    }
}

#[tonic::async_trait]
impl AttentionWorker for Service {
    type RunStream = BoxStream<'static, Result<RunEvent, Status>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let run = request.into_inner();
        let hello = run.hello.as_ref().ok_or_else(|| Status::failed_precondition("hello is not set"))?;
        let matches = handshake::check(&self.hello, hello, Role::Coordinator);
        matches.map_err(|mismatch| Status::failed_precondition(mismatch.to_string()))?;
        if self.stop.is_cancelled() {
            return Err(Status::unavailable("this worker is stopping"));
        }
        let id = run.request_id.clone();
        let submit =
            check(run, self.checkpoint.config()).map_err(|invalid| Status::invalid_argument(invalid.to_string()))?;
        let ticket = self.requests.take(id)?;
        let running = self.engine.submit(submit).await.map_err(|error| match error {
            SubmitError::Refused(refused) => Status::resource_exhausted(refused.to_string()),
            SubmitError::Stopped => Status::unavailable(error.to_string()),
        })?;
        ticket.set(running.id);
        Ok(Response::new(events(running, ticket).boxed()))
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let sequence = self.requests.lock().get(&request.into_inner().request_id).copied().flatten();
        if let Some(id) = sequence {
            self.engine.abort(id).await;
        }
        Ok(Response::new(v1::AbortResponse { aborted: sequence.is_some() }))
    }

    async fn load(&self, _: Request<v1::LoadRequest>) -> Result<Response<v1::LoadResponse>, Status> {
        let counts = self.engine.load().await.ok_or_else(|| Status::unavailable("the engine has stopped"))?;
        Ok(Response::new(v1::LoadResponse {
            pages_total: counts.pages_total as u32,
            pages_free: counts.pages_free as u32,
            page_tokens: PAGE_TOKENS as u32,
            sequences_running: counts.running as u32,
            sequences_waiting: counts.waiting as u32,
            waiting_max: self.waiting_max as u32,
            preemptions: counts.preemptions,
            experts_reachable: Self::is_reachable(&self.checkpoint, &self.dispatcher),
        }))
    }
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Option<SequenceId>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, id: String) -> Result<Ticket, Status> {
        match self.lock().entry(id.clone()) {
            Entry::Occupied(_) => return Err(Status::already_exists(format!("request_id {id} is running"))),
            Entry::Vacant(entry) => entry.insert(None),
        };
        Ok(Ticket { requests: self.clone(), id })
    }
}

impl Ticket {
    fn set(&self, sequence: SequenceId) {
        self.requests.lock().insert(self.id.clone(), Some(sequence));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.requests.lock().remove(&self.id);
    }
}

/// A sequence's events. Dropping the stream drops the sequence and gives its id back.
fn events(running: Running, ticket: Ticket) -> impl stream::Stream<Item = Result<RunEvent, Status>> {
    stream::unfold(Some((running, ticket, 0)), |state| async move {
        let (mut running, ticket, position) = state?;
        Some(match running.events.recv().await {
            None => (Err(Status::unavailable("the engine has stopped")), None),
            Some(Event::Failed(error)) => (Err(Status::unavailable(error.to_string())), None),
            Some(Event::Aborted) => {
                let finish = Some(v1::FinishReason::Aborted.into());
                (Ok(RunEvent { position, finish, ..Default::default() }), None)
            }
            Some(Event::Token { index, token, prompt, finish }) => {
                let event = RunEvent {
                    position: index as u32,
                    token: Some(info(token)),
                    prompt: prompt.into_iter().map(info).collect(),
                    finish: finish.map(|finish| reason(finish).into()),
                };
                (Ok(event), finish.is_none().then_some((running, ticket, index as u32 + 1)))
            }
        })
    })
}

fn info(token: Token) -> TokenInfo {
    let (logprob, top) = match token.logprobs {
        None => (None, Vec::new()),
        Some(logprobs) => (Some(logprobs.logprob), logprobs.top),
    };
    let top = top.into_iter().map(|(token, logprob)| TopLogprob { token, logprob }).collect();
    TokenInfo { token: token.token, logprob, top }
}

fn reason(finish: Finish) -> v1::FinishReason {
    match finish {
        Finish::Stop => v1::FinishReason::Stop,
        Finish::Length => v1::FinishReason::Length,
        Finish::Aborted => v1::FinishReason::Aborted,
    }
}
