//! A JSON body, field by field: each getter names the field that is wrong. Null is the same as not given, as OpenAI's
//! clients send it; fields that nobody asks for are ignored.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::core::{ApiError, Params};

/// Fields that would change the answer and are not supported, each with the values that ask for nothing.
const UNSUPPORTED: [&str; 27] = [
    "tools",
    "functions",
    "function_call",
    "tool_choice",
    "response_format",
    "audio",
    "modalities",
    "prediction",
    "web_search_options",
    "suffix",
    "best_of",
    "min_tokens",
    "bad_words",
    "allowed_token_ids",
    "use_beam_search",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "regex",
    "ebnf",
    "json_schema",
    "typical_p",
    "top_a",
    "mirostat",
    "continue_final_message",
];

pub struct Fields(Map<String, Value>);

impl Fields {
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(other) => Err(ApiError::invalid("body", format!("is {}; expected a JSON object", kind(&other)))),
            Err(error) => Err(ApiError::invalid("body", format!("is not JSON: {error}"))),
        }
    }

    pub fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub fn take(&mut self, field: &str) -> Option<Value> {
        self.0.remove(field).filter(|value| !value.is_null())
    }

    pub fn number(&self, field: &str) -> Result<Option<f64>, ApiError> {
        self.read(field, "a number", Value::as_f64)
    }

    pub fn integer(&self, field: &str) -> Result<Option<i64>, ApiError> {
        self.read(field, "an integer", Value::as_i64)
    }

    pub fn boolean(&self, field: &str) -> Result<Option<bool>, ApiError> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub fn string(&self, field: &str) -> Result<Option<String>, ApiError> {
        self.read(field, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub fn object(&self, field: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        self.get(field).map(|value| value.as_object().ok_or_else(|| wrong(field, "an object", value))).transpose()
    }

    /// A string or a list of strings.
    pub fn strings(&self, field: &str) -> Result<Vec<String>, ApiError> {
        let string = |value: &Value| value.as_str().map(str::to_owned);
        let read = self.read(field, "a string or a list of strings", |value| match value {
            Value::Array(items) => items.iter().map(string).collect(),
            other => string(other).map(|one| vec![one]),
        });
        Ok(read?.unwrap_or_default())
    }

    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>, ApiError> {
        Ok(self.read(field, "a list of token ids", as_token_ids)?.unwrap_or_default())
    }

    fn read<T>(&self, field: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong(field, expected, value))
    }

    /// Refuses what would change the answer if it were done.
    pub fn refuse_unsupported(&self) -> Result<(), ApiError> {
        match UNSUPPORTED.iter().find(|field| self.get(field).is_some_and(|value| !asks_for_nothing(field, value))) {
            Some(field) => Err(ApiError::invalid(*field, "is not supported by this server")),
            None => Ok(()),
        }
    }

    /// The parameters that chat and plain completions share.
    pub fn params(&self) -> Result<Params, ApiError> {
        let newer = self.integer("max_completion_tokens")?;
        Ok(Params {
            temperature: self.number("temperature")?,
            top_k: self.integer("top_k")?,
            top_p: self.number("top_p")?,
            min_p: self.number("min_p")?,
            repetition_penalty: self.number("repetition_penalty")?,
            presence_penalty: self.number("presence_penalty")?,
            frequency_penalty: self.number("frequency_penalty")?,
            logit_bias: self.logit_bias()?,
            seed: self.read("seed", "an integer", |v| v.as_u64().or_else(|| v.as_i64().map(|seed| seed as u64)))?,
            max_tokens: newer.or(self.integer("max_tokens")?),
            stop: self.strings("stop")?,
            stop_token_ids: self.token_ids("stop_token_ids")?,
            ignore_eos: self.boolean("ignore_eos")?.unwrap_or(false),
            logprobs: None,
            prompt_logprobs: self.integer("prompt_logprobs")?,
        })
    }

    fn logit_bias(&self) -> Result<BTreeMap<u32, f64>, ApiError> {
        let expected = "an object of token ids and numbers";
        let read = self.read("logit_bias", expected, |value| {
            value.as_object()?.iter().map(|(id, bias)| Some((id.parse().ok()?, bias.as_f64()?))).collect()
        });
        Ok(read?.unwrap_or_default())
    }

    /// 1 to `most` choices for each prompt.
    pub fn choices(&self, most: i64) -> Result<u32, ApiError> {
        match self.integer("n")?.unwrap_or(1) {
            n if (1..=most).contains(&n) => Ok(n as u32),
            n => Err(ApiError::invalid("n", format!("is {n}; expected 1 to {most}"))),
        }
    }

    /// Whether to stream, and whether to end the stream with usage.
    pub fn streaming(&self) -> Result<(bool, bool), ApiError> {
        let stream = self.boolean("stream")?.unwrap_or(false);
        let Some(options) = self.object("stream_options")? else { return Ok((stream, false)) };
        if !stream {
            return Err(ApiError::invalid("stream_options", "is only for streams; set stream to true"));
        }
        match options.get("include_usage") {
            None | Some(Value::Null) => Ok((stream, false)),
            Some(Value::Bool(usage)) => Ok((stream, *usage)),
            Some(other) => Err(wrong("stream_options.include_usage", "true or false", other)),
        }
    }
}

pub fn as_token_ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

pub fn wrong(field: impl Into<String>, expected: &str, value: &Value) -> ApiError {
    ApiError::invalid(field, format!("is {}; expected {expected}", kind(value)))
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

fn asks_for_nothing(field: &str, value: &Value) -> bool {
    match (field, value) {
        ("response_format", Value::Object(format)) => format.get("type").is_some_and(|kind| kind == "text"),
        ("tool_choice" | "function_call", Value::String(choice)) => choice == "none" || choice == "auto",
        ("modalities", Value::Array(kinds)) => kinds.iter().all(|kind| kind == "text"),
        ("best_of" | "typical_p", Value::Number(n)) => n.as_f64() == Some(1.0),
        (_, Value::Bool(wanted)) => !wanted,
        (_, Value::Number(n)) => n.as_f64() == Some(0.0),
        (_, Value::String(text)) => text.is_empty(),
        (_, Value::Array(items)) => items.is_empty(),
        (_, Value::Object(fields)) => fields.is_empty(),
        (_, Value::Null) => true,
    }
}
