//! The gRPC service for coordinators: Run, Abort, Load, ExpertLoad.

use std::sync::Arc;

use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use moesaic_dispatch::Dispatcher;
use moesaic_dispatch::tracker::Counts;
use moesaic_kernels::PAGE_TOKENS;
use moesaic_model::Checkpoint;
use moesaic_node::handshake;
use moesaic_node::trace::{self, Kind, Span};
use moesaic_proto::limits::WORKER_MESSAGE_BYTES_MAX;
use moesaic_proto::v1::attention_worker_server::{AttentionWorker, AttentionWorkerServer};
use moesaic_proto::v1::{self, Role, RunEvent, RunRequest, TokenInfo, TopLogprob};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::request::check;
use super::requests::{Requests, Ticket};
use crate::core::batcher::Finish;
use crate::engine::events::{Event, Reader};
use crate::engine::handle::{EngineHandle, SubmitError, Token};
use crate::engine::profile::Profile;

/// The service's name in health checks.
pub const NAME: &str = "moesaic.v1.AttentionWorker";

pub struct Service {
    pub hello: v1::Hello,
    pub checkpoint: Arc<Checkpoint>,
    pub engine: EngineHandle,
    pub dispatcher: Dispatcher,
    pub waiting_max: usize,
    pub profile: Arc<Profile>,
    /// Refuses new sequences once cancelled.
    pub stop: CancellationToken,
    pub requests: Requests,
}

impl Service {
    pub fn server(self) -> AttentionWorkerServer<impl AttentionWorker> {
        AttentionWorkerServer::new(self)
            .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(WORKER_MESSAGE_BYTES_MAX)
    }

    /// Whether a token could be produced: a model without routed experts needs nobody.
    pub fn is_reachable(checkpoint: &Checkpoint, dispatcher: &Dispatcher) -> bool {
        !has_experts(checkpoint) || dispatcher.reachable()
    }
}

fn has_experts(checkpoint: &Checkpoint) -> bool {
    !checkpoint.config().moe_layers().is_empty()
}

#[tonic::async_trait]
impl AttentionWorker for Service {
    type RunStream = BoxStream<'static, Result<RunEvent, Status>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let run = request.into_inner();
        let hello = run.hello.as_ref().ok_or_else(|| Status::failed_precondition("hello is not set"))?;
        let matches = handshake::check(&self.hello, hello, Role::Coordinator);
        matches.map_err(|mismatch| Status::failed_precondition(mismatch.to_string()))?;
        if run.resume {
            let (ticket, reader) = self.requests.resume(&run)?;
            return Ok(Response::new(events(reader, ticket, 0, Span::default()).boxed()));
        }
        if self.stop.is_cancelled() {
            return Err(Status::unavailable("this worker is stopping"));
        }
        if has_experts(&self.checkpoint) && self.dispatcher.epoch().is_none() {
            return Err(Status::unavailable("this worker does not know yet who holds the experts"));
        }
        let position = run.emitted.len() as u32;
        let mut submit = check(run.clone(), self.checkpoint.config())
            .map_err(|invalid| Status::invalid_argument(invalid.to_string()))?;
        let ticket = self.requests.take(&run)?;
        let mut span = trace::part(Kind::Server, "sequence", &run.traceparent);
        span.set("moesaic.worker", self.hello.id.clone());
        span.set("moesaic.position", i64::from(position));
        submit.traceparent = span.traceparent();
        let running = self.engine.submit(submit).await.map_err(|error| match error {
            SubmitError::Refused(refused) => Status::resource_exhausted(refused.to_string()),
            SubmitError::Stopped => Status::unavailable(error.to_string()),
        })?;
        ticket.set(&running);
        Ok(Response::new(events(running.events, ticket, position, span).boxed()))
    }

    async fn abort(&self, request: Request<v1::AbortCallRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let v1::AbortCallRequest { request_id, call } = request.into_inner();
        let sequence = self.requests.abort(&request_id, call);
        if let Some(id) = sequence {
            self.engine.abort(id).await;
        }
        Ok(Response::new(v1::AbortResponse { aborted: sequence.is_some() }))
    }

    async fn load(&self, _: Request<v1::LoadRequest>) -> Result<Response<v1::LoadResponse>, Status> {
        let counts = self.engine.load().ok_or_else(|| Status::unavailable("the engine has stopped"))?;
        let steps = self.profile.counts();
        Ok(Response::new(v1::LoadResponse {
            pages_total: counts.pages_total as u32,
            pages_free: counts.pages_free as u32,
            page_tokens: PAGE_TOKENS as u32,
            sequences_running: counts.running as u32,
            sequences_waiting: counts.waiting as u32,
            waiting_max: self.waiting_max as u32,
            preemptions: counts.preemptions,
            experts_reachable: Self::is_reachable(&self.checkpoint, &self.dispatcher),
            draining: self.stop.is_cancelled(),
            epoch: self.dispatcher.epoch().map_or(0, |epoch| epoch.0),
            orphans: self.requests.orphans() as u32,
            edges: self.dispatcher.edges(),
            dispatch: Some(dispatch_counts(&self.dispatcher)),
            micro_batches: steps.steps,
            micro_batch_rows: steps.rows,
            generated_tokens: steps.tokens,
        }))
    }

    async fn expert_load(&self, _: Request<v1::ExpertLoadRequest>) -> Result<Response<v1::ExpertLoadResponse>, Status> {
        let layers = self.engine.experts().read().map(|(layer, rows)| v1::LayerLoad { layer: layer as u32, rows });
        let (layers, incarnation) = (layers.collect(), self.hello.incarnation);
        Ok(Response::new(v1::ExpertLoadResponse { layers, incarnation }))
    }
}

/// A sequence's events, from `position` on. Dropping the stream leaves the sequence to be resumed.
fn events(
    reader: Reader,
    ticket: Ticket,
    position: u32,
    span: Span,
) -> impl stream::Stream<Item = Result<RunEvent, Status>> {
    let first = position as usize;
    stream::unfold(Some((reader, ticket, position, span)), move |state| async move {
        let (mut reader, ticket, position, mut span) = state?;
        let next = ticket.taken_over.run_until_cancelled(reader.next()).await;
        Some(match next {
            None => (Err(Status::aborted("the sequence was resumed by another call")), None),
            Some(None) => (Err(Status::unavailable("the engine has stopped")), None),
            // Sending it elsewhere cannot help: its experts were waited for.
            Some(Some(Event::Failed(error))) => {
                span.fail(&error);
                (Err(Status::deadline_exceeded(error.to_string())), None)
            }
            Some(Some(Event::Aborted)) => {
                let finish = Some(v1::FinishReason::Aborted.into());
                (Ok(RunEvent { position, finish, ..Default::default() }), None)
            }
            Some(Some(Event::Token { index, token, prompt, finish })) => {
                if index == first {
                    span.event("first token");
                }
                let event = RunEvent {
                    position: index as u32,
                    token: Some(info(token)),
                    prompt: prompt.into_iter().map(info).collect(),
                    finish: finish.map(|finish| reason(finish).into()),
                };
                (Ok(event), finish.is_none().then_some((reader, ticket, index as u32 + 1, span)))
            }
        })
    })
}

fn dispatch_counts(dispatcher: &Dispatcher) -> v1::DispatchCounts {
    let Counts { sent, resent, hedged, terms, terms_hedged, unmatched, misdirected, rejected, ahead } =
        dispatcher.counts();
    v1::DispatchCounts { sent, resent, hedged, terms, terms_hedged, unmatched, misdirected, rejected, ahead }
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
