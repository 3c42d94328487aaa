//! Owns experts: loads its shard of the routed experts, groups the rows of all callers by expert, answers. Stateless:
//! it keeps nothing of a request once it has answered.
//!
//! Reading order: `shell` (a worker's life), `engine` (the compute thread), `core` (what waits, what is computed
//! together), `experts` (where it is computed), `shard` (what is held), `config`.

#![forbid(unsafe_code)]

pub mod config;
pub mod core;
pub mod engine;
pub mod experts;
pub mod shard;
pub mod shell;
pub mod vitals;

pub use config::Config;
pub use shell::{Context, run, start};
