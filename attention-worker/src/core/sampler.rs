//! What a request asks of each next token, as [`moesaic_kernels::draw`] takes it, and the log-probabilities of tokens.

use std::collections::HashMap;

use moesaic_kernels::{Draw, Edit, best_first, log_softmax};

use super::philox::random;

#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Tokens below the vocabulary size, each once.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A token's log-probability under the model, and the likeliest tokens, best first.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

impl Sampling {
    /// How the token at position `prompt.len() + generated.len()` is drawn. That and the seed key the draw: a sequence that
    /// goes on elsewhere, its output now part of the prompt, is drawn the same.
    pub fn draw(&self, prompt: &[u32], generated: &[u32]) -> Draw {
        Draw {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            random: random(self.seed, (prompt.len() + generated.len()) as u64),
            edits: self.edits(prompt, generated),
        }
    }

    /// Repetition counts prompt and output, presence and frequency the output alone.
    fn edits(&self, prompt: &[u32], generated: &[u32]) -> Vec<Edit> {
        let mut edits: HashMap<u32, Edit> = HashMap::new();
        let mut edit = |token: u32, change: &dyn Fn(&mut Edit)| change(edits.entry(token).or_insert(Edit::none(token)));
        for &(token, bias) in &self.logit_bias {
            edit(token, &|edit| edit.bias = bias);
        }
        if self.repetition_penalty != 1.0 {
            prompt.iter().chain(generated).for_each(|token| edit(*token, &|e| e.repetition = self.repetition_penalty));
        }
        if self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 {
            let mut seen = generated.to_vec();
            seen.sort_unstable();
            for run in seen.chunk_by(|a, b| a == b) {
                let penalty = self.presence_penalty + self.frequency_penalty * run.len() as f32;
                edit(run[0], &|edit| edit.penalty = penalty);
            }
        }
        edits.into_values().collect()
    }
}

/// `token`'s log-probability and the `count` likeliest, from the model's own logits: no bias, penalty or filter.
pub fn logprobs(logits: &[f32], token: u32, count: usize) -> Logprobs {
    let mut logprobs = logits.to_vec();
    log_softmax(&mut logprobs);
    let logprob = logprobs[token as usize];
    let mut all: Vec<(u32, f32)> = (0..).zip(logprobs).collect();
    Logprobs { logprob, top: best_first(&mut all, count).to_vec() }
}

#[cfg(test)]
mod tests;
