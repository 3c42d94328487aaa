//! The command line: `up` runs a whole cluster, `chat` talks to one, the roles run one node each, `inspect`,
//! `pack` and `quantize` work on checkpoints, `status` and `drain` are for operators. Owns arguments, what is printed and exit codes; decides nothing of a cluster's work.
//!
//! Reading order: `cli`, `up` (a cluster's life), `node` (what runs in it), `here` and `processes` (the two ways to run
//! it), `plan` (what is printed before), `roles`, `server` (where commands find a coordinator),
//! `chat`, `operate`, `certs`, `key`, `checkpoint`, `bench`, `etcd`.

#![forbid(unsafe_code)]

pub mod bench;
pub mod certs;
mod chat;
mod checkpoint;
mod cli;
mod etcd;
mod here;
mod key;
mod node;
mod operate;
mod plan;
mod processes;
mod reference;
mod roles;
mod server;
mod up;

pub use cli::main;
