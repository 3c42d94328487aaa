//! The engine, and the worker around it: the fixtures' answers, the same bits however the work is cut, and what happens when
//! something goes wrong.
#![allow(clippy::unwrap_used)]

mod bits;
mod experts;
mod faults;
mod harness;
mod parity;
mod serve;
