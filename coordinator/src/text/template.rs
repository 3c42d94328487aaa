//! The checkpoint's chat template: a conversation to the prompt that the model was trained on.
//!
//! Owns the template and the helpers that Hugging Face gives to templates. Bounds what a template may compute and write.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter};

use super::read_bounded;
use crate::core::error::shortened;

/// Template instructions for one conversation; a message takes some dozens.
const FUEL: u64 = 5_000_000;
/// Largest file that has a template: some list every token that was added.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a rendered conversation: twice the largest request.
const OUTPUT_BYTES_MAX: usize = 8 << 20;
const INDENT_MAX: usize = 16;
const NAME: &str = "chat_template";

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("cannot read {}: {reason}", path.display())]
    Read { path: PathBuf, reason: String },
    #[error("{}: {reason}", path.display())]
    Parse { path: PathBuf, reason: String },
    /// Broken for every conversation: found at start.
    #[error("{place}: the chat template is broken: {reason}")]
    Broken { place: String, reason: String },
    /// The template does not take this conversation.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
}

/// One message as the template sees it.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The folder's template: `chat_template.jinja`, else the field of `tokenizer_config.json` (a string, or a list of
    /// named ones of which "default" counts). None if there is none; an error if it can never work.
    pub fn open(dir: &Path) -> Result<Option<Self>, TemplateError> {
        let (path, jinja) = (dir.join("tokenizer_config.json"), dir.join("chat_template.jinja"));
        let read = |path: &Path| {
            read_bounded(path, FILE_BYTES_MAX)
                .and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other))
                .map_err(|e| TemplateError::Read { path: path.to_owned(), reason: e.to_string() })
        };
        let config: Json = if path.exists() {
            let broken =
                |e: serde_json::Error| TemplateError::Parse { path: path.clone(), reason: shortened(&e.to_string()) };
            serde_json::from_str(&read(&path)?).map_err(broken)?
        } else {
            Json::Null
        };
        let (source, place) = if jinja.exists() {
            (Some(read(&jinja)?), jinja.display().to_string())
        } else {
            let place = format!("{}: field chat_template", path.display());
            (named_template(&config["chat_template"], &place)?, place)
        };
        let Some(source) = source else { return Ok(None) };
        let template = Self::new(source, token(&config["bos_token"]), token(&config["eos_token"]));
        let template = template.map_err(|e| TemplateError::Broken { place: place.clone(), reason: chain(&e) })?;
        template.try_out(&place)?;
        Ok(Some(template))
    }

    fn new(source: String, bos_token: String, eos_token: String) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, source)?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The prompt, ready for the assistant's turn. `extra` are the caller's own variables; they hide nothing of ours.
    pub fn render(&self, messages: &[Message], extra: &serde_json::Map<String, Json>) -> Result<String, TemplateError> {
        self.render_json(messages, extra).map_err(|e| TemplateError::Refused(chain(&e)))
    }

    fn render_json(&self, messages: &[Message], extra: &serde_json::Map<String, Json>) -> Result<String, Error> {
        let ours = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", true.into()),
            ("bos_token", self.bos_token.as_str().into()),
            ("eos_token", self.eos_token.as_str().into()),
            ("tools", ().into()),
        ];
        let theirs = extra.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let context: BTreeMap<String, Value> =
            theirs.chain(ours).map(|(name, value)| (name.to_owned(), value)).collect();
        let mut output = Bounded(Vec::new());
        self.environment.get_template(NAME)?.render_captured_to(context, &mut output)?;
        String::from_utf8(output.0).map_err(|e| Error::new(ErrorKind::WriteFailure, e.to_string()))
    }

    /// One turn through the template finds what the parser cannot see: unknown filters, functions, endless loops.
    fn try_out(&self, place: &str) -> Result<(), TemplateError> {
        let message = Message { role: "user".into(), content: "Hello".into(), name: None, reasoning_content: None };
        match self.render_json(&[message], &serde_json::Map::new()) {
            Ok(_) => Ok(()),
            // The template works and has wishes of its own.
            Err(e) if e.detail().is_some_and(|detail| detail.starts_with(RAISED)) => Ok(()),
            Err(e) => Err(TemplateError::Broken { place: place.to_owned(), reason: chain(&e) }),
        }
    }
}

fn named_template(field: &Json, place: &str) -> Result<Option<String>, TemplateError> {
    let broken = |reason: &str| Err(TemplateError::Broken { place: place.to_owned(), reason: reason.to_owned() });
    match field {
        Json::Null => Ok(None),
        Json::String(source) => Ok(Some(source.clone())),
        Json::Array(list) => match list.iter().find(|t| t["name"] == "default").or(list.first()) {
            Some(entry) if entry["template"].is_string() => Ok(entry["template"].as_str().map(str::to_owned)),
            _ => broken("expected a list of {name, template}"),
        },
        _ => broken("expected a string or a list of {name, template}"),
    }
}

/// A special token: a string, or an object with its content.
fn token(field: &Json) -> String {
    field.as_str().or(field["content"].as_str()).unwrap_or_default().to_owned()
}

const RAISED: &str = "raised: ";

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

/// The present time (UTC) in a format of strftime.
fn strftime_now(state: &State, format: String) -> Result<String, Error> {
    let options = Kwargs::from_iter([("format", Value::from(format))]);
    minijinja_contrib::filters::datetimeformat(state, minijinja_contrib::globals::now(), options)
}

/// As Python's json.dumps writes it, which models were trained on (the built-in one escapes HTML).
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, OneLine)),
        Some(width) => {
            let indent = " ".repeat(width.min(INDENT_MAX));
            value.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(indent.as_bytes())))
        }
    };
    let failed = |reason: String| Error::new(ErrorKind::BadSerialization, reason);
    written.map_err(|e| failed(e.to_string()))?;
    String::from_utf8(out).map_err(|e| failed(e.to_string()))
}

/// `{"a": 1, "b": [2, 3]}`
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

fn chain(error: &Error) -> String {
    // Display has the kind, the detail and the line; sources add what a helper said.
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Refuses to grow past the limit.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other(format!("the prompt has more than {OUTPUT_BYTES_MAX} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
