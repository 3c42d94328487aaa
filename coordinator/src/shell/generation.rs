//! One running sequence: a worker's events through `core::output`, until its end, an abort or a drop.
//!
//! When the worker is lost the sequence goes on on another one, from the journal: prompt, tokens so far and seed are all
//! that a token depends on, so nobody sees more of it than a pause. Dropping a generation that has not ended frees at
//! once what it has on its worker, unless its client is about to go on with it elsewhere.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream};
use moesaic_node::trace::{Kind, Span};
use moesaic_proto::v1::RunRequest;
use tokio::time::{Instant, sleep};
use tonic::Status;

use super::figures::{Over, over};
use super::seats::Seat;
use super::service::Ticket;
use super::workers::{Call, is_transport};
use crate::core::journal::{Journal, Place};
use crate::core::{ApiError, Delta, Output};

/// How long a sequence that has lost its worker waits for another one.
const RECOVERY_MAX: Duration = Duration::from_secs(30);
/// Between two tries.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// What a client that must wait all the same is told.
const RETRY_AFTER_S: u64 = 1;

pub struct Generation {
    /// None after the end.
    running: Option<Running>,
}

/// What others see of a sequence.
pub(super) struct Watched {
    pub seat: Seat,
    /// The whole of it, and its time on the worker that it is on.
    pub span: Span,
    pub attempt: Span,
}

/// The span of a try on some worker, and the request as a part of it.
pub(super) fn attempt(whole: &Span, run: RunRequest) -> (Span, RunRequest) {
    let span = whole.child(Kind::Client, "run");
    let traceparent = span.traceparent().as_deref().unwrap_or_default().to_owned();
    (span, RunRequest { traceparent, ..run })
}

struct Running {
    call: Call,
    journal: Journal,
    output: Output,
    ticket: Arc<Ticket>,
    watched: Watched,
    /// Tokens that the client has from an earlier stream.
    known: u32,
    has_ended: bool,
    /// How it was over.
    is_counted: bool,
    began: Instant,
    /// When the last token came.
    last: Option<Instant>,
    /// Set while no token has come since a worker was lost: when that was, and how long the next try waits.
    stalled: Option<(Instant, Duration)>,
}

impl Generation {
    /// `known`: tokens that the client has from an earlier stream.
    pub(super) fn new(
        call: Call,
        journal: Journal,
        output: Output,
        ticket: Arc<Ticket>,
        watched: Watched,
        known: u32,
    ) -> Self {
        let (has_ended, is_counted, began, last, stalled) = (false, false, Instant::now(), None, None);
        Self {
            running: Some(Running {
                call,
                journal,
                output,
                ticket,
                watched,
                known,
                has_ended,
                is_counted,
                began,
                last,
                stalled,
            }),
        }
    }

    /// The next news; None after the last one or an error.
    pub async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        let running = self.running.as_mut()?;
        let news = running.next().await;
        running.count(&news);
        if !matches!(&news, Ok(delta) if delta.ending.is_none()) {
            self.running = None;
        }
        Some(news)
    }

    pub fn into_stream(self) -> impl Stream<Item = Result<Delta, ApiError>> + Send {
        stream::unfold(self, |mut generation| async move { generation.next().await.map(|news| (news, generation)) })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_counted {
            self.over(Over::Left);
        }
        if !self.has_ended && !self.ticket.leaves_its_sequences() {
            self.call.place.abort(&self.journal.run().request_id);
        }
    }
}

impl Running {
    /// What the key and the figures are to know of news.
    fn count(&mut self, news: &Result<Delta, ApiError>) {
        let figures = self.ticket.figures();
        let over = match news {
            Ok(delta) => {
                if !delta.is_known && !delta.tokens.is_empty() {
                    self.ticket.charge(delta.tokens.len());
                    let now = Instant::now();
                    let waited = now - self.last.replace(now).unwrap_or(self.began);
                    figures.tokens(delta, delta.position == 0, waited);
                    self.watched.seat.emitted(delta.position + delta.tokens.len() as u32);
                    if delta.position == 0 {
                        self.watched.span.event("first token");
                    }
                }
                delta.ending.as_ref().map(|ending| over(ending.reason))
            }
            Err(error) => {
                self.watched.span.fail(error);
                Some(Over::Failed)
            }
        };
        if let Some(over) = over {
            self.over(over);
        }
    }

