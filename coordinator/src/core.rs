//! The decisions, as plain structs: what is a valid request, who may run, which worker takes it, which expert goes
//! where, what a client sees of the tokens. No tasks, no clock, no randomness, no I/O.

pub mod admission;
pub mod board;
pub mod error;
pub mod expert_load;
pub mod exposure;
pub mod journal;
pub mod keys;
pub mod leader;
pub mod output;
pub mod placement;
pub mod request;
pub mod routing;

pub use admission::Admission;
pub use error::ApiError;
pub use output::{Delta, Ending, Output};
pub use request::{Params, Request};
pub use routing::Router;
