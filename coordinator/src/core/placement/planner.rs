//! The planner: which expert worker holds which experts. A function of hosts, load and the plan in force: the same
//! input gives the same plan, in whatever order the hosts come.
//!
//! In order of importance: every expert has a copy; as many as asked for, on different nodes; what is there stays; in
//! every layer the most loaded worker has little more than the mean (layers run one after the other); the experts of a
//! group stay together. `draft` has the single steps, `turns` the order of an expert's holders.

use std::collections::{BTreeMap, BTreeSet};

use moesaic_proto::{Epoch, ExpertId, LayerId, Placement, PlacementError, WorkerId};

use super::draft::Draft;
use super::turns;

/// A layer whose most loaded worker has at most this much of the mean stays as it is, and gets no further copies.
pub const EVEN: f64 = 1.05;
/// How even a layer is made where something has to be done: a distance from `EVEN`, so that small changes of load move
/// nothing.
pub const EVEN_GOAL: f64 = 1.02;
/// The usual `Goal::move_pays`; also what a further copy has to take off.
pub const MOVE_PAYS: f64 = 0.02;
/// In its place while there is no plan in force, so that moving costs nothing.
const FIRST_MOVE_PAYS: f64 = 0.001;
/// Rounds of repairing and balancing. Hardly ever is a third one needed.
const ROUNDS_MAX: usize = 16;
/// A plan pays if the greatest load falls by this share, and by `REPLAN_PAYS_ALL` more if all copies move (in
/// proportion if some do).
pub const REPLAN_PAYS: f64 = 0.05;
pub const REPLAN_PAYS_ALL: f64 = 0.1;

/// An expert worker that may hold experts.
#[derive(Clone, Debug)]
pub struct Host {
    pub id: WorkerId,
    /// Failure domain: the copies of an expert stand on different ones where that is possible.
    pub node: String,
    /// Experts that it can hold, over all layers.
    pub slots: usize,
    /// Relative speed; 1.0 is usual.
    pub weight: f64,
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Goal<'a> {
    /// Layers with routed experts.
    pub layers: &'a [LayerId],
    /// Routed experts a layer.
    pub experts: usize,
    /// Logical groups of `experts.div_ceil(groups)` experts. A group stays on one worker where that costs no balance:
    /// who has all of a row's experts of a group answers one sum instead of several rows.
    pub groups: usize,
    /// Copies that every expert should have, at least 1.
    pub replicas: usize,
    /// What each expert that a worker must load has to take off its layer's most loaded worker, in shares of the mean
    /// load: `MOVE_PAYS`, or infinity to repair and leave the rest as it is.
    pub move_pays: f64,
}

/// Rows that each expert got, smoothed. A layer that is missing or has none counts as even, and gets no copies beyond
/// `replicas`.
pub type Load = BTreeMap<LayerId, Vec<f64>>;

#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Of the epoch after the plan in force. Its workers are all hosts, by id.
    pub placement: Placement,
    /// Experts that workers must load, and copies in the placement, over all layers.
    pub moved: usize,
    pub copies: usize,
    /// The greatest load of a worker over the mean, averaged over the layers: expected of the plan in force (by those
    /// of its workers that are still there) and of this one.
    pub imbalance_before: Option<f64>,
    pub imbalance: f64,
    /// Experts with fewer than `replicas` copies, or copies on fewer nodes than there could be.
    pub under_replicated: usize,
    /// The plan in force names workers that have left, or asks too much of one, or misses copies that could be there,
    /// or a worker has nothing yet: this plan is needed whatever it gains.
    pub repairs: bool,
}

/// Why nothing can be planned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    #[error("there are no expert workers")]
    NoHosts,
    #[error("worker {worker} has a weight of {weight}; expected a positive number")]
    Weight { worker: WorkerId, weight: f64 },
    #[error("the load of layer {layer} has {experts} experts; expected {expected}")]
    Load { layer: LayerId, experts: usize, expected: usize },
    #[error(
        "the workers have room for {slots} experts; one copy of each needs {needed} ({layers} layers of {experts})"
    )]
    TooFewSlots { slots: usize, needed: usize, layers: usize, experts: usize },
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

