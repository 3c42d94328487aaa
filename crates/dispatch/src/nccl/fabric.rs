//! What moves bytes between two ranks, and a lane's safe way to it.

use std::sync::Arc;
use std::time::Duration;

use moesaic_kernels::cuda::{Buffer, Device, GpuBytes};

use super::LANES_MAX;

/// Of a communicator: who has the same id is connected.
pub type Id = [u8; 128];

/// What a side does on a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Send,
    Receive,
}

/// Bytes that are sent, where they lie.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    Here(&'a [u8]),
    There(&'a GpuBytes),
}

/// Ways from this process's GPU to others.
pub trait Fabric: Send + Sync + 'static {
    /// Both ends have to have the same.
    fn version(&self) -> String;

    fn new_id(&self) -> Result<Id, String>;

    /// Where the rows that come are to lie; `None`: in the processor's memory.
    fn device(&self) -> Option<&Device> {
        None
    }

    /// How many lanes' ends a process may have.
    fn lanes_max(&self) -> usize {
        LANES_MAX
    }

    /// Connects the side that sends with the one that receives, for messages of `largest` bytes as a rule. Blocks until both are
    /// there, or `timeout` is over, or what `begun` is given aborts: then for the channel's whole life.
    fn connect(
        &self,
        id: &Id,
        direction: Direction,
        largest: usize,
        timeout: Duration,
        begun: &dyn Fn(Arc<dyn Breaker>),
    ) -> Result<Box<dyn Channel>, String>;
}

/// One end of a communicator of two ranks, used in its direction alone. What one side sends has to be received by the other
/// in messages of the same sizes. After an error it is of no use any more.
pub trait Channel: Send {
    /// A message of `len` bytes, of which `parts` are said in this order, each from some byte on. Blocks until it has left, or
    /// `timeout` is over, which counts from when the GPU has written all parts: for that it has `WRITTEN_TIMEOUT`.
    fn send(&mut self, len: usize, parts: &[(usize, Source<'_>)], timeout: Duration) -> Result<(), String>;

    /// A message of `len` bytes, of which the first are wanted at once. Blocks until it has come; without a timeout, until
    /// the channel fails or is aborted.
    fn receive(&mut self, len: usize, beginning: &mut [u8], timeout: Option<Duration>) -> Result<(), String>;

    /// Copies from the message that came last, from byte `at` on.
    fn take(&mut self, at: usize, to: &mut [u8]) -> Result<(), String>;

    /// The same, to the fabric's device. `to` is answered, but after an error: the copy may still be to come then.
    fn take_there(&mut self, at: usize, to: Buffer<u8>) -> Result<Buffer<u8>, String>;
}

/// What other threads may do with a channel.
pub trait Breaker: Send + Sync {
    /// Ends what waits on this side of the channel, with an error. Others hear nothing of it. False if that takes too long.
    fn abort(&self) -> bool;
}
