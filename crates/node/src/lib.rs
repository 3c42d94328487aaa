//! Being a member of the cluster: typed config, the registry with its leases and watches, connections to peers and the
//! handshake, a gRPC server with health and reflection, graceful stop and telemetry. Knows no tensors and no requests.

pub mod config;
pub mod connect;
pub mod handshake;
pub mod registry;
pub mod server;
pub mod stop;
pub mod telemetry;

pub use connect::Connector;
pub use handshake::Mismatch;
pub use registry::{Leader, Member, Registration, Registry, RegistryError, View};
