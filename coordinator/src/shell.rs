//! Tasks, sockets and services around the core.

pub mod access;
pub mod admin;
pub mod dashboard;
pub mod figures;
pub mod generation;
pub mod grpc;
pub mod http;
pub mod leader;
pub mod run;
pub mod seats;
pub mod service;
pub mod vitals;
pub mod workers;

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970, for people.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
