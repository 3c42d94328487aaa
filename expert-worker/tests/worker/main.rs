//! Whole expert workers, with a registry and an attention worker's dispatcher in this process.
#![allow(clippy::unwrap_used)]

mod answers;
mod harness;
mod life;
