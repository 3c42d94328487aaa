//! The front door and the mind of a cluster: gRPC and OpenAI-compatible HTTP on one port, text to tokens and back,
//! admission, routing to attention workers, sequences that outlive them, leadership and the placement of experts. Does no
//! tensor maths.
//!
//! Reading order: `shell::run` (a coordinator's life), `shell::service` (one request's way), `core` (the decisions, as
//! plain structs), `text` (tokens and characters), `shell::http` and `shell::grpc` (what clients see).

#![forbid(unsafe_code)]

pub mod config;
pub mod core;
pub mod model;
pub mod shell;
pub mod text;

pub use config::Config;
pub use shell::run::{Context, Coordinator, run, start};
