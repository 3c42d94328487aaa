//! The fabric that there is: NCCL, from one GPU's memory to another's, by `nccl_rs::Channel`.

use std::sync::Arc;
use std::time::Duration;

use nccl_rs::{Config, Error, Monitor, UniqueId, Version};

use super::fabric::{Breaker, Channel, Direction, Fabric, Id};

/// Of one GPU.
pub(super) struct NcclFabric {
    gpu: usize,
    version: Version,
}

impl NcclFabric {
    /// By the GPU's number, as the driver counts.
    pub fn open(gpu: usize) -> Result<Self, Error> {
        Ok(Self { gpu, version: nccl_rs::available(gpu)? })
    }
}

/// A receive that waits keeps a multiprocessor busy: one, not more.
fn config() -> Config {
    Config { max_ctas: Some(1), close_timeout: Duration::from_secs(2), ..Config::default() }
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

    fn connect(&self, id: &Id, direction: Direction, timeout: Duration) -> Result<Box<dyn Channel>, String> {
        let id = UniqueId::from_bytes(*id);
        let rank = match direction {
            Direction::Send => nccl_rs::Channel::SENDER,
            Direction::Receive => nccl_rs::Channel::RECEIVER,
        };
        let channel = nccl_rs::Channel::connect(self.gpu, &id, rank, &config(), timeout).map_err(words)?;
        Ok(Box::new(channel))
    }
}

impl Channel for nccl_rs::Channel {
    fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<(), String> {
        self.send(bytes, timeout).map_err(words)
    }

    fn receive(&mut self, bytes: &mut [u8], timeout: Option<Duration>) -> Result<(), String> {
        self.receive(bytes, timeout).map_err(words)
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        Arc::new(self.monitor())
    }
}

impl Breaker for Monitor {
    fn abort(&self) {
        if let Err(error) = self.abort() {
            tracing::warn!(%error, "a communicator is still being aborted");
        }
    }
}
