//! The decisions: which frames are taken, which are computed together, what is added to what, which placements are
//! served, and when the worker may go. Plain structs: no clock, no threads, no arithmetic on activations.

pub mod batch;
pub mod epochs;
pub mod handover;
pub mod inbox;
