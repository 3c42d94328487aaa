//! NCCL for Rust: communicators that cannot keep their owner for ever.
//!
//! A [`Channel`] takes messages from one process to another, in host memory or on their GPUs, and is safe. A [`Communicator`]
//! and a [`group`] are for all else; their memory and streams are the caller's.
//!
//! No usable crate of this name is published. cudarc has bindings and a thin layer over them, but does not look for
//! `libnccl.so.2`, panics where the library or a function is missing, and has no configuration, deadlines, state,
//! abort, split or shrink. This crate takes cudarc's types and adds these; it knows nothing of what is sent.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use nccl_rs::{Communicator, Config, DeviceSlice, DeviceSliceMut, Error, Stream, UniqueId, group};
//!
//! /// Gives a kilobyte to the other of two ranks, and takes one.
//! ///
//! /// # Safety
//! ///
//! /// There are 1024 bytes at each address, which nobody touches before `stream` has passed this.
//! unsafe fn exchange(id: &UniqueId, rank: usize, from: u64, to: u64, stream: Stream<'_>) -> Result<(), Error> {
//!     let timeout = Duration::from_secs(30);
//!     let communicator = Communicator::connect(id, rank, 2, &Config::default(), timeout)?;
//!     // SAFETY: the caller's promise.
//!     group(|group| unsafe {
//!         group.send(&communicator, DeviceSlice::<u8>::from_raw(from, 1024), 1 - rank, stream)?;
//!         group.receive(&communicator, DeviceSliceMut::<u8>::from_raw(to, 1024), 1 - rank, stream)
//!     })?;
//!     communicator.finalize(timeout)
//! }
//! ```
//!
//! # The library
//!
//! It is opened on first use: the file that `NCCL_LIBRARY` names, or `libnccl.so.2`, or `libnccl.so`. 2.18 is the
//! oldest that has what is needed. Newer are 8-bit floats (2.24), [`Config::traffic_class`] (2.26) and
//! [`Communicator::shrink`] (2.27); with an older library, these answer [`Error::Unsupported`].
//!
//! # What blocks
//!
//! All communicators are non-blocking ones of NCCL's.
//!
//! | call | blocks until | at most |
//! |---|---|---|
//! | [`Communicator::begin`], [`Connecting::poll`] | no other rank | |
//! | [`Communicator::connect`], [`Connecting::wait`] | all ranks are connected | `timeout`, then aborts |
//! | [`group`] | the operations are queued | `queue_timeout`, then aborts |
//! | [`Communicator::split`], [`Communicator::shrink`] | all ranks have called it | `timeout`, then aborts |
//! | [`Communicator::finalize`] | all that is queued has run | `timeout`, then aborts |
//! | [`Communicator::abort`], [`Monitor::abort`], dropping | NCCL has let go of everything | `close_timeout`, then leaves it behind |
//! | [`Communicator::state`], [`Monitor::state`] | no other rank | |
//! | [`Channel::connect`] | the other side is connected | `timeout`, then aborts |
//! | [`Channel::send`] | the message has left the GPU | `timeout`, then aborts |
//! | [`Channel::receive`] | the message is there | `timeout`, then aborts; without one, for ever |
//! | [`Channel::take`] | the copy is there | `timeout`, then aborts |
//! | dropping a [`Channel`] | NCCL has let go of everything | `close_timeout`, then leaves it behind |
//! | [`available`] | nobody | |
//!
//! Where one aborts, `close_timeout` comes on top; in a channel, `queue_timeout` too, for its group. Calls of NCCL's and
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
//! of one call. Communicators of one GPU that different threads use can still hang each other, if their operations are
//! not queued in the same order on all ranks.

#![allow(unsafe_code)]

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
pub use error::{Code, Error};
pub use group::{Group, ReduceOp, group};
pub use library::{Version, version};
pub use memory::{Bf16, DataType, DeviceSlice, DeviceSliceMut, E4m3, E5m2, Element, Event, F16, Stream};
pub use shared::{State, is_closing};
pub use unique_id::UniqueId;
