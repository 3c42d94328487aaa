//! Limits of messages. Every receiver checks them; a sender that keeps them is never refused for size.

/// Most decoder layers: a layer is one byte of a frame's header.
pub const LAYERS_MAX: usize = 256;
/// Most routed experts of a layer.
pub const EXPERTS_MAX: usize = 4096;
/// Most rows of one dispatch frame.
pub const FRAME_ROWS_MAX: usize = 4096;
/// Largest dispatch frame on the wire: 64 MiB of payload and its framing.
pub const FRAME_BYTES_MAX: usize = (64 << 20) + 4096;
/// Largest message on the public port: bounds what one caller can make the server reserve.
pub const PUBLIC_MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Largest message between coordinator and attention worker: a prompt of token ids, or its log-probabilities.
pub const WORKER_MESSAGE_BYTES_MAX: usize = 64 << 20;

pub const REQUEST_ID_LEN_MAX: usize = 128;
pub const STOP_STRINGS_MAX: usize = 16;
pub const STOP_STRING_BYTES_MAX: usize = 256;
pub const STOP_TOKENS_MAX: usize = 64;
/// Most tokens that end a sequence by the model's own files, beside a request's stop tokens.
pub const EOS_TOKENS_MAX: usize = 16;
pub const LOGPROBS_MAX: u32 = 20;
pub const LOGIT_BIAS_MAX: usize = 1024;
