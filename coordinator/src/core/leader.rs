//! The leader's mind: when the experts are placed anew, and over which workers. The plan itself is `placement`'s.
//!
//! What asks for a new placement, the most urgent first: experts that nobody has any more; a worker that is drained, or
//! that stops and has experts of its own; one that has gone (after a while: most come back); one that has joined; an
//! operator; a load that another placement would spread better. While the last placement is still being loaded only lost experts are placed anew, so
//! that workers never serve more than two of them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use moesaic_node::{Member, View};
use moesaic_proto::v1::{EdgeState, EdgeStatus, Role};
use moesaic_proto::{Epoch, LayerId, Placement, WorkerId};

use super::placement::planner::{Goal, Host, Load, MOVE_PAYS, Plan, PlanError, is_worth, plan};

/// A worker that no attention worker reaches for this long is taken for gone, registered or not.
const DOWN_AFTER: Duration = Duration::from_millis(1000);
/// From the loss of an expert's last copy to a placement: other news of the same fault comes meanwhile.
const LOST_AFTER: Duration = Duration::from_millis(200);
/// A worker that is gone is given this long to come back before its experts are copied again.
const GONE_AFTER: Duration = Duration::from_secs(10);
/// Workers that join in a row get one placement.
const JOINED_AFTER: Duration = Duration::from_secs(2);
/// How often a better placement for the measured load is looked for.
const BALANCE_EVERY: Duration = Duration::from_secs(60);
/// A placement that some worker has not loaded by then is not waited for.
const SETTLED_AFTER: Duration = Duration::from_secs(120);
/// After a plan that failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What a placement is to be like.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Layers with routed experts.
    pub layers: Vec<LayerId>,
    pub experts: usize,
    pub groups: usize,
    pub replicas: usize,
    /// Expert workers that the first placement waits for.
    pub workers: usize,
}

/// An expert worker as it is registered and reached.
#[derive(Clone, Debug)]
pub struct Seen {
    pub host: Host,
    pub epoch_loaded: Epoch,
    /// An operator drains it: it is to hold nothing.
    pub is_drained: bool,
    /// It is about to stop, and may be back soon.
    pub is_stopping: bool,
    /// It keeps what it has and gets nothing new.
    pub is_cordoned: bool,
    /// No attention worker reaches it at the moment.
    pub is_down: bool,
}

impl Seen {
    fn is_leaving(&self) -> bool {
        self.is_drained || self.is_stopping
    }
}

/// Expert workers as a view has them. `edges` are those of all attention workers: who has some, and is reached over none,
/// is down. A worker that says nothing of its slots has `slots`, and no worker has more.
pub fn seen<'a>(
    members: impl Iterator<Item = &'a Member>,
    view: &View,
    edges: impl Iterator<Item = &'a EdgeStatus>,
    slots: usize,
) -> Vec<Seen> {
    let mut reached: BTreeMap<&str, bool> = BTreeMap::new();
    for edge in edges {
        let is_reached = !matches!(edge.state(), EdgeState::Down | EdgeState::Silent);
        *reached.entry(&edge.worker).or_insert(false) |= is_reached;
    }
    let seen = |member: &Member| {
        let cordon = view.cordons.get(&(Role::ExpertWorker, member.id.clone()));
        let slots = if member.expert_slots == 0 { slots } else { (member.expert_slots as usize).min(slots) };
        Seen {
            host: Host { id: member.id.clone(), node: member.node.clone(), slots, weight: 1.0 },
            epoch_loaded: member.epoch_loaded,
            is_drained: cordon.is_some_and(|cordon| cordon.drain),
            is_stopping: member.draining,
            is_cordoned: cordon.is_some(),
            is_down: reached.get(member.id.as_str()).is_some_and(|is_reached| !is_reached),
        }
    };
    members.map(seen).collect()
}

/// What the leader goes by.
pub struct Sight<'a> {
    pub workers: &'a [Seen],
    pub placement: Option<&'a Placement>,
    pub load: &'a Load,
}

/// Why the experts are placed anew, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    First,
    Lost,
    Leaving,
    Gone,
    Joined,
    Asked,
    Load,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "the first placement",
            Self::Lost => "experts were lost",
            Self::Leaving => "a worker is leaving",
            Self::Gone => "a worker is gone",
            Self::Joined => "a worker has joined",
            Self::Asked => "an operator asked for it",
            Self::Load => "the load has changed",
        })
    }
}

/// See the module.
pub struct Leader {
    policy: Policy,
    /// Workers that nobody reaches, since when.
    down: BTreeMap<WorkerId, Duration>,
    /// Reasons that there are, since when.
    reasons: BTreeMap<Why, Duration>,
    published: Option<Duration>,
    /// When a better placement for the load was last looked for.
    balanced: Duration,
    failed: Option<Duration>,
    is_asked: bool,
}

impl Leader {
    /// Begins to lead at `now`.
    pub fn new(policy: Policy, now: Duration) -> Self {
        let (down, reasons) = (BTreeMap::new(), BTreeMap::new());
        Self { policy, down, reasons, published: None, balanced: now, failed: None, is_asked: false }
    }

    /// An operator wants a new placement.
    pub fn ask(&mut self) {
        self.is_asked = true;
    }

