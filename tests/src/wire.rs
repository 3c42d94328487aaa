//! The real services over a simulated network (turmoil): a cluster of hosts in one thread, each with a clock and a
//! runtime of its own, TCP between them that can be cut, held, slowed and lossy, and processes that can be killed.
//!
//! Real here: coordinators (`Inference` over gRPC, HTTP, journal, routing, leadership, placement), the attention workers'
//! gRPC service, requests and dispatcher, the expert workers' `Experts` service, every codec and every deadline. Played:
//! the two compute threads (by `arithmetic`, in integers, so that any term or token that is lost, doubled, stale or
//! misrouted changes what comes after it) and the registry (the embedded one, with leases that outlive a killed process).

pub mod arithmetic;
pub mod attention;
pub mod callers;
pub mod clients;
pub mod cluster;
pub mod coordinator;
pub mod expert;
pub mod faults;
pub mod net;
pub mod site;
pub mod sse;
