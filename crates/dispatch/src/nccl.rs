//! From GPU to GPU: a second way for an edge's frames, beside its stream. See docs/transport.md.
//!
//! A *lane* is two communicators of two ranks, one for requests and one for answers. It is offered and agreed on over the
//! edge's stream, which stays: for pings, for what is said of the lane, and for frames whenever there is no lane. Nothing above
//! an edge knows which way a frame took. A lane that fails costs no frame: the attention worker asks again over the stream
//! what was not answered, and offers a new lane.
//!
//! `core` decides what a slot is and which comes next, `lane` is one end, `lanes` what an attention worker does with them, one
//! after the other; `fabric` is what moves bytes: NCCL, or in tests `fake`; `watch` ends lanes whose calls do not return.

pub mod core;
pub mod fabric;
pub mod fake;
mod gpu;
pub mod lane;
mod lanes;
mod watch;

use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

pub use fabric::{Breaker, Channel, Direction, Fabric, Id, Source};
pub(crate) use lanes::{Lanes, LanesOwner};
use moesaic_kernels::cuda::Device;

/// Both ends are connected and have sent each other a slot after that time, or the lane is given up. The first
/// communicator of a process takes seconds.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// A slot that the other side has not taken by then never will be: it waits for the next one whenever it has one, whatever
/// it computes. Counts once this side's GPU has written what the slot brings.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(2);
/// For the latter: slots are queued before what they bring is computed.
pub const WRITTEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A side that has had nothing to send for that long sends a slot that says so: the other one need not wait for the next,
/// which would keep a part of its GPU busy.
pub const IDLE_AFTER: Duration = Duration::from_millis(50);
/// Between two lanes of a stream: doubled each time that one fails before it has answered as many frames as a step has.
pub const BACKOFF_MIN: Duration = Duration::from_secs(1);
pub const BACKOFF_MAX: Duration = Duration::from_secs(30 * 60);
/// Frames of a lane that are not answered; more go over the stream. One that has answered as many was good.
pub const LANE_FRAMES_MAX: usize = 64;
/// Lanes of a process, with those that are being connected: each has threads, and an offer may come at any time. A GPU runs 128
/// kernels at a time, and a receive that waits is one of them.
pub const LANES_MAX: usize = 64;
/// A lane that has not answered for so long, while frames wait for it, never will: that a slot has left does not say that it came.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// To copy from a message on the GPU, with nothing before it.
const TAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// The driver reads it as it starts. A GPU has 8 hardware queues if it is not told: a receive that waits holds up what shares its queue.
pub const QUEUES: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
pub const QUEUES_MAX: u32 = 32;
/// NCCL's threads look every half second whether they are to end.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(6);
const SETTLE_POLL: Duration = Duration::from_millis(5);
/// Rows that the largest slot has room for. A frame of more takes a second message, of as many bytes as it has. Slots are as large
/// as the last frames were: one of fewer rows is sent as if it had as many.
pub const SLOT_ROWS: usize = 64;
/// Room of a slot before its rows: for its head, and for a frame's message, which has the tables of its outputs and terms.
pub const SLOT_TABLE_BYTES: usize = 8 << 10;

/// `--transport`: which ways a worker offers, or takes, beside calls within a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// Lanes where this worker computes on a GPU and NCCL is installed; streams alone where those are encrypted, which NCCL's
    /// connections are not.
    Auto,
    /// Streams alone.
    Grpc,
    /// Lanes, or the worker does not start. Where the other side has none, frames go over streams all the same.
    Nccl,
}

impl FromStr for Transport {
    type Err = InvalidTransport;

    fn from_str(s: &str) -> Result<Self, InvalidTransport> {
        match s {
            "auto" => Ok(Self::Auto),
            "grpc" => Ok(Self::Grpc),
            "nccl" => Ok(Self::Nccl),
            _ => Err(InvalidTransport::Unknown(s.to_owned())),
        }
    }
}

/// Why a worker has no such transport.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTransport {
    #[error("transport `{0}` is none of `auto`, `grpc` and `nccl`")]
    Unknown(String),
    #[error(
        "transport is `nccl`, and the worker computes on the processor: set device to cuda:N, or transport to auto"
    )]
    NoGpu,
    #[error("transport is `nccl`: {0}")]
    Nccl(nccl_rs::Error),
}

impl Transport {
    /// What moves bytes from GPU number `gpu`, if the worker computes on one. `device` is that GPU, where rows lie on it.
    /// `has_tls`: the worker's streams are encrypted.
    pub fn open(
        self,
        gpu: Option<usize>,
        device: Option<&Device>,
        has_tls: bool,
    ) -> Result<Option<Arc<dyn Fabric>>, InvalidTransport> {
        if self == Self::Auto && gpu.is_some() && has_tls {
            tracing::info!(
                "no lanes from GPU to GPU, which TLS would not cover: --transport nccl has them all the same"
            );
            return Ok(None);
        }
        let Some(gpu) = gpu.filter(|_| self != Self::Grpc) else {
            return if self == Self::Nccl { Err(InvalidTransport::NoGpu) } else { Ok(None) };
        };
        match gpu::NcclFabric::open(gpu, device.cloned()) {
            Ok(fabric) => Ok(Some(Arc::new(fabric))),
            Err(error) if self == Self::Nccl => Err(InvalidTransport::Nccl(error)),
            Err(error) => {
                tracing::info!(%error, "no lanes from GPU to GPU: rows go over streams");
                Ok(None)
            }
        }
    }
}

/// Waits until all lanes have ended, if they do within some seconds. Whoever leaves the process earlier takes its library away
/// from under NCCL.
pub fn settle() {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    while lane::are_ending() && Instant::now() < deadline {
        thread::sleep(SETTLE_POLL);
    }
    nccl_rs::wait_closed(deadline.saturating_duration_since(Instant::now()));
}

/// What a Hello says of it, and of the slots: lanes are between equals.
pub fn version_of(fabric: Option<&Arc<dyn Fabric>>) -> String {
    let layout = String::from_utf8_lossy(&core::LAYOUT);
    fabric.map_or_else(String::new, |fabric| format!("{} ({layout})", fabric.version()))
}

/// Bytes of the largest slot, of rows of so many.
pub fn slot_bytes(row_bytes: usize) -> usize {
    (SLOT_ROWS * row_bytes + SLOT_TABLE_BYTES).next_multiple_of(4096)
}
