//! /v1/chat/completions

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use moesaic_proto::limits::LOGPROBS_MAX;
use serde_json::{Map, Value};

use super::batch::{Batch, Chunks, Prompts, admit, head, resumed};
use super::fields::{Fields, wrong};
use super::logprobs::{chat_logprobs, prompt_logprobs};
use super::types::{Answer, ChatChoice, ChatChunkChoice, ChatDelta, ChatMessage, Head, Usage};
use super::{CHOICES_MAX, Incoming};
use crate::core::error::shortened;
use crate::core::{ApiError, Delta, Params};
use crate::shell::service::Service;
use crate::text::template::Message;
use crate::text::{ReasoningSplitter, Split, Tokenizer};

/// A chat request, checked as far as it can be without its prompt.
struct ChatRequest {
    messages: Vec<Message>,
    /// The caller's variables for the template.
    variables: Map<String, Value>,
    params: Params,
    n: u32,
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
    let resumed = resumed(progress, request.stream, request.n as usize)?;
    let ticket = admit(&service, client, "chatcmpl-", request.n as usize, resumed.as_ref()).await?;
    let prompt = service.tokenize_chat(&request.messages, &request.variables).await?;
    let opened = prompt.reasoning_opened;
    let prompts = Prompts { tokens: vec![prompt.tokens], n: request.n };
    let batch = Batch::start(&service, ticket.clone(), &request.params, prompts, resumed).await?;

    let shape = Shape {
        tokenizer: service.tokenizer.clone(),
        logprobs: request.params.logprobs.is_some(),
        prompt_logprobs: request.params.prompt_logprobs.is_some(),
    };
    if request.stream {
        let head = head(&service, ticket.request_id(), "chat.completion.chunk");
        let choices = (0..request.n).map(|_| ChoiceState { splitter: ReasoningSplitter::new(opened), begun: false });
        let chunks = ChatChunks { head, shape, choices: choices.collect(), include_usage: request.include_usage };
        return Ok(batch.stream(chunks, request.include_usage));
    }
    let head = head(&service, ticket.request_id(), "chat.completion");
    let (whole, usage) = batch.whole().await?;
    let choices = whole.into_iter().enumerate().map(|(index, delta)| shape.choice(index, delta, opened)).collect();
    Ok(Json(Answer { head, choices, usage: Some(Some(usage)) }).into_response())
}

fn read(fields: &mut Fields) -> Result<ChatRequest, ApiError> {
    fields.refuse_unsupported()?;
    let mut params = fields.params()?;
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    params.logprobs = match (wanted, fields.integer("top_logprobs")?) {
        (true, Some(top)) if !(0..=i64::from(LOGPROBS_MAX)).contains(&top) => {
            let reason = format!("is {top}; expected 0 to {LOGPROBS_MAX}");
            return Err(ApiError::invalid("top_logprobs", reason));
        }
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::invalid("top_logprobs", "is set; set logprobs to true as well")),
    };
    let (stream, include_usage) = fields.streaming()?;
    Ok(ChatRequest {
        n: fields.choices(CHOICES_MAX)?,
        variables: fields.object("chat_template_kwargs")?.cloned().unwrap_or_default(),
        messages: messages(fields.take("messages"))?,
        params,
        stream,
        include_usage,
    })
}

/// The conversation. `developer` is OpenAI's newer name for `system`.
pub fn messages(value: Option<Value>) -> Result<Vec<Message>, ApiError> {
    let Some(value) = value else { return Err(ApiError::invalid("messages", "is not set")) };
    let Value::Array(items) = value else { return Err(wrong("messages", "a list of messages", &value)) };
    items.into_iter().enumerate().map(|(i, item)| message(i, item)).collect()
}

