//! A coordinator as its clients see it: on a real port, in front of attention workers that follow a script.
#![allow(clippy::unwrap_used)]

mod cluster;
mod errors;
mod grpc;
mod http;
mod large;
mod leader;
mod lifecycle;
mod recovery;
