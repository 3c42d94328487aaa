//! How often each expert of each layer was chosen: what the planner of the placement wants to know.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use moesaic_model::Config;

/// Rows that chose each expert, since the worker started.
#[derive(Debug)]
pub struct ExpertCounts {
    layers: BTreeMap<usize, Vec<AtomicU64>>,
}

impl ExpertCounts {
    pub fn new(config: &Config) -> Self {
        let zeros = || (0..config.n_routed_experts).map(|_| AtomicU64::new(0)).collect();
        Self { layers: config.moe_layers().into_iter().map(|layer| (layer, zeros())).collect() }
    }

    pub fn add(&self, layer: usize, experts: impl Iterator<Item = u16>) {
        let Some(counts) = self.layers.get(&layer) else { return };
        for expert in experts {
            counts[usize::from(expert)].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// By layer, ascending, the rows of each expert.
    pub fn read(&self) -> impl Iterator<Item = (usize, Vec<u64>)> + '_ {
        let read = |counts: &Vec<AtomicU64>| counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        self.layers.iter().map(move |(layer, counts)| (*layer, read(counts)))
    }
}
