//! The front door and all other doors: who is let in, what is kept from whom, what clients that mean harm can do, and
//! what those who watch are shown.
#![allow(clippy::unwrap_used)]

mod abuse;
mod access;
mod canaries;
mod certificates;
mod dashboard;
mod traces;