    fn over(&mut self, over: Over) {
        self.is_counted = true;
        self.ticket.figures().over(over, self.began.elapsed());
        self.watched.span.set("gen_ai.usage.output_tokens", self.journal.position() as i64);
        self.watched.span.set("gen_ai.response.finish_reasons", over.name());
    }

    async fn next(&mut self) -> Result<Delta, ApiError> {
        loop {
            let event = tokio::select! {
                biased;
                () = self.ticket.aborted() => return Ok(self.output.abort()),
                () = self.call.place.lost.cancelled() => {
                    self.call.place.abort(&self.journal.run().request_id);
                    self.recover("its worker is silent, or does not reach its experts").await?;
                    continue;
                }
                event = self.call.events.message() => event,
            };
            match event {
                Ok(Some(event)) => match self.journal.accept(&event) {
                    Place::Next => {
                        (self.has_ended, self.stalled) = (event.finish.is_some(), None);
                        if let Some(delta) = self.output.push(event) {
                            return self.marked(delta);
                        }
                    }
                    Place::Known => {}
                    Place::Gap => self.recover("its worker left a token out").await?,
                },
                Ok(None) => {
                    let reason = "the attention worker ended its answer without a finish".to_owned();
                    return Err(ApiError::Failed { reason });
                }
                Err(status) if is_transport(&status) => self.recover(status.message()).await?,
                Err(status) => {
                    self.has_ended = true;
                    return Err(failure(&status));
                }
            }
        }
    }

    /// Says whether the client has this already.
    fn marked(&self, delta: Delta) -> Result<Delta, ApiError> {
        let end = delta.position + delta.tokens.len() as u32;
        let is_known = self.known > 0 && end <= self.known && delta.ending.is_none();
        if delta.position < self.known && end > self.known {
            let reason = format!("is {}, inside of a message; expected {} or {end}", self.known, delta.position);
            return Err(ApiError::invalid("resume_position", reason));
        }
        Ok(Delta { is_known, ..delta })
    }

    /// Has the sequence go on on another worker, as soon as there is one. Workers that take it and lose it again without
    /// a token count as none.
    async fn recover(&mut self, reason: &str) -> Result<(), ApiError> {
        let request_id = &self.journal.run().request_id;
        let (worker, position) = (self.call.place.worker.clone(), self.journal.position());
        tracing::info!(request_id, %worker, position, reason, "a sequence goes on elsewhere");
        self.ticket.figures().moved();
        self.watched.seat.recovering();
        self.watched.attempt.fail(reason);
        self.watched.attempt = Span::default();
        let (begun, mut wait) = self.stalled.unwrap_or((Instant::now(), Duration::ZERO));
        let mut last = vec![worker];
        loop {
            tokio::select! {
                () = self.ticket.aborted() => return Ok(()),
                () = sleep(wait) => {}
            }
            wait = (wait * 2).clamp(RETRY_MIN, RETRY_MAX);
            self.stalled = Some((begun, wait));
            if begun.elapsed() > RECOVERY_MAX {
                return Err(ApiError::Unavailable { reason: format!("no attention worker went on with it: {reason}") });
            }
            let workers = &self.call.place.workers;
            let (mut attempt, run) = attempt(&self.watched.span, self.journal.run().clone());
            attempt.set("moesaic.position", position as i64);
            let start = workers.start(run, RETRY_AFTER_S, &last);
            let started = tokio::select! {
                () = self.ticket.aborted() => return Ok(()),
                started = start => started,
            };
            match started {
                Ok(call) => {
                    let (worker, ms) = (call.place.worker.clone(), begun.elapsed().as_millis() as u64);
                    tracing::debug!(request_id, %worker, ms, "a sequence has found another worker");
                    self.watched.seat.placed(&worker);
                    attempt.set("moesaic.worker", worker.as_str().to_owned());
                    (self.call, self.watched.attempt) = (call, attempt);
                    return Ok(());
                }
                Err(error) if !error.is_passing() => return Err(error),
                Err(error) => {
                    attempt.fail(&error);
                    tracing::debug!(request_id, %error, "no worker takes a sequence");
                }
            }
            last.clear();
        }
    }
}

/// A worker's status that is the request's end, as the client sees it.
fn failure(status: &Status) -> ApiError {
    let reason = status.message().to_owned();
    match status.code() {
        // Of its experts none was to be had; or another call has taken it over, whose client may be gone and this one's
        // may not: who asks again is served.
        tonic::Code::DeadlineExceeded | tonic::Code::Aborted => ApiError::Unavailable { reason },
        _ => ApiError::Failed { reason },
    }
}
