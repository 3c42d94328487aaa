//! From a `RunRequest` to what the engine takes: every field is checked, and an error names it, its limit and the value.

use moesaic_model::Config;
use moesaic_proto::limits::{EOS_TOKENS_MAX, LOGIT_BIAS_MAX, LOGPROBS_MAX, REQUEST_ID_LEN_MAX, STOP_TOKENS_MAX};
use moesaic_proto::v1::{RunRequest, SamplingParams, TokenInfo};

use crate::core::batcher::Request;
use crate::core::sampler::{Logprobs, Sampling};
use crate::engine::handle::{Submit, Token};

/// A coordinator adds a number to a request's id, and the model's own end tokens to its stop tokens.
const ID_LEN_MAX: usize = REQUEST_ID_LEN_MAX + 16;
const STOPS_MAX: usize = STOP_TOKENS_MAX + EOS_TOKENS_MAX;

/// What is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {given}; expected {expected}")]
pub struct Invalid {
    pub field: String,
    pub given: String,
    pub expected: String,
}

fn invalid(field: impl Into<String>, given: impl ToString, expected: impl Into<String>) -> Invalid {
    Invalid { field: field.into(), given: given.to_string(), expected: expected.into() }
}

pub fn check(run: RunRequest, config: &Config) -> Result<Submit, Invalid> {
    check_id(&run.request_id)?;
    if run.prompt.is_empty() {
        return Err(invalid("prompt", "is empty", "at least one token"));
    }
    check_tokens("prompt", &run.prompt, config)?;
    let (prompt, max_tokens) = (run.prompt.len(), run.max_tokens as usize);
    let context = config.max_position_embeddings;
    if max_tokens == 0 {
        return Err(invalid("max_tokens", 0, "at least 1"));
    }
    if prompt + max_tokens > context {
        let given = format!("{max_tokens} after a prompt of {prompt}");
        return Err(invalid("max_tokens", given, format!("together at most the context of {context} tokens")));
    }
    if run.stop_token_ids.len() > STOPS_MAX {
        return Err(invalid("stop_token_ids", run.stop_token_ids.len(), format!("at most {STOPS_MAX}")));
    }
    check_tokens("stop_token_ids", &run.stop_token_ids, config)?;
    let emitted: Vec<u32> = run.emitted.iter().map(|info| info.token).collect();
    check_emitted(&emitted, &run.stop_token_ids, max_tokens, config)?;
    Ok(Submit {
        request: Request { prompt: run.prompt, emitted, max_tokens, stop_tokens: run.stop_token_ids },
        emitted: run.emitted.into_iter().map(token).collect(),
        sampling: sampling(run.sampling.unwrap_or_default(), config)?,
        logprobs: logprobs("logprobs", run.logprobs)?,
        prompt_logprobs: logprobs("prompt_logprobs", run.prompt_logprobs)?,
        traceparent: None,
    })
}

fn check_id(id: &str) -> Result<(), Invalid> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    if id.is_empty() || id.len() > ID_LEN_MAX || !id.chars().all(is_allowed) {
        let given = format!("{:?}", id.chars().take(80).collect::<String>());
        return Err(invalid("request_id", given, format!("1 to {ID_LEN_MAX} characters of [A-Za-z0-9._:-]")));
    }
    Ok(())
}

/// A sequence goes on after them.
fn check_emitted(emitted: &[u32], stops: &[u32], max_tokens: usize, config: &Config) -> Result<(), Invalid> {
    check_tokens("emitted", emitted, config)?;
    if emitted.len() >= max_tokens {
        return Err(invalid(
            "emitted",
            format!("{} tokens", emitted.len()),
            format!("fewer than max_tokens, {max_tokens}"),
        ));
    }
    match emitted.iter().position(|token| stops.contains(token)) {
        Some(at) => Err(invalid(format!("emitted[{at}]"), emitted[at], "no stop token: the sequence has ended there")),
        None => Ok(()),
    }
}

fn token(info: TokenInfo) -> Token {
    let top = info.top.into_iter().map(|top| (top.token, top.logprob)).collect();
    Token { token: info.token, logprobs: info.logprob.map(|logprob| Logprobs { logprob, top }) }
}

fn check_tokens(field: &str, tokens: &[u32], config: &Config) -> Result<(), Invalid> {
    match tokens.iter().position(|&token| token as usize >= config.vocab_size) {
        None => Ok(()),
        Some(at) => Err(invalid(format!("{field}[{at}]"), tokens[at], format!("a token below {}", config.vocab_size))),
    }
}

fn logprobs(field: &str, given: Option<u32>) -> Result<Option<usize>, Invalid> {
    match given {
        Some(count) if count > LOGPROBS_MAX => Err(invalid(field, count, format!("at most {LOGPROBS_MAX}"))),
        count => Ok(count.map(|count| count as usize)),
    }
}

fn sampling(s: SamplingParams, config: &Config) -> Result<Sampling, Invalid> {
    let set = |field: &str, given: Option<f32>| {
        given.ok_or_else(|| invalid(format!("sampling.{field}"), "is not set", "a value"))
    };
    let bounded = |field: &str, given: f32, min: f32, max: f32| match (min..=max).contains(&given) {
        true => Ok(given),
        false => Err(invalid(format!("sampling.{field}"), given, format!("{min} to {max}"))),
    };
    let share = |field: &str, given: f32, max: f32| match given > 0.0 && given <= max {
        true => Ok(given),
        false => Err(invalid(format!("sampling.{field}"), given, format!("above 0, at most {max}"))),
    };
    if s.logit_bias.len() > LOGIT_BIAS_MAX {
        return Err(invalid("sampling.logit_bias", s.logit_bias.len(), format!("at most {LOGIT_BIAS_MAX} entries")));
    }
    let mut logit_bias: Vec<(u32, f32)> = s.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|&(token, _)| token);
    for &(token, bias) in &logit_bias {
        check_tokens("sampling.logit_bias", &[token], config)?;
        bounded(&format!("logit_bias[{token}]"), bias, -100.0, 100.0)?;
    }
    Ok(Sampling {
        temperature: bounded("temperature", set("temperature", s.temperature)?, 0.0, 2.0)?,
        top_k: s.top_k as usize,
        top_p: share("top_p", set("top_p", s.top_p)?, 1.0)?,
        min_p: bounded("min_p", s.min_p, 0.0, 1.0)?,
        repetition_penalty: share("repetition_penalty", set("repetition_penalty", s.repetition_penalty)?, 10.0)?,
        presence_penalty: bounded("presence_penalty", s.presence_penalty, -2.0, 2.0)?,
        frequency_penalty: bounded("frequency_penalty", s.frequency_penalty, -2.0, 2.0)?,
        logit_bias,
        seed: s.seed.ok_or_else(|| invalid("sampling.seed", "is not set", "a value"))?,
    })
}

#[cfg(test)]
mod tests;
