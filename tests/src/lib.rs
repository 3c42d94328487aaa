//! What the tests of whole clusters share: a cluster of the roles' libraries in this process, a client of its public
//! gRPC service, and the fixtures with what transformers answered for them.
#![allow(clippy::unwrap_used)]

pub mod cluster;
pub mod faults;
pub mod fixtures;
pub mod fuzz;
pub mod parity;
pub mod processes;
pub mod requests;
pub mod secured;
pub mod sim;
pub mod wire;
