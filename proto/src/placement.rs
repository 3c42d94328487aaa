//! A placement: for each layer and routed expert, which expert workers hold it.

use std::collections::{BTreeMap, BTreeSet};

use crate::limits::{EXPERTS_MAX, LAYERS_MAX};
use crate::{Epoch, ExpertId, LayerId, WorkerId, v1};

/// A valid placement: every expert of every layer that it names has at least one holder, holders are distinct, and
/// all layers have the same number of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    epoch: Epoch,
    /// Of the leader that wrote it; 0 where there is none.
    term: u64,
    /// Rows wait for some of these experts.
    urgent: bool,
    workers: Vec<WorkerId>,
    /// layer -> expert -> indices into `workers`
    layers: BTreeMap<LayerId, Vec<Vec<u32>>>,
}

/// Characters of a wrong id and entries of a wrong list that an error repeats.
const SHOWN_MAX: usize = 80;

/// Why a message is no placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error("placement.epoch is 0; epochs start at 1")]
    EpochZero,
    #[error("placement.workers[{index}]: {id:?} is not a worker id, or is there twice")]
    Worker { index: usize, id: String },
    #[error("placement.layers[{index}].layer is {layer}; layers must ascend and stay below {LAYERS_MAX}")]
    Layer { index: usize, layer: u32 },
    #[error(
        "placement: layer {layer} has {experts} experts; expected {expected}, at least 1 and at most {EXPERTS_MAX}"
    )]
    Experts { layer: u32, experts: usize, expected: usize },
    #[error(
        "placement: layer {layer}, expert {expert} has {count} holders that begin with {holders:?}; expected distinct indices below {workers}, at least one"
    )]
    Holders { layer: u32, expert: usize, count: usize, holders: Vec<u32>, workers: usize },
}

impl Placement {
    /// `holders[layer][expert]` are indices into `workers`.
    pub fn new(
        epoch: Epoch,
        workers: Vec<WorkerId>,
        layers: BTreeMap<LayerId, Vec<Vec<u32>>>,
    ) -> Result<Self, PlacementError> {
        let placement = Self { epoch, term: 0, urgent: false, workers, layers };
        // One set of checks, whether it was planned here or came over the wire.
        Self::try_from(&placement.to_proto())
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The same, written by the leader of this term.
    pub fn with_term(self, term: u64) -> Self {
        Self { term, ..self }
    }

    /// The same, to be loaded as fast as may be, or in the background.
    pub fn with_urgency(self, urgent: bool) -> Self {
        Self { urgent, ..self }
    }

    pub fn is_urgent(&self) -> bool {
        self.urgent
    }

    pub fn term(&self) -> u64 {
        self.term
    }

    pub fn workers(&self) -> &[WorkerId] {
        &self.workers
    }

    /// Layers with routed experts, ascending.
    pub fn layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        self.layers.keys().copied()
    }

    /// Whether it places `experts` experts of just these layers (ascending): those of the model at hand.
    pub fn is_for(&self, layers: &[usize], experts: usize) -> bool {
        self.layers().map(|layer| usize::from(layer.0)).eq(layers.iter().copied()) && self.experts() == experts
    }

    /// Routed experts a layer.
    pub fn experts(&self) -> usize {
        self.layers.values().next().map_or(0, Vec::len)
    }

    /// Indices into `workers()`; empty if the placement has no such layer or expert.
    pub fn holders(&self, layer: LayerId, expert: ExpertId) -> &[u32] {
        self.layers.get(&layer).and_then(|experts| experts.get(usize::from(expert.0))).map_or(&[], Vec::as_slice)
    }

    /// Every expert of every layer, in order, with its holders as indices into `workers()`.
    pub fn experts_of_layers(&self) -> impl Iterator<Item = (LayerId, ExpertId, &[u32])> {
        self.layers.iter().flat_map(|(layer, experts)| {
            experts.iter().enumerate().map(|(e, holders)| (*layer, ExpertId(e as u16), holders.as_slice()))
        })
    }

    /// Whether every expert has a holder among these workers, given by their index.
    pub fn is_covered(&self, by: impl Fn(u32) -> bool) -> bool {
        self.experts_of_layers().all(|(_, _, holders)| holders.iter().any(|worker| by(*worker)))
    }

    /// How many experts one worker holds, over all layers.
    pub fn held_by(&self, worker: &WorkerId) -> usize {
        let Some(index) = self.workers.iter().position(|w| w == worker) else { return 0 };
        self.experts_of_layers().filter(|(_, _, holders)| holders.contains(&(index as u32))).count()
    }

    /// The same for each of `workers()`, in their order.
    pub fn held_by_each(&self) -> Vec<usize> {
        let mut held = vec![0; self.workers.len()];
        for (_, _, holders) in self.experts_of_layers() {
            holders.iter().for_each(|worker| held[*worker as usize] += 1);
        }
        held
    }

    /// What one worker holds, by layer, experts ascending; empty if it is not part of the placement.
    pub fn shard(&self, worker: &WorkerId) -> BTreeMap<LayerId, Vec<ExpertId>> {
        let Some(index) = self.workers.iter().position(|w| w == worker) else { return BTreeMap::new() };
        let held = |experts: &Vec<Vec<u32>>| {
            let holds = |(_, holders): &(usize, &Vec<u32>)| holders.contains(&(index as u32));
            experts.iter().enumerate().filter(holds).map(|(e, _)| ExpertId(e as u16)).collect()
        };
        self.layers.iter().map(|(layer, experts)| (*layer, held(experts))).collect()
    }

