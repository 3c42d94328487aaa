//! What is fuzzed: every parser of bytes that somebody else made, as a plain function of those bytes.
//!
//! A target decodes its input with the product's own parser, by the way that a peer, a client or a file takes, and panics
//! where a promise is broken: a panic inside, a value that breaks its own rules, a value that does not come back as it
//! was, an allocation that the input's size does not bound, an error without words or with too many.
//!
//! `tests/fuzz/run` drives them with libFuzzer; `tests/tests/corpus.rs` replays `tests/fuzz/corpus` in every test run.

mod checkpoint;
mod checks;
mod frames;
mod http;
mod records;
mod requests;
mod roles;
pub mod seeds;
mod text;

use std::path::{Path, PathBuf};

pub type Target = fn(&[u8]);

/// By name; each has a folder of its name in `corpus`.
pub const TARGETS: &[(&str, Target)] = &[
    ("request_frame", frames::request_frame),
    ("answer_frame", frames::answer_frame),
    ("exchange", frames::exchange),
    ("slot", frames::slot),
    ("experts", frames::experts),
    ("placement", records::placement),
    ("registry", records::registry),
    ("generate_request", requests::generate_request),
    ("run_request", requests::run_request),
    ("run_events", requests::run_events),
    ("grpc", requests::grpc),
    ("http", http::http),
    ("last_event_id", http::last_event_id),
    ("config_json", checkpoint::config_json),
    ("safetensors", checkpoint::safetensors),
    ("safetensors_header", checkpoint::safetensors_header),
    ("index_json", checkpoint::index_json),
    ("packed", checkpoint::packed),
    ("tokenizer", text::tokenizer),
    ("tokenizer_config", text::tokenizer_config),
    ("chat_template", text::chat_template),
    ("generation_config", text::generation_config),
    ("stream", text::stream),
    ("role_config", roles::role_config),
];

pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}

/// The committed inputs, one folder a target.
pub fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}
