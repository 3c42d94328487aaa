//! The sequences of one HTTP request, run side by side: n choices for each of its prompts.

use std::sync::Arc;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use futures::stream::{self, BoxStream, SelectAll, Stream, StreamExt};
use moesaic_proto::v1::FinishReason;
use serde::Serialize;

use super::error::error_body;
use super::progress::{ChoiceProgress, Progress};
use super::types::{Head, Usage};
use crate::core::{ApiError, Delta, Params};
use crate::shell::service::{Client, Service, Ticket, draw_id, draw_seed};

pub struct Batch {
    sequences: SelectAll<BoxStream<'static, (usize, Result<Delta, ApiError>)>>,
    progress: Progress,
    usage: Usage,
}

/// What is asked for: n choices for each prompt.
pub struct Prompts {
    pub tokens: Vec<Vec<u32>>,
    pub n: u32,
}

/// Where a client goes on that comes back, checked against what it asks for.
pub fn resumed(progress: Option<Progress>, stream: bool, sequences: usize) -> Result<Option<Progress>, ApiError> {
    let wrong = |reason: String| Err(ApiError::invalid("Last-Event-ID", reason));
    match &progress {
        Some(_) if !stream => wrong("is set; only a stream can be resumed".into()),
        Some(progress) if progress.choices.len() != sequences => {
            wrong(format!("is of a request with {} choices; this one has {sequences}", progress.choices.len()))
        }
        _ => Ok(progress),
    }
}

/// Lets a request in, under a new id or the one that it had.
pub async fn admit(
    service: &Arc<Service>,
    client: Client,
    prefix: &str,
    sequences: usize,
    resumed: Option<&Progress>,
) -> Result<Arc<Ticket>, ApiError> {
    match resumed {
        Some(progress) => service.admit_again(client, progress.request_id.clone(), sequences).await,
        None => service.admit(client, draw_id(prefix), sequences),
    }
}

/// How a route turns news into the chunks of a stream.
pub trait Chunks: Send + 'static {
    type Chunk: Serialize + Send;
    fn chunks(&mut self, index: usize, delta: Delta) -> Vec<Self::Chunk>;
    fn usage(&mut self, usage: Usage) -> Self::Chunk;
}

impl Batch {
    /// Starts them all, or none. Prompt p's choice c has index p * n + c; each prompt's choices have the same seeds, so
    /// that a prompt's answers do not depend on the others.
    pub async fn start(
        service: &Arc<Service>,
        ticket: Arc<Ticket>,
        params: &Params,
        prompts: Prompts,
        resumed: Option<Progress>,
    ) -> Result<Self, ApiError> {
        let count = prompts.tokens.len() * prompts.n as usize;
        let is_resumed = resumed.is_some();
        let new = || Progress::new(ticket.request_id().to_owned(), params.seed.unwrap_or_else(draw_seed), count);
        let progress = resumed.unwrap_or_else(new);
        let context = service.model.context_max;
        if let Some(choice) = progress.choices.iter().find(|choice| choice.position as usize > context) {
            let reason = format!("has a choice of {} tokens; the model's context has {context}", choice.position);
            return Err(ApiError::invalid("Last-Event-ID", reason));
        }
        let mut usage = Usage::default();
        let mut starts = Vec::new();
        let mut sequence = 0;
        for prompt in prompts.tokens {
            usage.prompt_tokens += prompt.len() as u32;
            let request = service.request(params, prompt)?;
            for choice in 0..prompts.n {
                let ChoiceProgress { position, has_ended } = progress.choices[sequence];
                if has_ended {
                    usage.completion_tokens = usage.completion_tokens.saturating_add(position);
                } else {
                    let (numbers, known) = ((sequence as u32, choice), is_resumed.then_some(position));
                    let start = service.generate(ticket.clone(), request.clone(), progress.seed, numbers, known);
                    starts.push(async move { Ok::<_, ApiError>((sequence, start.await?)) });
                }
                sequence += 1;
            }
        }
        usage.total_tokens = usage.prompt_tokens.saturating_add(usage.completion_tokens);
        let sequences = try_join_all(starts).await?.into_iter();
        let sequences = sequences.map(|(i, generation)| generation.into_stream().map(move |news| (i, news)).boxed());
        Ok(Self { sequences: stream::select_all(sequences), progress, usage })
    }

