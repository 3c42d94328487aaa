//! What a client asks for, checked once for both front doors: every limit, every default.

use std::collections::BTreeMap;

use moesaic_proto::limits;
use moesaic_proto::v1::{RunRequest, SamplingParams};

use super::ApiError;
use crate::model::Model;

/// Parameters as they were given, in types wide enough to hold a wrong value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params {
    pub temperature: Option<f64>,
    /// 0 or -1 keeps all.
    pub top_k: Option<i64>,
    pub top_p: Option<f64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: BTreeMap<u32, f64>,
    pub seed: Option<u64>,
    pub max_tokens: Option<i64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub logprobs: Option<i64>,
    pub prompt_logprobs: Option<i64>,
}

/// A sequence that can run: everything set, everything within its limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Every optional field is set but the seed.
    pub sampling: SamplingParams,
    pub max_tokens: u32,
    pub stop: Vec<String>,
    /// The caller's.
    pub stop_token_ids: Vec<u32>,
    /// The model's, unless ignored.
    pub eos: Vec<u32>,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
}

impl Request {
    /// As a worker is asked for it.
    pub fn into_run(self, request_id: String, seed: u64) -> RunRequest {
        RunRequest {
            request_id,
            prompt: self.prompt,
            sampling: Some(SamplingParams { seed: Some(seed), ..self.sampling }),
            max_tokens: self.max_tokens,
            stop_token_ids: self.stop_token_ids.into_iter().chain(self.eos).collect(),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            ..RunRequest::default()
        }
    }
}

impl Params {
    /// Checks everything that does not need the prompt: so that a wrong value costs no tokenising.
    pub fn check(&self, model: &Model) -> Result<(), ApiError> {
        self.sampling(model)?;
        if let Some(given) = self.max_tokens.filter(|n| *n < 1) {
            return Err(ApiError::invalid("max_tokens", format!("is {given}; expected at least 1")));
        }
        for (field, given) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            integer(field, given.unwrap_or(0), 0, i64::from(limits::LOGPROBS_MAX))?;
        }
        count("stop", self.stop.len(), limits::STOP_STRINGS_MAX)?;
        if let Some((i, stop)) =
            self.stop.iter().enumerate().find(|(_, s)| s.is_empty() || s.len() > limits::STOP_STRING_BYTES_MAX)
        {
            let (given, most) = (stop.len(), limits::STOP_STRING_BYTES_MAX);
            return Err(ApiError::invalid("stop", format!("string {i} has {given} bytes; expected 1 to {most}")));
        }
        count("stop_token_ids", self.stop_token_ids.len(), limits::STOP_TOKENS_MAX)?;
        token_ids("stop_token_ids", &self.stop_token_ids, model)
    }

    /// The sequence for a prompt. `cache_max` are the tokens that the largest worker's cache holds, if known.
    pub fn request(&self, prompt: Vec<u32>, model: &Model, cache_max: Option<usize>) -> Result<Request, ApiError> {
        self.check(model)?;
        if prompt.is_empty() {
            return Err(ApiError::invalid("prompt", "is empty; expected at least 1 token"));
        }
        token_ids("prompt", &prompt, model)?;
        let max_tokens = self.room(prompt.len(), model.context_max, cache_max)?;
        Ok(Request {
            sampling: self.sampling(model)?,
            max_tokens: max_tokens as u32,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            eos: if self.ignore_eos { Vec::new() } else { model.eos.clone() },
            logprobs: self.logprobs.map(|n| n as u32),
            prompt_logprobs: self.prompt_logprobs.map(|n| n as u32),
            prompt,
        })
    }

    /// Tokens that may be generated: what was asked for, or all that fit.
    fn room(&self, prompt: usize, context: usize, cache_max: Option<usize>) -> Result<usize, ApiError> {
        let asked = self.max_tokens.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let needed = prompt.saturating_add(asked.unwrap_or(1));
        if needed > context {
            let max_tokens = asked.filter(|_| prompt < context);
            return Err(ApiError::ContextLength { context, prompt, max_tokens });
        }
        match cache_max {
            Some(capacity) if needed > capacity => {
                Err(ApiError::CacheSize { needed, capacity, generated: asked.is_some() })
            }
            _ => Ok(asked.unwrap_or(context.min(cache_max.unwrap_or(context)) - prompt)),
        }
    }

    fn sampling(&self, model: &Model) -> Result<SamplingParams, ApiError> {
        let defaults = &model.defaults;
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            given => integer("top_k", given, 0, i64::from(u32::MAX))? as u32,
        };
        count("logit_bias", self.logit_bias.len(), limits::LOGIT_BIAS_MAX)?;
        let mut logit_bias = std::collections::HashMap::with_capacity(self.logit_bias.len());
        for (&id, &bias) in &self.logit_bias {
            token_ids("logit_bias", &[id], model)?;
            logit_bias.insert(id, number("logit_bias", Some(bias), 0.0, -100.0, 100.0)?);
        }
        let above_zero = f64::from(f32::MIN_POSITIVE);
        Ok(SamplingParams {
            temperature: Some(number("temperature", self.temperature, defaults.temperature, 0.0, 2.0)?),
            top_k,
            top_p: Some(number("top_p", self.top_p, defaults.top_p, above_zero, 1.0)?),
            min_p: number("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            repetition_penalty: Some(number("repetition_penalty", self.repetition_penalty, 1.0, above_zero, 10.0)?),
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            logit_bias,
            seed: self.seed,
        })
    }
}

