//! Log-probabilities in OpenAI's two shapes.

use std::collections::BTreeMap;
use std::fmt::Write;

use moesaic_proto::v1::TokenInfo;

use super::types::{ChatLogprobs, LikelyToken, PromptLogprob, PromptToken, TextLogprobs, TokenLogprob};
use crate::text::Tokenizer;

/// The chat routes' shape.
pub fn chat_logprobs(tokens: &[TokenInfo], tokenizer: &Tokenizer) -> ChatLogprobs {
    let likely = |id, logprob| {
        let bytes = tokenizer.bytes_of(id);
        LikelyToken { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
    };
    let one = |info: &TokenInfo| TokenLogprob {
        token: likely(info.token, info.logprob.unwrap_or_default()),
        top_logprobs: info.top.iter().map(|top| likely(top.token, top.logprob)).collect(),
    };
    ChatLogprobs { content: tokens.iter().map(one).collect() }
}

/// The legacy shape, one token at a time; `offset` is where the next token's text starts.
#[derive(Default)]
pub struct LegacyLogprobs {
    offset: usize,
}

impl LegacyLogprobs {
    /// `first` is an echoed prompt's first token, which has no probability.
    pub fn take(&mut self, first: Option<u32>, tokens: &[TokenInfo], tokenizer: &Tokenizer) -> TextLogprobs {
        let mut out = TextLogprobs::default();
        let first = first.map(|token| TokenInfo { token, ..TokenInfo::default() });
        for info in first.iter().chain(tokens) {
            let shown = shown(info.token, tokenizer);
            out.text_offset.push(self.offset);
            if !tokenizer.is_special(info.token) {
                self.offset += String::from_utf8_lossy(&tokenizer.bytes_of(info.token)).chars().count();
            }
            out.tokens.push(shown);
            out.token_logprobs.push(info.logprob);
            let top = || info.top.iter().map(|top| (self::shown(top.token, tokenizer), top.logprob)).collect();
            out.top_logprobs.push(info.logprob.map(|_| top()));
        }
        out
    }
}

/// Null for the first prompt token, then each token's own log-probability and the likeliest ones.
pub fn prompt_logprobs(tokens: &[TokenInfo], tokenizer: &Tokenizer) -> Vec<Option<PromptToken>> {
    let one = |info: &TokenInfo| {
        let own = info.logprob.map(|logprob| (info.token, logprob));
        let all = info.top.iter().map(|top| (top.token, top.logprob)).chain(own);
        let decoded = |id| String::from_utf8_lossy(&tokenizer.bytes_of(id)).into_owned();
        let all = all.map(|(id, logprob)| (id, PromptLogprob { logprob, decoded_token: decoded(id) }));
        Some(all.collect::<BTreeMap<_, _>>())
    };
    std::iter::once(None).chain(tokens.iter().map(one)).collect()
}

fn shown(id: u32, tokenizer: &Tokenizer) -> String {
    String::from_utf8(tokenizer.bytes_of(id)).unwrap_or_else(|error| {
        error.as_bytes().iter().fold("bytes:".to_owned(), |mut text, byte| {
            write!(text, "\\x{byte:02x}").expect("writing to a string cannot fail");
            text
        })
    })
}
