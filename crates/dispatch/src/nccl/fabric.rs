//! What moves bytes between two ranks, and a lane's safe way to it.

use std::sync::Arc;
use std::time::Duration;

/// Of a communicator: who has the same id is connected.
pub type Id = [u8; 128];

/// What a side does on a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Send,
    Receive,
}

/// Ways from this process's GPU to others.
pub trait Fabric: Send + Sync + 'static {
    /// Both ends have to have the same.
    fn version(&self) -> String;

    fn new_id(&self) -> Result<Id, String>;

    /// Connects the side that sends with the one that receives. Blocks until both are there, or `timeout` is over.
    fn connect(&self, id: &Id, direction: Direction, timeout: Duration) -> Result<Box<dyn Channel>, String>;
}

/// One end of a communicator of two ranks, used in its direction alone. What one side sends has to be received by the other
/// in messages of the same sizes. After an error it is of no use any more.
pub trait Channel: Send {
    /// Blocks until the bytes have left, or `timeout` is over.
    fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<(), String>;

    /// Blocks until all bytes have come; without a timeout, until the channel fails or is aborted.
    fn receive(&mut self, bytes: &mut [u8], timeout: Option<Duration>) -> Result<(), String>;

    fn breaker(&self) -> Arc<dyn Breaker>;
}

/// What other threads may do with a channel.
pub trait Breaker: Send + Sync {
    /// Ends what waits on this side of the channel, with an error. Others hear nothing of it.
    fn abort(&self);
}
