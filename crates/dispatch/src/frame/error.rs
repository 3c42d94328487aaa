//! Why a received frame is none.

use moesaic_proto::limits::FRAME_ROWS_MAX;

use super::Header;

/// What is wrong with a received frame.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FrameError {
    #[error("header: {len} bytes; expected {}", Header::LEN)]
    Header { len: usize },
    #[error("header: flags are {flags:#06x}; expected {expected}")]
    Flags { flags: u16, expected: &'static str },
    #[error("header: slot is {slot}; expected 0 on this transport")]
    Slot { slot: u16 },
    #[error("header: source is {given}; this stream's is {expected}")]
    Source { given: u16, expected: u16 },
    #[error("rows: {len} bytes; expected 1 to {FRAME_ROWS_MAX} rows of {row_bytes} bytes")]
    Rows { len: usize, row_bytes: usize },
    #[error("{field}: {len} bytes; expected a multiple of {entry}")]
    Table { field: &'static str, len: usize, entry: usize },
    #[error("outputs: {count}; expected 1 to {limit}, so that the answer fits a frame")]
    OutputCount { count: usize, limit: usize },
    #[error("outputs[{index}]: row {row} of a frame with {rows} rows")]
    OutputRow { index: usize, row: u16, rows: usize },
    #[error("outputs[{index}]: {count} terms of {left} that are left; expected at least 1, and 1 if not weighted")]
    OutputTerms { index: usize, count: usize, left: usize },
    #[error("terms: {left} belong to no output")]
    TermsLeft { left: usize },
    #[error("outputs[{output}]: expert {expert}; the model has {experts} a layer")]
    Expert { output: usize, expert: u16, experts: usize },
    #[error("outputs[{output}]: expert {expert} after expert {after}; experts must ascend")]
    ExpertOrder { output: usize, expert: u16, after: u16 },
    #[error("outputs[{output}]: a term's reserved bytes are {value:#06x}; expected 0")]
    TermReserved { output: usize, value: u16 },
    #[error("outputs[{output}]: expert {expert} has weight {weight}; expected a finite number")]
    Weight { output: usize, expert: u16, weight: f32 },
    #[error("choices: top_k is {top_k}, of {rows} rows with {terms} terms; expected as many terms for each row")]
    Choices { terms: usize, rows: usize, top_k: usize },
    #[error("outputs: {outputs} beside choices; expected none")]
    Both { outputs: usize },
    #[error("choices.experts: {len} bytes; expected {expected}, a bit for each expert of a layer")]
    Asked { len: usize, expected: usize },
    #[error("choices.group_size is 0; expected the experts of a logical group")]
    GroupSize,
}
