//! /v1/completions: plain text or token ids, with echo and the legacy log-probabilities.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};

use super::batch::{Batch, Chunks, Prompts, admit, head, resumed};
use super::fields::{Fields, wrong};
use super::logprobs::{LegacyLogprobs, prompt_logprobs};
use super::types::{Answer, Head, TextChoice, TextPrompt, Usage};
use super::{CHOICES_MAX, Incoming};
use crate::core::{ApiError, Delta, Params};
use crate::shell::service::Service;
use crate::text::Tokenizer;

struct TextRequest {
    prompts: Vec<TextPrompt>,
    params: Params,
    n: u32,
    echo: bool,
    /// echo with max_tokens 0: only the prompt is wanted. One token is generated, and not shown.
    score_only: bool,
    /// The caller asked for them; echo with logprobs needs them anyway.
    prompt_logprobs: bool,
    add_special_tokens: bool,
    stream: bool,
    include_usage: bool,
}

pub async fn completions(
    service: Arc<Service>,
    Incoming { client, progress, mut fields }: Incoming,
) -> Result<Response, ApiError> {
    service.check_model(&fields.string("model")?.unwrap_or_default())?;
    let request = read(&mut fields)?;
    request.params.check(&service.model)?;
    let sequences = request.prompts.len() * request.n as usize;
    let resumed = resumed(progress, request.stream, sequences)?;
    let ticket = admit(&service, client, "cmpl-", sequences, resumed.as_ref()).await?;
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for prompt in request.prompts {
        prompts.push(match prompt {
            TextPrompt::Tokens(ids) => ids,
            TextPrompt::Text(text) => service.tokenize(text, request.add_special_tokens).await?,
        });
    }
    let kept = if request.echo { prompts.clone() } else { Vec::new() };
    let prompts = Prompts { tokens: prompts, n: request.n };
    let batch = Batch::start(&service, ticket.clone(), &request.params, prompts, resumed).await?;

    let choices = 0..batch.count();
    let mut chunks = TextChunks {
        head: head(&service, ticket.request_id(), "text_completion"),
        tokenizer: service.tokenizer.clone(),
        prompts: kept,
        n: request.n as usize,
        logprobs: request.params.logprobs.is_some(),
        prompt_logprobs: request.prompt_logprobs,
        score_only: request.score_only,
        choices: choices.map(|_| ChoiceState::default()).collect(),
        include_usage: request.include_usage,
    };
    if request.stream {
        return Ok(batch.stream(chunks, request.include_usage));
    }
    let (whole, usage) = batch.whole().await?;
    let choices = whole.into_iter().enumerate().map(|(index, delta)| chunks.choice(index, delta)).collect();
    let usage = chunks.shown_usage(usage);
    Ok(Json(Answer { head: chunks.head, choices, usage: Some(Some(usage)) }).into_response())
}

fn read(fields: &mut Fields) -> Result<TextRequest, ApiError> {
    fields.refuse_unsupported()?;
    let mut params = fields.params()?;
    params.logprobs = fields.integer("logprobs")?;
    let prompt_logprobs = params.prompt_logprobs.is_some();
    let echo = fields.boolean("echo")?.unwrap_or(false);
    if echo {
        params.prompt_logprobs = params.prompt_logprobs.max(params.logprobs);
    }
    let score_only = echo && params.max_tokens == Some(0);
    if score_only {
        params.max_tokens = Some(1);
    }
    let (stream, include_usage) = fields.streaming()?;
    let expected = "a string, a list of strings, a list of token ids, or a list of those";
    let prompts = match fields.take("prompt") {
        None => return Err(ApiError::invalid("prompt", "is not set")),
        Some(value) => {
            let error = wrong("prompt", expected, &value);
            TextPrompt::read_all(value).ok_or(error)?
        }
    };
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "is empty; expected at least 1 token"));
    }
    Ok(TextRequest {
        prompts,
        n: fields.choices(CHOICES_MAX)?,
        add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(false),
        params,
        echo,
        score_only,
        prompt_logprobs,
        stream,
        include_usage,
    })
}

struct TextChunks {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    /// To echo; empty if not asked for.
    prompts: Vec<Vec<u32>>,
    n: usize,
    logprobs: bool,
    prompt_logprobs: bool,
    score_only: bool,
    choices: Vec<ChoiceState>,
    include_usage: bool,
}

#[derive(Default)]
struct ChoiceState {
    begun: bool,
    logprobs: LegacyLogprobs,
}

impl TextChunks {
    fn choice(&mut self, index: usize, delta: Delta) -> TextChoice {
        let state = &mut self.choices[index];
        let first = !std::mem::replace(&mut state.begun, true);
        let echoed = self.prompts.get(index / self.n).filter(|_| first);
        let mut tokens = Vec::new();
        let mut text = String::new();
        if let Some(prompt) = echoed {
            text = self.tokenizer.decode(prompt);
            tokens.extend(delta.prompt.iter().cloned());
        }
        if !self.score_only {
            text.push_str(&delta.text);
            tokens.extend(delta.visible_tokens().iter().cloned());
        }
        let before = echoed.and_then(|prompt| prompt.first().copied());
        let logprobs = self.logprobs.then(|| state.logprobs.take(before, &tokens, &self.tokenizer));
        let finish_reason = delta.finish_reason().map(|reason| if self.score_only { "length" } else { reason });
        let prompt = self.prompt_logprobs && first;
        let prompt_logprobs = prompt.then(|| prompt_logprobs(&delta.prompt, &self.tokenizer));
        TextChoice { index, text, logprobs, finish_reason, prompt_logprobs }
    }

    fn shown_usage(&self, usage: Usage) -> Usage {
        if !self.score_only {
            return usage;
        }
        Usage { completion_tokens: 0, total_tokens: usage.prompt_tokens, ..usage }
    }
}

impl Chunks for TextChunks {
    type Chunk = Answer<TextChoice>;

    fn chunks(&mut self, index: usize, delta: Delta) -> Vec<Self::Chunk> {
        let choice = self.choice(index, delta);
        vec![Answer { head: self.head.clone(), choices: vec![choice], usage: self.include_usage.then_some(None) }]
    }

    fn usage(&mut self, usage: Usage) -> Self::Chunk {
        Answer { head: self.head.clone(), choices: Vec::new(), usage: Some(Some(self.shown_usage(usage))) }
    }
}
