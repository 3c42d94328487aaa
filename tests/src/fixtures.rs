//! The checkpoints in the repository, and their `reference.json`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// All of them.
pub const MODELS: [&str; 5] = ["v3", "v3-fp8", "v2", "v2-lite", "tiny-r1"];

pub fn folder(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if name.starts_with("tiny") {
        root.join("../crates/moesaic/models").join(name)
    } else {
        root.join("fixtures").join(name)
    }
}

/// What Hugging Face transformers computed in f32.
#[derive(Deserialize)]
pub struct Case {
    pub prompt: Vec<u32>,
    /// After the prompt's last token.
    pub last_logits: Vec<f32>,
    /// Of each prompt token after the first.
    pub prompt_logprobs: Vec<f32>,
    pub greedy: Vec<u32>,
    /// Between the two best logits at each greedy token.
    pub greedy_margin: Vec<f32>,
}

impl Case {
    /// The log-probability of a token after the prompt.
    pub fn next_logprob(&self, token: u32) -> f32 {
        let sum: f64 = self.last_logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        (f64::from(self.last_logits[token as usize]) - sum.ln()) as f32
    }

    /// The greedy tokens before the first place where the two best are within `margin` of each other: after a token
    /// that may differ, the rest may.
    pub fn sure(&self, margin: f32) -> &[u32] {
        let sure = self.greedy_margin.iter().take_while(|&&m| m > margin).count();
        &self.greedy[..sure]
    }
}

pub fn reference(name: &str) -> Vec<Case> {
    #[derive(Deserialize)]
    struct Reference {
        cases: Vec<Case>,
    }
    let text = std::fs::read(folder(name).join("reference.json")).unwrap();
    serde_json::from_slice::<Reference>(&text).unwrap().cases
}
