//! The experts that the worker holds, by placement epoch: the newest one and the one before, until nobody asks for it
//! any more. What two epochs have in common is in memory once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use moesaic_dispatch::{Refusal, RequestFrame};
use moesaic_kernels::Ffn;
use moesaic_proto::v1::RefusalReason;
use moesaic_proto::{Epoch, ExpertId, LayerId};

/// Epochs that are served side by side.
const EPOCHS_MAX: usize = 2;
/// An old epoch that no frame has named for this long is over: attention workers have long moved on.
const RETIRED_AFTER: Duration = Duration::from_secs(10);

/// The experts of one epoch, packed for the kernels.
#[derive(Debug, Default)]
pub struct Shard {
    /// All layers with routed experts, also those of which this worker holds none.
    layers: BTreeMap<LayerId, BTreeMap<ExpertId, Arc<Ffn>>>,
}

impl Shard {
    pub fn new(layers: BTreeMap<LayerId, BTreeMap<ExpertId, Arc<Ffn>>>) -> Self {
        Self { layers }
    }

    pub fn expert(&self, layer: LayerId, expert: ExpertId) -> Option<&Arc<Ffn>> {
        self.layers.get(&layer)?.get(&expert)
    }

    pub fn expert_count(&self) -> usize {
        self.layers.values().map(BTreeMap::len).sum()
    }

    pub fn bytes(&self) -> usize {
        self.layers.values().flat_map(BTreeMap::values).map(|ffn| ffn.bytes()).sum()
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

/// Shards by epoch.
#[derive(Debug)]
pub struct Shards {
    by_epoch: RwLock<BTreeMap<Epoch, Served>>,
    started: Instant,
}

#[derive(Debug)]
struct Served {
    shard: Arc<Shard>,
    /// Milliseconds from the start to the last frame.
    asked: AtomicU64,
}

impl Default for Shards {
    fn default() -> Self {
        Self { by_epoch: RwLock::default(), started: Instant::now() }
    }
}

impl Shards {
    /// Serves an epoch from now on, and no longer those before the one before it.
    pub fn install(&self, epoch: Epoch, shard: Shard) {
        let mut by_epoch = self.by_epoch.write().unwrap_or_else(PoisonError::into_inner);
        by_epoch.insert(epoch, Served { shard: Arc::new(shard), asked: AtomicU64::new(self.now_ms()) });
        while by_epoch.len() > EPOCHS_MAX {
            by_epoch.pop_first();
        }
    }

    pub fn get(&self, epoch: Epoch) -> Result<Arc<Shard>, Refusal> {
        let by_epoch = self.by_epoch.read().unwrap_or_else(PoisonError::into_inner);
        let served = by_epoch.get(&epoch).map(|served| {
            served.asked.store(self.now_ms(), Ordering::Relaxed);
            served.shard.clone()
        });
        served.ok_or_else(|| {
            let served: Vec<String> = by_epoch.keys().map(Epoch::to_string).collect();
            let served = if served.is_empty() { "none".into() } else { served.join(" and ") };
            Refusal::new(RefusalReason::Epoch, format!("header: epoch {epoch} is not served here; served: {served}"))
        })
    }

    pub fn newest(&self) -> Option<Arc<Shard>> {
        let by_epoch = self.by_epoch.read().unwrap_or_else(PoisonError::into_inner);
        by_epoch.last_key_value().map(|(_, served)| served.shard.clone())
    }

    /// 0 for none.
    pub fn newest_epoch(&self) -> Epoch {
        let by_epoch = self.by_epoch.read().unwrap_or_else(PoisonError::into_inner);
        by_epoch.last_key_value().map_or(Epoch(0), |(epoch, _)| *epoch)
    }

    /// Forgets the old epoch if nobody has asked for it lately, and says which.
    pub fn retire(&self) -> Option<Epoch> {
        let before = self.now_ms().checked_sub(RETIRED_AFTER.as_millis() as u64)?;
        let mut by_epoch = self.by_epoch.write().unwrap_or_else(PoisonError::into_inner);
        let (&oldest, served) = by_epoch.first_key_value().filter(|_| by_epoch.len() > 1)?;
        let is_over = served.asked.load(Ordering::Relaxed) < before;
        if is_over {
            by_epoch.remove(&oldest);
        }
        is_over.then_some(oldest)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}
