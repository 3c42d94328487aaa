//! The wire: what nodes and clients say to each other, and the checks that turn a message into a valid value.
//!
//! Owns the `.proto` files, the generated code, the newtypes for ids and the limits of messages. Does no I/O.

pub mod ids;
pub mod limits;
pub mod placement;

/// Generated from `proto/moesaic/v1/*.proto`.
#[allow(clippy::large_enum_variant)]
pub mod v1 {
    tonic::include_proto!("moesaic.v1");
}

pub use ids::{Epoch, ExpertId, LayerId, WorkerId};
pub use placement::{Placement, PlacementError};

/// All of the above as a descriptor set, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Grows with every change that an older node would misread. Compared by the handshake.
pub const PROTOCOL_VERSION: u32 = 2;
