//! The command line: `up` runs a whole cluster, `chat` talks to one, the roles run one node each, `inspect`,
//! `pack` and `quantize` work on checkpoints, `status` and `drain` are for operators. Owns arguments, what is printed and exit codes; decides nothing of a cluster's work.
//!
//! Reading order: `cli`, `up` (a cluster's life), `node` (what runs in it), `here` and `processes` (the two ways to run
//! it), `plan` (what is printed before), `roles`, `chat`, `operate`, `checkpoint`, `bench`, `etcd`.

#![forbid(unsafe_code)]

mod bench;
mod chat;
mod checkpoint;
mod cli;
mod etcd;
mod here;
mod node;
mod operate;
mod plan;
mod processes;
mod roles;
mod up;

pub use cli::main;
