//! The fabric that there is: NCCL, from one GPU's memory to another's, by `nccl_rs::Channel`.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use moesaic_kernels::cuda::{Buffer, Device};
use nccl_rs::{Config, DeviceSlice, DeviceSliceMut, Error, Event, Monitor, Part, UniqueId, Version};

use super::fabric::{Breaker, Channel, Direction, Fabric, Id, Source};
use super::{LANES_MAX, OPEN_TIMEOUT, QUEUES, QUEUES_MAX, TAKE_TIMEOUT, WRITTEN_TIMEOUT};

/// Of one GPU.
pub(super) struct NcclFabric {
    gpu: usize,
    device: Option<Device>,
    version: Version,
}

impl NcclFabric {
    /// By the GPU's number, as the driver counts. Rows lie on `device`, which is that GPU.
    pub fn open(gpu: usize, device: Option<Device>) -> Result<Self, Error> {
        let version = nccl_rs::available(gpu)?;
        let queues = std::env::var(QUEUES).ok().and_then(|queues| queues.parse().ok());
        if queues.is_none_or(|queues: u32| queues < QUEUES_MAX) {
            tracing::warn!("{QUEUES} should be {QUEUES_MAX}, as it is not: what is computed may wait for messages");
        }
        Ok(Self { gpu, device, version })
    }
}

/// On whatever machine.
const LANES_MIN: usize = 4;

/// A receive that waits keeps a multiprocessor busy: one, not more.
fn config() -> Config {
    // Each thing that is freed may wait for the others' receives.
    let close_timeout = Duration::from_secs(5);
    Config { max_ctas: Some(1), queue_timeout: OPEN_TIMEOUT, close_timeout, ..Config::default() }
}

fn words(error: Error) -> String {
    error.to_string()
}

impl Fabric for NcclFabric {
    fn version(&self) -> String {
        self.version.to_string()
    }

    fn new_id(&self) -> Result<Id, String> {
        UniqueId::new().map(|id| *id.as_bytes()).map_err(words)
    }

    fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    fn lanes_max(&self) -> usize {
        // Where messages take a network, a thread of NCCL's asks for those of each receive all the time.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (cores / 2).clamp(LANES_MIN, LANES_MAX)
    }

    fn connect(
        &self,
        id: &Id,
        direction: Direction,
        largest: usize,
        timeout: Duration,
        begun: &dyn Fn(Arc<dyn Breaker>),
    ) -> Result<Box<dyn Channel>, String> {
        let id = UniqueId::from_bytes(*id);
        let rank = match direction {
            Direction::Send => nccl_rs::Channel::SENDER,
            Direction::Receive => nccl_rs::Channel::RECEIVER,
        };
        let begun = |monitor| begun(Arc::new(monitor));
        let channel = nccl_rs::Channel::connect_with(self.gpu, &id, rank, largest, &config(), timeout, begun);
        Ok(Box::new(channel.map_err(words)?))
    }
}

impl Channel for nccl_rs::Channel {
    fn send(&mut self, len: usize, parts: &[(usize, Source<'_>)], timeout: Duration) -> Result<(), String> {
        let part = |source| match source {
            Source::Here(bytes) => Part::Host(bytes),
            Source::There(bytes) => {
                // SAFETY: the bytes are borrowed, so that they are there as long as the slice is.
                let slice = unsafe { DeviceSlice::from_raw(bytes.address().0, bytes.len()) };
                // SAFETY: so is their mark.
                let event = bytes.written().map(|mark| unsafe { Event::from_raw(mark.event() as _) });
                event.map_or(Part::Device(slice), |event| Part::After(event, slice))
            }
        };
        let parts: Vec<_> = parts.iter().map(|(at, source)| (*at, part(*source))).collect();
        // SAFETY: marks are behind what writes the bytes, and those without are written. They stay as they are while they are
        // borrowed. What is still read after an error lies in the GPU's arena, which is not given back, and goes nowhere.
        unsafe { self.send_parts(len, &parts, WRITTEN_TIMEOUT, timeout) }.map_err(words)
    }

    fn receive(&mut self, len: usize, beginning: &mut [u8], timeout: Option<Duration>) -> Result<(), String> {
        self.recv_beginning(len, beginning, timeout).map_err(words)
    }

    fn take(&mut self, at: usize, to: &mut [u8]) -> Result<(), String> {
        self.take(at, to, TAKE_TIMEOUT).map_err(words)
    }

    fn take_there(&mut self, at: usize, to: Buffer<u8>) -> Result<Buffer<u8>, String> {
        if let Some(error) = self.error() {
            return Err(error.to_string());
        }
        // SAFETY: the buffer is there, and nobody else has it. It stays if this fails.
        let taken =
            unsafe { self.take_on_device(at, DeviceSliceMut::from_raw(to.address().0, to.len()), TAKE_TIMEOUT) };
        match taken {
            Ok(()) => Ok(to),
            Err(error) => {
                // For good, but that is seldom, and of one frame.
                std::mem::forget(to);
                Err(words(error))
            }
        }
    }
}

impl Breaker for Monitor {
    fn abort(&self) -> bool {
        let aborted = self.abort();
        if let Err(error) = &aborted {
            tracing::warn!(%error, "a communicator is not ended as it should");
        }
        !matches!(aborted, Err(Error::Timeout { .. }))
    }
}
