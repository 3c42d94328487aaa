//! What travels.
use half::bf16;
use moesaic_proto::v1::RefusalReason;

/// A micro-batch's activations, row-major, in the compute dtype.
#[derive(Clone, Debug)]
pub enum Rows {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}
/// What a frame must fit: sizes of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub hidden: usize,
    pub experts: usize,
}
pub struct RequestFrame;
pub struct AnswerFrame;
/// Why a worker computed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason:?}: {detail}")]
pub struct Refusal {
    pub reason: RefusalReason,
    pub detail: String,
}
