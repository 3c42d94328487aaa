//! Between processes: one HTTP/2 connection and one bidirectional stream for each pair of attention and expert worker.
//!
//! `edge` is the attention worker's end, `server` the expert worker's. Neither looks at what frames ask for beyond the
//! checks of `frame`. All limits of both ends are here.

mod edge;
mod server;

use std::time::Duration;

pub(crate) use edge::Outbound;
pub use edge::{Edge, EdgeConfig, EdgeOwner};
pub use server::{ExpertsService, service};

use moesaic_proto::limits::FRAME_BYTES_MAX;

/// HTTP/2 windows: the largest frame goes out without waiting for the receiver to say "go on". It is also the most
/// that one side must hold for a peer that it does not read from.
pub const WINDOW_BYTES: u32 = FRAME_BYTES_MAX as u32;
/// One HTTP/2 frame: large, for few headers and wake-ups; small enough that a ping never waits long behind one.
pub const HTTP2_FRAME_BYTES: u32 = 1 << 20;
/// A TCP connection is made or refused in a few round trips.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// From the open connection to the other side's Hello. Bounds what a silent peer can hold.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer whose machine is gone does not close its connections: pings find it. Layer deadlines are shorter; this
/// is for edges on which nothing is outstanding.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two pings over a stream, which the worker sends back at once.
pub const PING_INTERVAL: Duration = Duration::from_millis(100);
/// Between two attempts to connect: soon at first, since a restart is the usual reason, and never a flood.
pub const BACKOFF_MIN: Duration = Duration::from_millis(20);
pub const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// An edge that is given up still waits that long for answers on their way.
pub const LINGER: Duration = Duration::from_secs(5);
/// How often a worker that is closing looks whether its lanes' frames are answered.
const FINISH_POLL: Duration = Duration::from_millis(5);
/// Frames that wait for an edge's connection to take them: a few for each micro-batch. More means that the
/// connection stands still.
pub const EDGE_FRAMES_MAX: usize = 64;
/// Frames of one caller that a worker has in hand, unanswered or not yet sent. Past it the stream is not read on, and
/// the caller's own queue fills.
pub const STREAM_FRAMES_MAX: usize = 64;