    /// The placement to publish now, if there is to be one, and why.
    pub fn decide(&mut self, now: Duration, sight: &Sight<'_>) -> Result<Option<(Plan, Why)>, PlanError> {
        self.look(now, sight);
        let may_plan = self.failed.is_none_or(|failed| now >= failed + RETRY_AFTER);
        let Some(why) = self.due(now, sight).filter(|_| may_plan) else { return Ok(None) };
        let planned = self.plan(now, sight, why);
        self.failed = planned.is_err().then_some(now);
        let planned = planned?;
        self.reasons.remove(&why);
        self.is_asked &= why != Why::Asked;
        if matches!(why, Why::Load | Why::Asked) {
            self.balanced = now;
        }
        let is_new = |plan: &Plan| sight.placement.is_none_or(|in_force| differ(in_force, &plan.placement));
        let pays = |plan: &Plan| why != Why::Load || is_worth(plan);
        let Some(plan) = planned.filter(|plan| is_new(plan) && pays(plan)) else { return Ok(None) };
        self.published = Some(now);
        let placement = plan.placement.with_urgency(why == Why::Lost);
        Ok(Some((Plan { placement, ..plan }, why)))
    }

    /// What would be placed if it were done now.
    pub fn plan(&self, now: Duration, sight: &Sight<'_>, why: Why) -> Result<Option<Plan>, PlanError> {
        let Policy { layers, experts, groups, replicas, .. } = &self.policy;
        // What is missing is wanted soon: nothing else is moved then.
        let move_pays = if why <= Why::Gone { f64::INFINITY } else { MOVE_PAYS };
        let goal = Goal { layers, experts: *experts, groups: *groups, replicas: *replicas, move_pays };
        let stays = sight.workers.iter().filter(|seen| !seen.is_leaving() && self.is_present(now, seen));
        let hosts = stays.map(|seen| match sight.placement {
            Some(placement) if seen.is_cordoned => {
                Host { slots: placement.held_by(&seen.host.id), ..seen.host.clone() }
            }
            _ => seen.host.clone(),
        });
        let hosts: Vec<Host> = hosts.filter(|host| host.slots > 0).collect();
        plan(&goal, &hosts, sight.load, sight.placement)
    }

    fn is_present(&self, now: Duration, seen: &Seen) -> bool {
        self.down.get(&seen.host.id).is_none_or(|since| now < *since + DOWN_AFTER)
    }

    /// Takes note of what has changed.
    fn look(&mut self, now: Duration, sight: &Sight<'_>) {
        self.down.retain(|id, _| sight.workers.iter().any(|seen| seen.is_down && seen.host.id == *id));
        for seen in sight.workers.iter().filter(|seen| seen.is_down) {
            self.down.entry(seen.host.id.clone()).or_insert(now);
        }
        let reasons = self.standing_reasons(now, sight);
        self.reasons.retain(|why, _| reasons.contains(why));
        for why in reasons {
            self.reasons.entry(why).or_insert(now);
        }
    }

    fn standing_reasons(&self, now: Duration, sight: &Sight<'_>) -> Vec<Why> {
        let Some(placement) = sight.placement else {
            let there = sight.workers.iter().filter(|seen| !seen.is_leaving()).count();
            return Vec::from_iter((there >= self.policy.workers).then_some(Why::First));
        };
        let seen = |id: &WorkerId| sight.workers.iter().find(|seen| seen.host.id == *id);
        let is_present = |id: &WorkerId| seen(id).is_some_and(|seen| self.is_present(now, seen));
        let present: Vec<bool> = placement.workers().iter().map(is_present).collect();
        let stays = |id: &WorkerId| is_present(id) && seen(id).is_some_and(|seen| !seen.is_leaving());
        let staying: Vec<bool> = placement.workers().iter().map(stays).collect();
        let lacks_any = |among: &[bool]| !placement.is_covered(|worker| among[worker as usize]);
        let is_drained = |id: &WorkerId| seen(id).is_some_and(|seen| seen.is_drained) && placement.held_by(id) > 0;
        let is_new = |seen: &Seen| {
            let is_open = !seen.is_leaving() && !seen.is_cordoned && self.is_present(now, seen);
            is_open && !placement.workers().contains(&seen.host.id)
        };
        let is_lost = lacks_any(&present);
        let reasons = [
            (Why::Lost, is_lost),
            (Why::Leaving, !is_lost && lacks_any(&staying) || placement.workers().iter().any(is_drained)),
            (Why::Gone, present.contains(&false)),
            (Why::Joined, sight.workers.iter().any(is_new)),
            (Why::Asked, self.is_asked),
            (Why::Load, now >= self.balanced + BALANCE_EVERY),
        ];
        reasons.into_iter().filter(|(_, is_there)| *is_there).map(|(why, _)| why).collect()
    }

    /// The most urgent reason that has lasted long enough.
    fn due(&self, now: Duration, sight: &Sight<'_>) -> Option<Why> {
        let is_settled = self.is_settled(now, sight);
        let is_due = |(why, since): &(&Why, &Duration)| {
            let after = match why {
                Why::Lost => LOST_AFTER,
                Why::Gone => GONE_AFTER,
                Why::Joined => JOINED_AFTER,
                Why::First | Why::Leaving | Why::Asked | Why::Load => Duration::ZERO,
            };
            now >= **since + after && (is_settled || **why == Why::Lost)
        };
        self.reasons.iter().find(is_due).map(|(why, _)| *why)
    }

    /// Whether everybody who is there has loaded the placement in force.
    fn is_settled(&self, now: Duration, sight: &Sight<'_>) -> bool {
        let Some(placement) = sight.placement else { return true };
        let is_behind = |seen: &Seen| {
            placement.workers().contains(&seen.host.id)
                && seen.epoch_loaded < placement.epoch()
                && self.is_present(now, seen)
        };
        self.published.is_some_and(|published| now >= published + SETTLED_AFTER) || !sight.workers.iter().any(is_behind)
    }
}

/// Whether two placements place anything differently.
fn differ(a: &Placement, b: &Placement) -> bool {
    a.workers() != b.workers() || !a.experts_of_layers().eq(b.experts_of_layers())
}

#[cfg(test)]
mod tests;
