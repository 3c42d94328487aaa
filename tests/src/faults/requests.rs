//! The requests that every run asks: unlike prompts and lengths, greedy and sampled, over gRPC and over HTTP.

use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::{GenerateRequest, SamplingParams, TokenIds};
use serde_json::{Value, json};

/// One of them, in either door's words.
#[derive(Clone, Debug)]
pub struct Request {
    pub index: usize,
    pub prompt: Vec<u32>,
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    pub seed: u64,
    pub door: Door,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Grpc,
    Http,
}

/// Every so many go over HTTP.
const HTTP_EVERY: usize = 8;
/// Ids below are special in the demo model.
const SPECIAL: usize = 3;
const VOCABULARY: usize = 288;

pub fn requests(count: usize) -> Vec<Request> {
    (0..count).map(|i| request(i, 5 + i * 37 % 60, 96 + i * 53 % 161)).collect()
}

pub fn request(index: usize, prompt_tokens: usize, max_tokens: usize) -> Request {
    let token = |p: usize| (SPECIAL + (p * 37 + index * 101) % (VOCABULARY - SPECIAL)) as u32;
    Request {
        index,
        prompt: (0..prompt_tokens).map(token).collect(),
        max_tokens: max_tokens as u32,
        temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
        seed: 1 + index as u64,
        door: if index % HTTP_EVERY == HTTP_EVERY - 1 { Door::Http } else { Door::Grpc },
    }
}

impl Request {
    pub fn grpc(&self, request_id: &str, resume_position: Option<u32>) -> GenerateRequest {
        GenerateRequest {
            request_id: request_id.to_owned(),
            prompt: Some(Prompt::Tokens(TokenIds { ids: self.prompt.clone() })),
            sampling: Some(SamplingParams {
                temperature: Some(self.temperature),
                seed: Some(self.seed),
                ..Default::default()
            }),
            max_tokens: Some(self.max_tokens),
            ignore_eos: true,
            resume_position,
            ..Default::default()
        }
    }

    pub fn http(&self) -> Value {
        json!({
            "prompt": self.prompt,
            "temperature": f64::from(self.temperature),
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "ignore_eos": true,
            "stream": true,
        })
    }
}