    /// Sequences in all.
    pub fn count(&self) -> usize {
        self.progress.choices.len()
    }

    async fn next(&mut self) -> Option<Result<(usize, Delta), ApiError>> {
        let (index, news) = self.sequences.next().await?;
        Some(news.map(|delta| {
            let ended = delta.ending.as_ref().map_or(0, |ending| ending.completion_tokens);
            self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(ended);
            self.usage.total_tokens = self.usage.total_tokens.saturating_add(ended);
            (index, delta)
        }))
    }

    /// Waits for all of them: each sequence's news put together.
    pub async fn whole(mut self) -> Result<(Vec<Delta>, Usage), ApiError> {
        let mut whole: Vec<Delta> = (0..self.count()).map(|_| Delta::default()).collect();
        while let Some(news) = self.next().await {
            let (index, delta) = news?;
            let sum = &mut whole[index];
            sum.text.push_str(&delta.text);
            sum.tokens.extend(delta.tokens);
            sum.prompt.extend(delta.prompt);
            sum.ending = delta.ending;
        }
        Ok((whole, self.usage))
    }

    /// Server-sent events. An error ends the stream in place of `[DONE]`.
    pub fn stream<C: Chunks>(self, chunks: C, include_usage: bool) -> Response {
        let state = Streaming { batch: self, chunks, include_usage, done: false };
        let events = stream::unfold(state, |mut state| async move { state.next().await.map(|events| (events, state)) });
        let events = events.flat_map(stream::iter).map(Ok::<_, std::convert::Infallible>);
        sse(events)
    }
}

struct Streaming<C> {
    batch: Batch,
    chunks: C,
    include_usage: bool,
    done: bool,
}

impl<C: Chunks> Streaming<C> {
    async fn next(&mut self) -> Option<Vec<Event>> {
        if self.done {
            return None;
        }
        Some(match self.batch.next().await {
            Some(Ok((index, delta))) => {
                let progress = &mut self.batch.progress;
                progress.advance(index, &delta);
                let (is_known, id) = (delta.is_known, progress.to_string());
                // Known ones count for what the next chunks look like.
                let chunks = self.chunks.chunks(index, delta);
                let chunks = if is_known { Vec::new() } else { chunks };
                chunks.iter().map(|chunk| event(chunk).id(&id)).collect()
            }
            Some(Err(error)) => {
                self.done = true;
                vec![event(&error_body(error))]
            }
            None => {
                self.done = true;
                let usage = self.include_usage.then(|| event(&self.chunks.usage(self.batch.usage)));
                usage.into_iter().chain([Event::default().data("[DONE]")]).collect()
            }
        })
    }
}

fn event(data: &impl Serialize) -> Event {
    Event::default().data(serde_json::to_string(data).expect("our own types always are JSON"))
}

fn sse(events: impl Stream<Item = Result<Event, std::convert::Infallible>> + Send + 'static) -> Response {
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

impl Delta {
    /// The tokens that are part of the text: without the stop token or the stop string's at the end.
    pub(super) fn visible_tokens(&self) -> &[moesaic_proto::v1::TokenInfo] {
        let hidden = self.ending.as_ref().map_or(0, |ending| ending.hidden_tokens as usize);
        &self.tokens[..self.tokens.len().saturating_sub(hidden)]
    }

    pub(super) fn finish_reason(&self) -> Option<&'static str> {
        self.ending.as_ref().map(|ending| match ending.reason {
            FinishReason::Length => "length",
            FinishReason::Aborted => "abort",
            FinishReason::Stop | FinishReason::Unspecified => "stop",
        })
    }
}

/// What every answer to this request begins with.
pub fn head(service: &Service, id: &str, object: &'static str) -> Head {
    let system_fingerprint = service.workers.identity().map(|identity| {
        let digits: String = identity.fingerprint.chars().take(12).collect();
        format!("fp_{digits}_{}", identity.numerics())
    });
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Head {
        id: id.to_owned(),
        object,
        created: now.map_or(0, |since| since.as_secs()),
        model: service.model.name.clone(),
        system_fingerprint,
    }
}