    pub fn to_proto(&self) -> v1::Placement {
        let layer = |(layer, experts): (&LayerId, &Vec<Vec<u32>>)| v1::LayerPlacement {
            layer: u32::from(layer.0),
            experts: experts.iter().map(|workers| v1::Holders { workers: workers.clone() }).collect(),
        };
        v1::Placement {
            epoch: self.epoch.0,
            workers: self.workers.iter().map(|w| w.as_str().to_owned()).collect(),
            layers: self.layers.iter().map(layer).collect(),
            term: self.term,
            urgent: self.urgent,
        }
    }
}

impl TryFrom<&v1::Placement> for Placement {
    type Error = PlacementError;

    fn try_from(message: &v1::Placement) -> Result<Self, PlacementError> {
        if message.epoch == 0 {
            return Err(PlacementError::EpochZero);
        }
        let mut workers: Vec<WorkerId> = Vec::with_capacity(message.workers.len());
        let mut seen = BTreeSet::new();
        for (index, id) in message.workers.iter().enumerate() {
            match WorkerId::new(id) {
                Ok(worker) if seen.insert(id) => workers.push(worker),
                _ => return Err(PlacementError::Worker { index, id: id.chars().take(SHOWN_MAX).collect() }),
            }
        }
        let expected = message.layers.first().map_or(0, |layer| layer.experts.len());
        let mut layers = BTreeMap::new();
        for (index, layer) in message.layers.iter().enumerate() {
            let ascends = index == 0 || message.layers[index - 1].layer < layer.layer;
            if !ascends || layer.layer as usize >= LAYERS_MAX {
                return Err(PlacementError::Layer { index, layer: layer.layer });
            }
            layers.insert(LayerId(layer.layer as u8), experts_of(layer, expected, workers.len())?);
        }
        let (term, urgent) = (message.term, message.urgent);
        Ok(Self { epoch: Epoch(message.epoch), term, urgent, workers, layers })
    }
}

fn experts_of(layer: &v1::LayerPlacement, expected: usize, workers: usize) -> Result<Vec<Vec<u32>>, PlacementError> {
    let experts = layer.experts.len();
    if experts != expected || experts == 0 || experts > EXPERTS_MAX {
        return Err(PlacementError::Experts { layer: layer.layer, experts, expected });
    }
    let valid = |holders: &[u32]| {
        // More holders than workers cannot be distinct, and are not compared.
        let may_be = (1..=workers).contains(&holders.len()) && holders.iter().all(|&w| (w as usize) < workers);
        may_be && holders.iter().collect::<BTreeSet<_>>().len() == holders.len()
    };
    for (expert, holders) in layer.experts.iter().enumerate() {
        if !valid(&holders.workers) {
            let (count, holders) = (holders.workers.len(), holders.workers.iter().copied().take(SHOWN_MAX).collect());
            return Err(PlacementError::Holders { layer: layer.layer, expert, count, holders, workers });
        }
    }
    Ok(layer.experts.iter().map(|holders| holders.workers.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> v1::Placement {
        let experts = vec![v1::Holders { workers: vec![0] }, v1::Holders { workers: vec![0, 1] }];
        v1::Placement {
            epoch: 1,
            workers: vec!["a".into(), "b".into()],
            layers: vec![v1::LayerPlacement { layer: 3, experts }],
            term: 7,
            urgent: true,
        }
    }

    #[test]
    fn a_valid_placement_comes_back_as_it_was_and_lists_shards() {
        let placement = Placement::try_from(&message()).unwrap();
        assert_eq!(placement.to_proto(), message());
        assert_eq!(placement.holders(LayerId(3), ExpertId(1)), [0, 1]);
        assert!(placement.holders(LayerId(4), ExpertId(1)).is_empty());
        let shard = placement.shard(&WorkerId::new("b").unwrap());
        assert_eq!(shard, BTreeMap::from([(LayerId(3), vec![ExpertId(1)])]));
        assert!(placement.shard(&WorkerId::new("c").unwrap()).is_empty());
        assert_eq!(["a", "b", "c"].map(|id| placement.held_by(&WorkerId::new(id).unwrap())), [2, 1, 0]);
        let holders: Vec<_> = placement.experts_of_layers().collect();
        let layer = LayerId(3);
        assert_eq!(holders, [(layer, ExpertId(0), &[0][..]), (layer, ExpertId(1), &[0, 1][..])]);
        assert!(placement.is_covered(|worker| worker == 0) && !placement.is_covered(|worker| worker == 1));
        assert!(placement.is_for(&[3], 2) && !placement.is_for(&[3, 4], 2) && !placement.is_for(&[3], 3));
    }

    #[test]
    fn a_message_that_breaks_a_rule_is_refused_with_its_place() {
        type Break = fn(&mut v1::Placement);
        let table: [(Break, &str); 7] = [
            (|m| m.epoch = 0, "epoch is 0"),
            (|m| m.workers[1] = "a".into(), "workers[1]"),
            (|m| m.workers[1] = "B_".into(), "workers[1]"),
            (|m| m.layers[0].layer = 256, "layers[0].layer is 256"),
            (|m| m.layers.push(m.layers[0].clone()), "layers[1].layer is 3"),
            (|m| m.layers[0].experts[1].workers = vec![1, 1], "expert 1 has 2 holders that begin with [1, 1]"),
            (|m| m.layers[0].experts[0].workers = vec![2], "expert 0 has 1 holders that begin with [2]"),
        ];
        for (break_it, expected) in table {
            let mut bad = message();
            break_it(&mut bad);
            let error = Placement::try_from(&bad).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
