//! When a worker that is to stop may go: as soon as nobody needs it.

use moesaic_node::View;
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;

/// Whether everything that a worker holds can be asked of others, or nobody is there who could take it over.
pub fn may_leave(view: &View, id: &WorkerId) -> bool {
    is_alone(view, id) || is_covered(view, id)
}

/// Whether every expert that a worker holds in the placement in force has another holder that has loaded it.
pub fn is_covered(view: &View, id: &WorkerId) -> bool {
    let Some(placement) = &view.placement else { return true };
    let has_it = |worker: &WorkerId| worker != id && view.has_loaded(worker, placement);
    let have_it: Vec<bool> = placement.workers().iter().map(has_it).collect();
    placement.is_covered(|worker| have_it[worker as usize])
}

fn is_alone(view: &View, id: &WorkerId) -> bool {
    view.leader.is_none() || view.of_role(Role::ExpertWorker).all(|member| member.id == *id || member.draining)
}
