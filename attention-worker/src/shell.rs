//! A worker's life and its gRPC service, around the engine.

pub mod request;
pub mod requests;
pub mod run;
pub mod service;
pub mod vitals;
