//! The next token from a row of logits. The order is: logit bias, penalties, temperature, top-k, top-p, min-p, draw.
//! Ties go to the lower token id, and a logit that is not a number is never chosen while another is.

use moesaic_kernels::{log_softmax, softmax};

use super::philox::uniform;

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

/// Draws the token at position `prompt.len() + generated.len()`, which with the seed keys the draw: a sequence that
/// goes on elsewhere, its output now part of the prompt, is drawn the same.
pub fn sample(logits: &[f32], sampling: &Sampling, prompt: &[u32], generated: &[u32]) -> u32 {
    let mut logits: Vec<f32> = logits.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x }).collect();
    for &(token, bias) in &sampling.logit_bias {
        logits[token as usize] += bias;
    }
    penalise(&mut logits, sampling, prompt, generated);
    let best = argmax(&logits);
    if sampling.temperature == 0.0 || !logits[best as usize].is_finite() {
        return best;
    }
    let largest = logits[best as usize];
    logits.iter_mut().for_each(|x| *x = (*x - largest) / sampling.temperature);
    let kept = filter(&logits, sampling);
    draw(&kept, uniform(sampling.seed, (prompt.len() + generated.len()) as u64))
}

/// `token`'s log-probability and the `count` likeliest, from the model's own logits: no bias, penalty or filter.
pub fn logprobs(logits: &[f32], token: u32, count: usize) -> Logprobs {
    let mut logprobs = logits.to_vec();
    log_softmax(&mut logprobs);
    let logprob = logprobs[token as usize];
    let mut all: Vec<(u32, f32)> = (0..).zip(logprobs).collect();
    Logprobs { logprob, top: best_first(&mut all, count).to_vec() }
}

/// Repetition counts prompt and output, presence and frequency the output alone.
fn penalise(logits: &mut [f32], sampling: &Sampling, prompt: &[u32], generated: &[u32]) {
    let Sampling { repetition_penalty: repetition, presence_penalty, frequency_penalty, .. } = *sampling;
    if repetition != 1.0 {
        let mut seen = [prompt, generated].concat();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        }
    }
    if presence_penalty != 0.0 || frequency_penalty != 0.0 {
        let mut seen = generated.to_vec();
        seen.sort_unstable();
        for run in seen.chunk_by(|a, b| a == b) {
            logits[run[0] as usize] -= presence_penalty + frequency_penalty * run.len() as f32;
        }
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(better).expect("a vocabulary is not empty") as u32
}

/// Tokens and probabilities that are left after top-k, top-p and min-p, by ascending token. Never empty.
fn filter(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f32)> {
    let Sampling { top_k, top_p, min_p, .. } = *sampling;
    let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let is_sorted = top_k > 0 || top_p < 1.0;
    if is_sorted {
        let count = if top_k > 0 { top_k } else { tokens.len() };
        let kept = best_first(&mut tokens, count).len();
        tokens.truncate(kept);
    }
    let mut probabilities: Vec<f32> = tokens.iter().map(|&(_, logit)| logit).collect();
    softmax(&mut probabilities);
    tokens.iter_mut().zip(probabilities).for_each(|(token, probability)| token.1 = probability);
    if top_p < 1.0 {
        let mut sum = 0.0;
        let reaches = |&(_, probability): &(u32, f32)| {
            sum += f64::from(probability);
            sum >= f64::from(top_p)
        };
        let kept = tokens.iter().position(reaches).map_or(tokens.len(), |last| last + 1);
        tokens.truncate(kept);
    }
    let least = min_p * tokens.iter().map(|&(_, probability)| probability).fold(0.0, f32::max);
    tokens.retain(|&(_, probability)| probability >= least);
    if is_sorted {
        tokens.sort_unstable_by_key(|&(token, _)| token);
    }
    tokens
}

/// The token at a share of `u` in [0, 1) of the total probability.
fn draw(tokens: &[(u32, f32)], u: f64) -> u32 {
    let target = u * tokens.iter().map(|&(_, probability)| f64::from(probability)).sum::<f64>();
    let mut sum = 0.0;
    let mut last = tokens[0].0;
    for &(token, probability) in tokens.iter().filter(|(_, probability)| *probability > 0.0) {
        sum += f64::from(probability);
        last = token;
        if sum > target {
            break;
        }
    }
    last
}

/// The `count` best, sorted, as the slice's head.
fn best_first(tokens: &mut [(u32, f32)], count: usize) -> &[(u32, f32)] {
    // Adding 0 makes both zeros equal.
    let key = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x + 0.0 };
    let order = |a: &(u32, f32), b: &(u32, f32)| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0));
    let count = count.min(tokens.len());
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count, order);
    }
    let head = &mut tokens[..count];
    head.sort_unstable_by(order);
    head
}

#[cfg(test)]
mod tests;
