//! The experts that the worker holds, by placement epoch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use moesaic_dispatch::{Refusal, RequestFrame};
use moesaic_proto::v1::RefusalReason;
use moesaic_proto::{Epoch, ExpertId, LayerId};

use crate::core::epochs::Epochs;
use crate::experts::Expert;

/// The experts of one epoch, packed for the kernels.
#[derive(Debug, Default)]
pub struct Shard {
    /// All layers with routed experts, also those of which this worker holds none.
    layers: BTreeMap<LayerId, BTreeMap<ExpertId, Expert>>,
}

impl Shard {
    pub fn new(layers: BTreeMap<LayerId, BTreeMap<ExpertId, Expert>>) -> Self {
        Self { layers }
    }

    pub fn expert(&self, layer: LayerId, expert: ExpertId) -> Option<&Expert> {
        self.layers.get(&layer)?.get(&expert)
    }

    pub fn expert_count(&self) -> usize {
        self.layers.values().map(BTreeMap::len).sum()
    }

    pub fn bytes(&self) -> usize {
        self.layers.values().flat_map(BTreeMap::values).map(|expert| expert.bytes()).sum()
    }

    /// Whether everything that a frame asks for is held here.
    pub fn check(&self, frame: &RequestFrame) -> Result<(), Refusal> {
        let layer = frame.header.layer;
        let Some(experts) = self.layers.get(&layer) else {
            let detail = format!("header: layer {layer} has no routed experts");
            return Err(Refusal::new(RefusalReason::Malformed, detail));
        };
        match frame.terms().iter().find(|term| !experts.contains_key(&term.expert())) {
            None => Ok(()),
            Some(term) => {
                let (expert, epoch) = (term.expert(), frame.header.epoch);
                let detail = format!("layer {layer}, expert {expert} is not held here in epoch {epoch}");
                Err(Refusal::new(RefusalReason::NotHeld, detail))
            }
        }
    }
}

/// Shards by epoch; what two epochs have in common is in memory once.
#[derive(Debug)]
pub struct Shards {
    epochs: Mutex<Epochs<Shard>>,
    started: Instant,
}

impl Default for Shards {
    fn default() -> Self {
        Self { epochs: Mutex::default(), started: Instant::now() }
    }
}

impl Shards {
    /// See `Epochs::install`.
    pub fn install(&self, epoch: Epoch, shard: Shard) {
        self.lock().install(self.started.elapsed(), epoch, shard);
    }

    /// See `Epochs::get`.
    pub fn get(&self, epoch: Epoch) -> Result<Arc<Shard>, Refusal> {
        self.lock().get(self.started.elapsed(), epoch)
    }

    pub fn newest(&self) -> Option<(Epoch, Arc<Shard>)> {
        self.lock().newest().map(|(epoch, shard)| (epoch, shard.clone()))
    }

    /// See `Epochs::retire`.
    pub fn retire(&self) -> Option<Epoch> {
        self.lock().retire(self.started.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Epochs<Shard>> {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