/// Plans the placement; None for a model without routed experts. What `in_force` has on the hosts stays where moving it
/// does not pay (`Goal::move_pays`) and no rule is broken.
pub fn plan(
    goal: &Goal<'_>,
    hosts: &[Host],
    load: &Load,
    in_force: Option<&Placement>,
) -> Result<Option<Plan>, PlanError> {
    let layers: BTreeSet<LayerId> = goal.layers.iter().copied().collect();
    if layers.is_empty() || goal.experts == 0 {
        return Ok(None);
    }
    let mut hosts: Vec<&Host> = hosts.iter().collect();
    hosts.sort_by(|a, b| a.id.cmp(&b.id));
    check(goal, layers.len(), &hosts, load)?;

    let mut draft = Draft::new(goal, &hosts, layers.iter().map(|layer| load.get(layer).map(Vec::as_slice)));
    let is_stale = in_force.is_some_and(|placement| adopt(&mut draft, &layers, &hosts, placement));
    let before = draft.clone();
    let is_first = before.copies() == 0;
    let is_overfull = draft.shed();
    if is_first {
        draft.lay_out();
        draft.fill();
        draft.balance(EVEN_GOAL, FIRST_MOVE_PAYS);
    }
    let (mut idle, pays) = (before.idle(), goal.move_pays.max(FIRST_MOVE_PAYS));
    // Until nothing changes, so that the next plan finds nothing to change either.
    for _ in 0..ROUNDS_MAX {
        if !(draft.fill() | draft.share_with(&idle) | draft.balance(EVEN, pays)) {
            break;
        }
        idle = draft.idle();
    }
    let weights: Vec<f64> = hosts.iter().map(|host| host.weight).collect();
    for layer in &mut draft.layers {
        turns::arrange(&mut layer.holders, &layer.load, &weights, draft.group_size);
    }

    let under_replicated = draft.under_replicated();
    let has_newcomer = before.idle().len() > draft.idle().len();
    let repairs = is_first || is_stale || is_overfull || has_newcomer || under_replicated < before.under_replicated();
    let (moved, copies) = (draft.moved_since(&before), draft.copies());
    let (imbalance, imbalance_before) = (draft.imbalance(), (!is_first).then(|| before.imbalance()));
    let epoch = Epoch(in_force.map_or(0, |placement| placement.epoch().0).saturating_add(1));
    let holders = layers.into_iter().zip(draft.layers.into_iter().map(|layer| layer.holders)).collect();
    let placement = Placement::new(epoch, hosts.iter().map(|host| host.id.clone()).collect(), holders)?;
    Ok(Some(Plan { placement, moved, copies, imbalance_before, imbalance, under_replicated, repairs }))
}

impl Plan {
    /// Share by which the greatest load falls against the plan in force; negative if it rises, 0 if there is none.
    pub fn gain(&self) -> f64 {
        self.imbalance_before.map_or(0.0, |before| 1.0 - self.imbalance / before)
    }
}

/// Whether a plan should replace the one in force: it repairs something, or its gain pays for what must be loaded
/// (`REPLAN_PAYS`, `REPLAN_PAYS_ALL`).
pub fn is_worth(plan: &Plan) -> bool {
    let moved = plan.moved as f64 / plan.copies.max(1) as f64;
    plan.repairs || plan.gain() >= REPLAN_PAYS + REPLAN_PAYS_ALL * moved
}

fn check(goal: &Goal<'_>, layers: usize, hosts: &[&Host], load: &Load) -> Result<(), PlanError> {
    if hosts.is_empty() {
        return Err(PlanError::NoHosts);
    }
    if let Some(host) = hosts.iter().find(|host| !(host.weight.is_finite() && host.weight > 0.0)) {
        return Err(PlanError::Weight { worker: host.id.clone(), weight: host.weight });
    }
    let wrong = |(_, rows): &(&LayerId, &Vec<f64>)| rows.len() != goal.experts;
    if let Some((layer, rows)) = load.iter().filter(|(layer, _)| goal.layers.contains(layer)).find(wrong) {
        return Err(PlanError::Load { layer: *layer, experts: rows.len(), expected: goal.experts });
    }
    let needed = layers * goal.experts;
    let slots = hosts.iter().map(|host| host.slots.min(needed)).sum();
    if slots < needed {
        return Err(PlanError::TooFewSlots { slots, needed, layers, experts: goal.experts });
    }
    Ok(())
}

/// Takes over what the plan in force has on the hosts. True if it names other workers too.
fn adopt(draft: &mut Draft, layers: &BTreeSet<LayerId>, hosts: &[&Host], placement: &Placement) -> bool {
    let host_of = |worker: &WorkerId| hosts.binary_search_by(|host| host.id.cmp(worker)).ok();
    let host_of: Vec<Option<usize>> = placement.workers().iter().map(host_of).collect();
    let mut is_stale = false;
    for (layer, id) in layers.iter().enumerate() {
        for expert in 0..draft.experts() {
            for worker in placement.holders(*id, ExpertId(expert as u16)) {
                match host_of[*worker as usize] {
                    Some(host) => draft.add(layer, expert, host),
                    None => is_stale = true,
                }
            }
        }
    }
    is_stale
}

#[cfg(test)]
mod tests;