/// The seed of one of several choices: the request's own for the first; for choice i it is mixed with i (SplitMix64),
/// so that the same request gives the same choices, and a choice does not depend on how many there are.
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(u64::from(choice).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Takes 1 to 128 characters of `[A-Za-z0-9._:-]`.
pub fn check_request_id(id: &str) -> Result<(), ApiError> {
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '-');
    if id.is_empty() || id.len() > limits::REQUEST_ID_LEN_MAX || !id.chars().all(valid) {
        let reason = format!("expected 1 to {} characters of A-Z, a-z, 0-9 and . _ : -", limits::REQUEST_ID_LEN_MAX);
        return Err(ApiError::invalid("request_id", reason));
    }
    Ok(())
}

fn number(field: &str, given: Option<f64>, default: f32, low: f64, high: f64) -> Result<f32, ApiError> {
    match given {
        None => Ok(default),
        Some(value) if (low..=high).contains(&value) => Ok(value as f32),
        Some(value) if low == f64::from(f32::MIN_POSITIVE) => {
            Err(ApiError::invalid(field, format!("is {value}; expected above 0, at most {high}")))
        }
        Some(value) => Err(ApiError::invalid(field, format!("is {value}; expected {low} to {high}"))),
    }
}

fn integer(field: &str, given: i64, low: i64, high: i64) -> Result<i64, ApiError> {
    if (low..=high).contains(&given) {
        return Ok(given);
    }
    Err(ApiError::invalid(field, format!("is {given}; expected {low} to {high}")))
}

fn count(field: &str, given: usize, most: usize) -> Result<(), ApiError> {
    if given <= most {
        return Ok(());
    }
    Err(ApiError::invalid(field, format!("has {given} entries; at most {most}")))
}

