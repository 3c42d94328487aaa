//! Arithmetic on slices: the operations a DeepSeek-style decoder needs, and nothing that knows a model by name.
#![allow(unsafe_code)]

mod attend;
mod backend;
mod combine;
pub mod cuda;
mod draw;
mod experts;
mod fp8;
mod gate;
mod linear;
mod math;
mod matrix;
mod norm;
mod numerics;
mod pages;
mod per_head;
mod pool;
#[cfg(test)]
mod reference;
mod roof;
mod rope;
#[cfg(test)]
mod samples;
mod simd;
mod softmax;

pub use attend::{Expand, Query, Span, mla_attend, mla_attend_expanded};
pub use backend::Backend;
pub use combine::{add, combine_first, combine_next};
pub use draw::{Draw, Edit, best_first, draw};
pub use experts::{Ffn, grouped_experts};
pub use fp8::{e4m3_to_f32, f32_to_e4m3};
pub use gate::{Choice, GateParams, GroupScore, Scoring, route};
pub use half::{bf16, f16};
pub use linear::{Linear, RowsRef, UnfitBytes, int8_bytes};
pub use matrix::{Matrix, MatrixData};
pub use norm::rms_norm;
pub use numerics::{Dtype, DtypeChoice, Numerics, UnknownDtype};
pub use pages::{LatentPages, PAGE_TOKENS};
pub use per_head::PerHead;
pub use pool::Pool;
pub use roof::Roof;
pub use rope::{RopeParams, RopeTable, Yarn, softmax_scale};
pub use softmax::{log_softmax, softmax};
