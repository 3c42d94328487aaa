//! NCCL for Rust: communicators that cannot keep their owner for ever.
//!
//! A [`Channel`] takes messages from one process to another, in host memory or on their GPUs. A [`Communicator`] and a
//! [`group`] are for all else; their memory and streams are the caller's: cudarc's, by [`DeviceSlice::new`], or anybody's, by
//! their addresses. The README has an example.
//!
//! No usable crate of this name is published. cudarc has bindings and a thin layer over them, which blocks, does not look for
//! `libnccl.so.2`, and panics where the library or a function is missing. This crate takes cudarc's types; it knows nothing of what
//! is sent.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use nccl_rs::{Channel, Config, Error, UniqueId};
//!
//! /// Sends a greeting from one process' GPU 0 to another's.
//! fn greet(id: &UniqueId, is_sender: bool) -> Result<(), Error> {
//!     let (config, timeout) = (Config::default(), Duration::from_secs(30));
//!     let rank = if is_sender { Channel::SENDER } else { Channel::RECEIVER };
//!     let mut channel = Channel::connect(0, id, rank, 5, &config, timeout)?;
//!     if is_sender { channel.send(b"hello", timeout) } else { channel.recv(&mut [0; 5], Some(timeout)) }
//! }
//! ```
//!
//! # The library
//!
//! It is opened on first use: the file that `NCCL_LIBRARY` names, or `libnccl.so.2`, or `libnccl.so`. 2.27 is the
//! oldest: those before use the memory of a thread that may be gone. What newer ones have, [`Group::all_to_all`] (2.28),
//! answers [`Error::Unsupported`] with an older library, and so does everything with one that is older than 2.27.
//!
//! # What blocks
//!
//! All communicators are non-blocking ones of NCCL's.
//!
//! | call | blocks until | at most |
//! |---|---|---|
//! | [`Communicator::begin`], [`Connecting::poll`], dropping a [`Connecting`] | no other rank | |
//! | [`Communicator::connect`], [`Connecting::wait`] | all ranks are connected | `timeout`, then aborts |
//! | [`group`] | the operations are queued | `queue_timeout`, then aborts |
//! | [`Communicator::split`], [`Communicator::shrink`] | all ranks have called it | `timeout`, then aborts |
//! | [`Communicator::finalize`] | all that is queued has run | `timeout`, then aborts |
//! | [`Communicator::abort`], [`Monitor::abort`], dropping | NCCL has let go of everything | `close_timeout`, then leaves it behind |
//! | [`Communicator::state`], [`Monitor::state`] | no other rank | |
//! | [`Channel::connect`] | the other side is connected | `timeout`, then aborts |
//! | [`Channel::send`] | the message has left the GPU | `timeout`, then aborts |
//! | [`Channel::recv`] | the message is there | `timeout`, then aborts; without one, for ever |
//! | [`Channel::take`] | the copy is there | `timeout`, then aborts |
//! | [`available`], dropping a [`Channel`] | nobody | |
//! | [`wait_closed`] | what is being aborted or dropped has ended | `timeout` |
//!
//! Aborting after a timeout goes on in the background; [`Communicator::connect`], [`Connecting::wait`] and
//! [`Communicator::finalize`] wait `close_timeout` for it. In a channel, `queue_timeout` comes on top, for its group. Calls of NCCL's and
//! of the driver's come on top of all of them. They are short, but for what is said at [`Communicator::begin`], for
//! [`Outstanding::Abort`], which waits for kernels to notice, and for memory that a channel takes for a message that is
//! larger than all before: the driver may wait for what runs on the GPU. But for a channel, nothing here waits for a
//! stream: an operation whose peer is gone hangs on it until the communicator is aborted. Watch the stream, and
//! [`Monitor::state`]. An async caller polls [`Connecting`], and does the rest on a thread that may block.
//!
//! # Threads
//!
//! NCCL allows one thread at a time on a communicator, and frees it when it is aborted. So a [`Communicator`] moves
//! between threads but is not shared, and a [`Monitor`] is for a watchdog: a lock keeps the two apart, for the length
//! of one call. Only [`Communicator::begin`] takes the GPU that is current on the thread, and leaves it so; a channel makes its own
//! current; all other calls leave the thread as it was. Communicators of one GPU that different threads use can still hang each other, if their operations are
//! not queued in the same order on all ranks.
//!
//! Unix alone has been thought of.

#![allow(unsafe_code)]
#![warn(missing_docs)]

mod channel;
mod communicator;
mod group;
mod memory;

mod config;
mod unique_id;

mod rest;
mod shared;

mod error;
mod library;

#[cfg(test)]
mod fake;

pub use channel::{Channel, Part, available};
pub use communicator::{Communicator, Connecting, Monitor, Outstanding, Progress};
pub use config::Config;
pub use cudarc;
pub use error::{Code, Error};
pub use group::{Group, ReduceOp, group};
pub use library::{Version, version};
pub use memory::{DataType, DeviceSlice, DeviceSliceMut, E4m3, E5m2, Element, Event, Stream};
pub use shared::{State, is_closing, wait_closed};
pub use unique_id::UniqueId;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