fn token_ids(field: &str, ids: &[u32], model: &Model) -> Result<(), ApiError> {
    match ids.iter().find(|id| **id >= model.vocabulary) {
        None => Ok(()),
        Some(id) => {
            Err(ApiError::invalid(field, format!("token id {id} is not below the vocabulary's {}", model.vocabulary)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::fixtures::folder;

    fn model() -> Model {
        Model::open(&folder(), None).unwrap()
    }

    #[test]
    fn what_is_not_given_is_set() {
        let request = Params::default().request(vec![5; 96], &model(), None).unwrap();
        assert_eq!(request.max_tokens, 4000);
        assert_eq!(request.eos, [1]);
        let sampling = &request.sampling;
        assert_eq!(
            (sampling.temperature, sampling.top_p, sampling.repetition_penalty),
            (Some(1.0), Some(1.0), Some(1.0))
        );
        let ignore = Params { ignore_eos: true, ..Params::default() };
        let request = ignore.request(vec![5; 96], &model(), Some(640)).unwrap();
        assert_eq!((request.max_tokens, request.eos.len()), (544, 0), "ends with the cache if that is smaller");
    }

    #[test]
    fn a_wrong_value_is_named_with_its_limits() {
        let p = Params::default;
        let table = [
            (Params { temperature: Some(-0.5), ..p() }, "temperature: is -0.5; expected 0 to 2"),
            (Params { temperature: Some(f64::NAN), ..p() }, "temperature: is NaN; expected 0 to 2"),
            (Params { temperature: Some(f64::INFINITY), ..p() }, "temperature: is inf; expected 0 to 2"),
            (Params { top_p: Some(0.0), ..p() }, "top_p: is 0; expected above 0, at most 1"),
            (Params { min_p: Some(1.5), ..p() }, "min_p: is 1.5; expected 0 to 1"),
            (Params { top_k: Some(-2), ..p() }, "top_k: is -2; expected 0 to 4294967295"),
            (
                Params { repetition_penalty: Some(-1.0), ..p() },
                "repetition_penalty: is -1; expected above 0, at most 10",
            ),
            (Params { presence_penalty: Some(3.0), ..p() }, "presence_penalty: is 3; expected -2 to 2"),
            (Params { frequency_penalty: Some(-3.0), ..p() }, "frequency_penalty: is -3; expected -2 to 2"),
            (
                Params { logit_bias: [(288, 1.0)].into(), ..p() },
                "logit_bias: token id 288 is not below the vocabulary's 288",
            ),
            (Params { logit_bias: [(1, 101.0)].into(), ..p() }, "logit_bias: is 101; expected -100 to 100"),
            (Params { max_tokens: Some(0), ..p() }, "max_tokens: is 0; expected at least 1"),
            (Params { max_tokens: Some(-1), ..p() }, "max_tokens: is -1; expected at least 1"),
            (Params { logprobs: Some(21), ..p() }, "logprobs: is 21; expected 0 to 20"),
            (Params { prompt_logprobs: Some(-1), ..p() }, "prompt_logprobs: is -1; expected 0 to 20"),
            (Params { stop: vec!["".into()], ..p() }, "stop: string 0 has 0 bytes; expected 1 to 256"),
            (Params { stop: vec!["x".into(); 17], ..p() }, "stop: has 17 entries; at most 16"),
            (
                Params { stop_token_ids: vec![999], ..p() },
                "stop_token_ids: token id 999 is not below the vocabulary's 288",
            ),
        ];
        for (params, expected) in table {
            assert_eq!(params.check(&model()).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let p = Params::default;
        let table = [
            (p(), 4096, None, "at most 4096 tokens, and the prompt has 4096. Shorten the prompt."),
            (
                Params { max_tokens: Some(i64::MAX), ..p() },
                9,
                None,
                "the prompt has 9 and max_tokens asks for 9223372036854775807 more",
            ),
            (p(), 640, Some(640), "needs 641 tokens of cache, and the largest attention worker has 640"),
            (p(), 0, None, "prompt: is empty"),
        ];
        for (params, prompt, cache, expected) in table {
            let error = params.request(vec![5; prompt], &model(), cache).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
        let error = p().request(vec![5, 288], &model(), None).unwrap_err().to_string();
        assert_eq!(error, "prompt: token id 288 is not below the vocabulary's 288");
    }

    #[test]
    fn choices_have_seeds_of_their_own() {
        assert_eq!(choice_seed(7, 0), 7);
        let mut seeds: Vec<_> = (0..64).map(|i| choice_seed(7, i)).collect();
        assert_eq!(choice_seed(7, 1), seeds[1]);
        seeds.sort();
        seeds.dedup();
        assert_eq!(seeds.len(), 64);
    }
}
