//! Compute: the decoder over a model's layers, their arithmetic on this processor or a GPU, and the thread that runs
//! micro-batches.

pub mod arithmetic;
pub mod cpu;
pub mod decoder;
pub mod events;
pub mod expert_counts;
pub mod gpu;
pub mod handle;
pub mod memory;
pub mod profile;
pub mod thread;
pub mod weights;
