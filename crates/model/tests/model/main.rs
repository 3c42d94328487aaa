//! The crate from outside: parity with the references, and files that lie.
#![allow(clippy::unwrap_used)]

mod support;

mod config;
mod hostile;
mod inspect;
mod load;
mod packed;
mod parity;
mod quantize;
mod reading;
mod shards;
mod synth;
