//! Owns sequences: the MLA layers, the latent cache, batching, dense and shared experts, head and sampler. All state of
//! a request lives here; it holds no routed expert and knows no client.
//!
//! Reading order: `shell` (a worker's life and its gRPC service), `engine` (the compute thread and the decoder), `core`
//! (pages, batching, sampling), `config`.

pub mod config;
pub mod core;
pub mod engine;
pub mod shell;

pub use config::Config;
pub use shell::run::{Context, run, start};
