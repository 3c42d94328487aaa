//! Tasks, sockets and services around the core.

pub mod access;
pub mod admin;
pub mod figures;
pub mod generation;
pub mod grpc;
pub mod http;
pub mod leader;
pub mod run;
pub mod service;
pub mod vitals;
pub mod workers;
