//! How many experts are one death from being lost, or are lost.

use std::collections::BTreeMap;

use moesaic_proto::{Placement, WorkerId};

use super::leader::Seen;

/// Experts over all layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// Nobody serves them.
    pub lost: u32,
    /// Fewer serve them than should and could; lost ones too.
    pub exposed: u32,
}

/// Under the placement in force, or the one `before` it where rows are still sent under that: while workers load what is
/// new to them, nothing is missing.
pub fn exposure(placement: &Placement, before: Option<&Placement>, seen: &[Seen], replicas: usize) -> Exposure {
    let seen_by_id: BTreeMap<&WorkerId, &Seen> = seen.iter().map(|seen| (&seen.host.id, seen)).collect();
    let live = |placement: &Placement| {
        let serves = |worker: &WorkerId| {
            let seen = seen_by_id.get(worker);
            seen.is_some_and(|seen| !seen.is_down && seen.epoch_loaded >= placement.epoch())
        };
        let serving: Vec<bool> = placement.workers().iter().map(serves).collect();
        let count = |(_, _, holders): (_, _, &[u32])| holders.iter().filter(|&&w| serving[w as usize]).count();
        placement.experts_of_layers().map(count).collect::<Vec<_>>()
    };
    let (now, before) = (live(placement), before.map(live).unwrap_or_default());
    let wanted = replicas.min(seen.len()).max(1);
    let mut exposure = Exposure::default();
    for (index, live) in now.into_iter().enumerate() {
        let live = live.max(before.get(index).copied().unwrap_or(0));
        exposure.lost += u32::from(live == 0);
        exposure.exposed += u32::from(live < wanted);
    }
    exposure
}

#[cfg(test)]
mod tests {
    use moesaic_proto::{Epoch, LayerId};

    use super::*;
    use crate::core::placement::planner::Host;

    fn placement(epoch: u32, holders: [&[u32]; 2]) -> Placement {
        let workers = ["a", "b", "c"].map(|id| WorkerId::new(id).unwrap()).to_vec();
        let layer = holders.iter().map(|holders| holders.to_vec()).collect();
        Placement::new(Epoch(epoch), workers, BTreeMap::from([(LayerId(0), layer)])).unwrap()
    }

    fn seen(id: &str, epoch_loaded: u32, is_down: bool) -> Seen {
        let host = Host { id: WorkerId::new(id).unwrap(), node: id.into(), slots: 2, weight: 1.0 };
        let epoch_loaded = Epoch(epoch_loaded);
        Seen { host, epoch_loaded, is_drained: false, is_stopping: false, is_cordoned: false, is_down }
    }

    #[test]
    fn what_moves_is_served_where_it_was() {
        let (old, new) = (placement(1, [&[0, 1], &[0, 1]]), placement(2, [&[0, 2], &[1, 2]]));
        let count = |before, seen: &[Seen]| {
            let Exposure { lost, exposed } = exposure(&new, before, seen, 2);
            (lost, exposed)
        };
        // c loads what it is to have.
        let loading = [seen("a", 2, false), seen("b", 2, false), seen("c", 1, false)];
        assert_eq!(count(Some(&old), &loading), (0, 0));
        assert_eq!(count(None, &loading), (0, 2));
        // b dies meanwhile.
        let dead = [seen("a", 2, false), seen("b", 2, true), seen("c", 1, false)];
        assert_eq!(count(Some(&old), &dead), (0, 2));
        // Once it is loaded, what was before does not count.
        assert_eq!(count(None, &[seen("a", 2, false), seen("c", 2, false)]), (0, 1));
        assert_eq!(count(None, &[seen("a", 2, false)]), (1, 1));
    }
}