fn message(index: usize, value: Value) -> Result<Message, ApiError> {
    let place = |field: &str| format!("messages[{index}].{field}");
    let Value::Object(mut fields) = value else {
        return Err(wrong(format!("messages[{index}]"), "an object", &value));
    };
    let mut string = |field: &str| match fields.remove(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(place(field), "a string", &other)),
    };
    let role = match string("role")?.as_deref() {
        Some("developer") => "system".to_owned(),
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role.to_owned(),
        other => {
            let given = shortened(other.unwrap_or_default());
            let reason = format!("is {given:?}; expected system, user, assistant or tool");
            return Err(ApiError::invalid(place("role"), reason));
        }
    };
    let (name, reasoning_content) = (string("name")?, string("reasoning_content")?);
    if fields.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty()) {
        return Err(ApiError::invalid(place("tool_calls"), "is not supported by this server"));
    }
    let content = content(fields.remove("content").unwrap_or_default(), &place("content"))?;
    Ok(Message { role, content, name, reasoning_content })
}

/// A string, or a list of text parts, which are joined by line ends.
fn content(value: Value, place: &str) -> Result<String, ApiError> {
    let part = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (kind, _) => {
            let kind = shortened(kind.unwrap_or_default());
            let reason = format!("has a part of type {kind:?}; only text is supported");
            Err(ApiError::invalid(place, reason))
        }
    };
    match value {
        Value::String(text) => Ok(text),
        Value::Array(parts) => Ok(parts.iter().map(part).collect::<Result<Vec<_>, _>>()?.join("\n")),
        other => Err(wrong(place, "a string or a list of text parts", &other)),
    }
}

/// What a request wants to see of each token.
struct Shape {
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    prompt_logprobs: bool,
}

impl Shape {
    fn choice(&self, index: usize, delta: Delta, opened: bool) -> ChatChoice {
        let mut splitter = ReasoningSplitter::new(opened);
        let (first, rest) = (splitter.push(&delta.text), splitter.finish());
        let reasoning = first.reasoning + &rest.reasoning;
        ChatChoice {
            index,
            logprobs: self.logprobs.then(|| chat_logprobs(delta.visible_tokens(), &self.tokenizer)),
            finish_reason: delta.finish_reason().unwrap_or("stop"),
            prompt_logprobs: self.prompt_logprobs.then(|| prompt_logprobs(&delta.prompt, &self.tokenizer)),
            message: ChatMessage {
                role: "assistant",
                content: first.answer + &rest.answer,
                reasoning_content: (!reasoning.is_empty()).then_some(reasoning),
            },
        }
    }
}

struct ChatChunks {
    head: Head,
    shape: Shape,
    choices: Vec<ChoiceState>,
    include_usage: bool,
}

struct ChoiceState {
    splitter: ReasoningSplitter,
    begun: bool,
}

impl Chunks for ChatChunks {
    type Chunk = Answer<ChatChunkChoice>;

    fn chunks(&mut self, index: usize, delta: Delta) -> Vec<Self::Chunk> {
        let state = &mut self.choices[index];
        let first = !std::mem::replace(&mut state.begun, true);
        let mut split = state.splitter.push(&delta.text);
        if delta.ending.is_some() {
            let Split { reasoning, answer } = state.splitter.finish();
            split.reasoning += &reasoning;
            split.answer += &answer;
        }
        let some = |text: String| (!text.is_empty()).then_some(text);
        let tokens = delta.visible_tokens();
        let logprobs =
            (self.shape.logprobs && !tokens.is_empty()).then(|| chat_logprobs(tokens, &self.shape.tokenizer));
        let prompt = self.shape.prompt_logprobs && first;
        let choice = ChatChunkChoice {
            index,
            delta: ChatDelta {
                role: first.then_some("assistant"),
                content: some(split.answer),
                reasoning_content: some(split.reasoning),
            },
            logprobs,
            finish_reason: delta.finish_reason(),
            prompt_logprobs: prompt.then(|| prompt_logprobs(&delta.prompt, &self.shape.tokenizer)),
        };
        let usage = self.include_usage.then_some(None);
        vec![Answer { head: self.head.clone(), choices: vec![choice], usage }]
    }

    fn usage(&mut self, usage: Usage) -> Self::Chunk {
        Answer { head: self.head.clone(), choices: Vec::new(), usage: Some(Some(usage)) }
    }
}
