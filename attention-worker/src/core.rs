//! Decisions as plain structs: who owns a page, who runs next, which token is drawn. No clock, no tasks, no randomness.

pub mod batcher;
pub mod pages;
pub mod philox;

pub mod sampler;
