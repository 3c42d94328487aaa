//! Rows to experts and back: frames, the transports that carry them, and the tracker that knows what is outstanding.
//!
//! Owns everything between an attention worker's gate and the sum of its experts' results. Never computes an expert,
//! never knows a model, and never treats a missing contribution as zero.
//!
//! Reading order: `dispatcher` (the attention worker's side, the main path), `plan` (which row goes where and how the
//! answers are added up), `tracker` (what is outstanding), `frame`, `payload` and `shared` (what travels), `local` and `grpc`
//! (the ways there and back), `nccl` (a second way beside `grpc`'s). `combine` and `error` are a few words that the others share.

pub mod dispatcher;
pub mod plan;
pub mod tracker;

pub mod frame;
pub mod payload;
pub mod shared;

pub mod local;

pub mod grpc;
pub mod nccl;

pub mod combine;
pub mod error;

#[cfg(test)]
mod fake;

pub use combine::CombineOps;
pub use dispatcher::{Addends, Ahead, DispatchConfig, Dispatcher, Holder, LayerCall, Pending, Route};
pub use error::{Cause, DispatchError};
pub use frame::{Activations, AnswerFrame, FrameError, Refusal, RequestFrame, Rows, Shape};
pub use local::{ExpertHost, Hub, ReplySender};
pub use payload::{Payload, Values};
pub use shared::Shared;
