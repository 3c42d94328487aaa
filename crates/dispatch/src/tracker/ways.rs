//! Where frames can go: a placement, and the way to each of its workers.

use std::sync::Arc;
use std::time::Duration;

use moesaic_proto::{Epoch, ExpertId, LayerId, Placement, WorkerId};

use super::health::{Health, Rank};
use super::{Destination, EdgeId};

/// In place of a worker's index: no holder can be reached.
pub const NOWHERE: u32 = u32::MAX;

/// See the module.
#[derive(Debug)]
pub struct Ways {
    placement: Arc<Placement>,
    /// By the worker's index in the placement; `None`: it cannot be used, as it has left or has not loaded its experts.
    to: Vec<Option<Destination>>,
}

impl Ways {
    /// `edge` says for each worker whether it can be used, and over which edge (`Some(None)`: it is in this process).
    pub fn new(placement: Arc<Placement>, edge: impl Fn(&WorkerId) -> Option<Option<EdgeId>>) -> Self {
        let way = |worker: &WorkerId| edge(worker).map(|edge| Destination { worker: worker.clone(), edge });
        let to = placement.workers().iter().map(way).collect();
        Self { placement, to }
    }

    pub fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    pub fn epoch(&self) -> Epoch {
        self.placement.epoch()
    }

    /// To the placement's worker of this index.
    pub fn destination(&self, worker: u32) -> Option<&Destination> {
        self.to.get(worker as usize)?.as_ref()
    }

    pub fn destinations(&self) -> impl Iterator<Item = &Destination> {
        self.to.iter().flatten()
    }

    /// How each worker stands, by its index.
    pub fn ranks(&self, health: &Health, now: Duration) -> Vec<Rank> {
        self.ranks_without(health, now, &[])
    }

    /// The same, some of them taken for down.
    pub fn ranks_without(&self, health: &Health, now: Duration, without: &[WorkerId]) -> Vec<Rank> {
        let rank = |to: &Option<Destination>| match to {
            Some(to) if !without.contains(&to.worker) => health.rank(to, now),
            _ => Rank::Down,
        };
        self.to.iter().map(rank).collect()
    }

    /// For each of these experts the best of its holders, by the expert's number; `NOWHERE` where that is worse than
    /// `worst`. Holders of the same rank take turns.
    pub fn holders(
        &self,
        ranks: &[Rank],
        layer: LayerId,
        experts: impl Iterator<Item = ExpertId>,
        turn: u64,
        worst: Rank,
    ) -> Vec<u32> {
        const UNKNOWN: u32 = NOWHERE - 1;
        let mut chosen = vec![UNKNOWN; self.placement.experts()];
        for expert in experts {
            let slot = usize::from(expert.0);
            if slot >= chosen.len() {
                chosen.resize(slot + 1, UNKNOWN);
            }
            if chosen[slot] == UNKNOWN {
                chosen[slot] = self.holder(ranks, layer, expert, turn, worst).unwrap_or(NOWHERE);
            }
        }
        chosen
    }

    fn holder(&self, ranks: &[Rank], layer: LayerId, expert: ExpertId, turn: u64, worst: Rank) -> Option<u32> {
        let best = self.in_turn(layer, expert, turn).min_by_key(|worker| ranks[*worker as usize])?;
        (ranks[best as usize] <= worst).then_some(best)
    }

    /// An expert's holders, the one whose turn it is first.
    pub fn in_turn(&self, layer: LayerId, expert: ExpertId, turn: u64) -> impl Iterator<Item = u32> {
        let holders = self.placement.holders(layer, expert);
        let first = (turn % holders.len().max(1) as u64) as usize;
        holders[first..].iter().chain(&holders[..first]).copied()
    }

    /// Whether every expert of every layer has a holder that can be asked.
    pub fn is_complete(&self, ranks: &[Rank]) -> bool {
        self.placement.is_covered(|worker| ranks[worker as usize] <= Rank::Silent)
    }
}
