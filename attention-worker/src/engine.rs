//! Compute: the attention side's weights, the decoder over its layers, and the thread that runs micro-batches.

pub mod decoder;
pub mod events;
pub mod expert_counts;
pub mod handle;
pub mod memory;
pub mod profile;
pub mod thread;
pub mod weights;
