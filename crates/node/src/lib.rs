//! Being a member of the cluster: typed config, the registry with its leases and watches, connections to peers with
//! TLS and the handshake, who may call what, a gRPC server with health and reflection, graceful stop, logs and traces. Knows no tensors and no requests.

pub mod accept;
pub mod access;
pub mod config;
pub mod connect;
pub mod handshake;
pub mod http;
pub mod identity;
pub mod membership;
pub mod metrics;
pub mod program;
pub mod registry;
pub mod reload;
pub mod server;
pub mod stop;
pub mod telemetry;
pub mod tls;
pub mod trace;
pub mod vitals;

pub use connect::{Connector, Peer};
pub use handshake::Mismatch;
pub use identity::Identity;
pub use membership::{MemberSettings, Membership};
pub use registry::{Leader, Member, Registration, Registry, RegistryError, View};
pub use tls::Tls;
