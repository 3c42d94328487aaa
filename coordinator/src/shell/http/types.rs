//! OpenAI's request and response objects, as far as this server has them.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

/// Tokens that a request has read and written.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    pub total_tokens: u32,
}

/// What all answers and all chunks of a stream have in common.
#[derive(Clone, Debug, Serialize)]
pub struct Head {
    pub id: String,
    /// "chat.completion", "text_completion", ...
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    /// Of the checkpoint and the numerics: with the request and its seed, all that the tokens depend on.
    pub system_fingerprint: Option<String>,
}

/// A whole answer, or one chunk of a stream.
#[derive(Debug, Serialize)]
pub struct Answer<Choice> {
    #[serde(flatten)]
    pub head: Head,
    pub choices: Vec<Choice>,
    /// In a stream: null but in the last chunk, and only there if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One choice of a chat completion.
#[derive(Debug, Serialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<PromptToken>>>,
}

/// The assistant's turn.
#[derive(Debug, Serialize)]
pub struct ChatMessage {
    pub role: &'static str,
    pub content: String,
    /// What stood between `<think>` and `</think>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

/// One choice's part of a chunk.
#[derive(Debug, Serialize)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: ChatDelta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<PromptToken>>>,
}

/// What a chunk adds to the assistant's turn.
#[derive(Debug, Default, Serialize)]
pub struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

/// Log-probabilities in the chat routes' shape.
#[derive(Debug, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
}

/// A generated token and the likeliest ones in its place.
#[derive(Debug, Serialize)]
pub struct TokenLogprob {
    #[serde(flatten)]
    pub token: LikelyToken,
    pub top_logprobs: Vec<LikelyToken>,
}

#[derive(Debug, Serialize)]
pub struct LikelyToken {
    /// Bytes that are no character by themselves are shown as U+FFFD here.
    pub token: String,
    pub logprob: f32,
    /// The exact bytes.
    pub bytes: Vec<u8>,
}

/// A prompt token under the model: its own log-probability and the likeliest ones, by token id.
pub type PromptToken = BTreeMap<u32, PromptLogprob>;

#[derive(Debug, Serialize)]
pub struct PromptLogprob {
    pub logprob: f32,
    pub decoded_token: String,
}

/// One choice of a plain completion, or its part of a chunk.
#[derive(Debug, Serialize)]
pub struct TextChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<TextLogprobs>,
    /// Null in all chunks but the last.
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<PromptToken>>>,
}

/// Log-probabilities in the legacy shape: lists of the same length.
#[derive(Debug, Default, Serialize)]
pub struct TextLogprobs {
    /// Bytes that are no text by themselves as `bytes:\xe2\x80`.
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt, which nothing stands before.
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token's text starts in the choice's text, in characters.
    pub text_offset: Vec<usize>,
}

/// A model in /v1/models.
#[derive(Debug, Serialize)]
pub struct ModelCard {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// Prompt and output together, in tokens.
    pub max_model_len: usize,
}

#[derive(Debug, Serialize)]
pub struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelCard>,
}

/// The answer of /tokenize.
#[derive(Debug, Serialize)]
pub struct Tokens {
    pub count: usize,
    pub max_model_len: usize,
    pub tokens: Vec<u32>,
}

/// The answer of /detokenize.
#[derive(Debug, Serialize)]
pub struct Text {
    pub prompt: String,
}

/// An error in OpenAI's shape.
#[derive(Debug, Serialize)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Debug, Serialize)]
pub struct ErrorDetail {
    pub message: String,
    pub r#type: &'static str,
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

/// A prompt of /v1/completions.
#[derive(Debug, PartialEq)]
pub enum TextPrompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl TextPrompt {
    /// A string, a list of strings, a list of token ids, or a list of those. None: something else.
    pub fn read_all(value: Value) -> Option<Vec<Self>> {
        let one = |value: Value| match value {
            Value::String(text) => Some(Self::Text(text)),
            other => super::fields::as_token_ids(&other).map(Self::Tokens),
        };
        match value {
            Value::Array(items) if items.iter().all(|item| item.is_string() || item.is_array()) => {
                items.into_iter().map(one).collect()
            }
            other => one(other).map(|prompt| vec![prompt]),
        }
    }
}
