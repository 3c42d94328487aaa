//! The decisions: which frames are taken, which are computed together, and what is added to what. Plain structs: no
//! clock, no threads, no arithmetic on activations.

pub mod batch;
pub mod inbox;
