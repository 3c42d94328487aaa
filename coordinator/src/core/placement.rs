//! The first placement: which expert worker holds which expert, once enough of them are there.

mod balance;
mod draft;
pub mod eplb;
mod fill;
pub mod planner;
mod turns;

use std::collections::BTreeMap;

use moesaic_proto::{Epoch, LayerId, Placement, PlacementError, WorkerId};

/// Epoch 1 over the workers in the order of their ids, or None while fewer than `expected` are there (all of them then
/// take part) or the model has no routed experts.
///
/// Every layer the same: contiguous blocks of experts, expert e of E on worker e * M / E.
pub fn first_placement(
    layers: &[LayerId],
    experts: usize,
    workers: &[WorkerId],
    expected: usize,
) -> Result<Option<Placement>, PlacementError> {
    if workers.len() < expected.max(1) || layers.is_empty() {
        return Ok(None);
    }
    let mut workers = workers.to_vec();
    workers.sort();
    // More workers than experts: the last ones hold nothing.
    let blocks = workers.len().min(experts);
    let holders: Vec<Vec<u32>> = (0..experts).map(|e| vec![(e * blocks / experts) as u32]).collect();
    let layers: BTreeMap<_, _> = layers.iter().map(|layer| (*layer, holders.clone())).collect();
    Placement::new(Epoch(1), workers, layers).map(Some)
}

#[cfg(test)]
mod tests {
    use moesaic_proto::ExpertId;

    use super::*;

    fn plan(experts: usize, workers: &[&str], expected: usize) -> Option<Placement> {
        let workers: Vec<_> = workers.iter().map(|id| WorkerId::new(id).unwrap()).collect();
        first_placement(&[LayerId(1), LayerId(2)], experts, &workers, expected).unwrap()
    }

    #[test]
    fn waits_for_the_workers_and_then_splits_into_blocks() {
        assert_eq!(plan(8, &["a"], 2), None);
        let placement = plan(8, &["c", "a", "b"], 2).unwrap();
        assert_eq!(placement.epoch(), Epoch(1));
        let holders: Vec<_> = (0..8).map(|e| placement.holders(LayerId(2), ExpertId(e))[0]).collect();
        assert_eq!(holders, [0, 0, 0, 1, 1, 1, 2, 2]);
        assert_eq!(placement.workers()[0].as_str(), "a");
        assert_eq!(placement.layers().count(), 2);
    }

    #[test]
    fn more_workers_than_experts() {
        let placement = plan(2, &["a", "b", "c"], 3).unwrap();
        assert_eq!(placement.holders(LayerId(1), ExpertId(1)), [1]);
    }

    #[test]
    fn a_dense_model_needs_no_placement() {
        assert_eq!(first_placement(&[], 0, &[WorkerId::new("a").unwrap()], 1), Ok(None));
    }
}
