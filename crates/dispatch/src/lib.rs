//! Rows to experts and back: frames, the transports that carry them, and the tracker that knows what is outstanding.
//!
//! Owns everything between an attention worker's gate and the sum of its experts' results. Never computes an expert,
//! never knows a model, and never treats a missing contribution as zero.
//!
//! Reading order: `frame` (what travels), `plan` (which row goes where), `tracker` (what is outstanding),
//! `dispatcher` (the attention worker's side of all this), `combine` (the additions), `local` and `grpc` (the ways
//! there and back).

pub mod frame;

mod plan;

pub mod tracker;

pub mod combine;
pub mod dispatcher;
pub mod grpc;
pub mod local;

pub use combine::CombineOps;
pub use dispatcher::{DispatchConfig, DispatchError, Dispatcher, Pending, Route};
pub use frame::{AnswerFrame, Refusal, RequestFrame, Rows, Shape};
pub use local::{ExpertHost, Hub, ReplySender};
