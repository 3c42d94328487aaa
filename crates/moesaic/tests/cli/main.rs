//! The command line as a person uses it: the program is run, its output read and its exit code checked.
#![allow(clippy::unwrap_used)]

mod arguments;
mod process;
mod secured;
mod up;
