//! The coordinator that leads writes the placements: `core::leader` decides, from the registry's view and from what the
//! attention workers answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moesaic_node::metrics::Page;
use moesaic_node::{Registry, View};
use moesaic_proto::v1::{ExpertLoadRequest, RebalanceResponse, Role};
use moesaic_proto::{Epoch, Placement};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::workers::Workers;
use crate::core::ApiError;
use crate::core::expert_load::ExpertLoad;
use crate::core::exposure::{Exposure, exposure};
use crate::core::leader::{Leader, Policy, Seen, Sight, Why, seen};
use crate::core::placement::planner::{Load, Plan, PlanError};

/// How often it is looked whether anything has changed.
const TICK: Duration = Duration::from_millis(100);
/// How often the experts' load is read.
const LOAD_INTERVAL: Duration = Duration::from_secs(5);
const LOAD_TIMEOUT: Duration = Duration::from_secs(1);
/// After the registry has refused a placement.
const PUBLISH_RETRY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Leading {
    workers: Arc<Workers>,
    registry: Arc<dyn Registry>,
    policy: Policy,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// While this coordinator leads.
    leader: Option<Leader>,
    load: ExpertLoad,
    /// Placements that this coordinator has published, and what workers had to load for them.
    published: u64,
    moved: u64,
    last: Option<LastPlan>,
    /// The placement in force, whoever made it, and the one before it.
    in_force: Option<Arc<Placement>>,
    before: Option<Arc<Placement>>,
}

/// What the last of them was for, and brought.
#[derive(Clone, Copy)]
struct LastPlan {
    epoch: Epoch,
    why: Why,
    moved: usize,
    /// The most loaded worker's load over the mean, before and as it was planned.
    before: f64,
    after: f64,
}

impl Leading {
    pub fn new(workers: Arc<Workers>, registry: Arc<dyn Registry>, policy: Policy) -> Self {
        Self { workers, registry, policy, started: Instant::now(), state: Mutex::default() }
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Leads while it has a term; for as long as it is polled.
    pub async fn run(self: Arc<Self>, mut term: watch::Receiver<Option<u64>>) {
        loop {
            let led = *term.borrow_and_update();
            self.lock().leader = led.map(|_| Leader::new(self.policy.clone(), self.started.elapsed()));
            // A term that begins from now on is another turn's, which has a leader for it.
            while let Some(led) = led
                && *term.borrow() == Some(led)
            {
                if !self.step(led).await {
                    sleep(PUBLISH_RETRY).await;
                }
                sleep(TICK).await;
            }
            if term.changed().await.is_err() {
                return;
            }
        }
    }

    /// False if a placement could not be published.
    async fn step(&self, term: u64) -> bool {
        let view = self.workers.view().borrow().clone();
        let decided = {
            let mut state = self.lock();
            let State { leader, load, .. } = &mut *state;
            let Some(leader) = leader else { return true };
            let seen = self.seen(&view);
            let sight = Sight { workers: &seen, placement: view.placement.as_deref(), load: load.smoothed() };
            leader.decide(self.started.elapsed(), &sight)
        };
        let (plan, why) = match decided {
            Ok(Some(decided)) => decided,
            Ok(None) => return true,
            // A cluster that begins.
            Err(PlanError::NoHosts) if view.placement.is_none() => {
                tracing::info!("the experts wait for workers");
                return true;
            }
            Err(error) => {
                tracing::error!(%error, "the experts cannot be placed");
                return true;
            }
        };
        let Plan { placement, moved, imbalance_before, imbalance, .. } = plan;
        let (epoch, workers) = (placement.epoch(), placement.workers().len());
        match self.registry.publish(placement.with_term(term)).await {
            Ok(true) => {
                tracing::info!(%epoch, ?why, workers, moved, imbalance_before, imbalance, "the experts are placed");
                let mut state = self.lock();
                state.published += 1;
                state.moved += moved as u64;
                let before = imbalance_before.unwrap_or(imbalance);
                state.last = Some(LastPlan { epoch, why, moved, before, after: imbalance });
                true
            }
            Ok(false) => {
                tracing::warn!(%epoch, ?why, "another placement was first, or another coordinator leads");
                false
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the placement could not be published");
                false
            }
        }
    }

    /// Reads the experts' load, for as long as it is polled.
    pub async fn measure(self: Arc<Self>) {
        loop {
            sleep(LOAD_INTERVAL).await;
            for (id, mut client) in self.workers.clients() {
                if let Ok(Ok(counted)) = timeout(LOAD_TIMEOUT, client.expert_load(ExpertLoadRequest {})).await {
                    self.lock().load.take(&id, counted.into_inner());
                }
            }
            self.lock().load.end_interval();
        }
    }

    /// Plans anew now: says what it comes to, and has it done unless it is a dry run. `None` if this coordinator does not
    /// lead.
    pub fn rebalance(&self, dry_run: bool) -> Option<Result<RebalanceResponse, ApiError>> {
        let view = self.workers.view().borrow().clone();
        let mut state = self.lock();
        let State { leader, load, .. } = &mut *state;
        let leader = leader.as_mut()?;
        let seen = self.seen(&view);
        let sight = Sight { workers: &seen, placement: view.placement.as_deref(), load: load.smoothed() };
        let planned = leader.plan(self.started.elapsed(), &sight, Why::Asked);
        if !dry_run && planned.is_ok() {
            leader.ask();
        }
        let answer = |plan: Option<Plan>| {
            let plan = plan.ok_or_else(|| ApiError::invalid("model", "has no routed experts to place"))?;
            let is_moved = plan.moved > 0 || view.placement.is_none();
            let in_force = view.placement.as_ref().map_or(0, |placement| placement.epoch().0);
            Ok(RebalanceResponse {
                epoch: if is_moved { plan.placement.epoch().0 } else { in_force },
                moved: plan.moved as u32,
                imbalance_before: plan.imbalance_before.unwrap_or(plan.imbalance),
                imbalance_after: plan.imbalance,
            })
        };
        Some(planned.map_err(|error| ApiError::Unavailable { reason: error.to_string() }).and_then(answer))
    }

    /// What the placement of this epoch was for, and brought, in words, if it is the last one of this coordinator.
    pub fn why_placed(&self, epoch: u32) -> Option<String> {
        let LastPlan { why, moved, before, after, .. } = self.lock().last.filter(|last| last.epoch.0 == epoch)?;
        Some(format!("{moved} experts to load; {why}: imbalance {before:.2} → {after:.2}"))
    }

    /// The experts' load, as it is measured.
    pub fn load<R>(&self, read: impl FnOnce(&Load) -> R) -> R {
        read(self.lock().load.smoothed())
    }

    /// What this coordinator has done as the leader.
    pub fn figures(&self, page: &mut Page) {
        let (published, moved, last) = {
            let state = self.lock();
            (state.published, state.moved, state.last)
        };
        page.counter("moesaic_placements_total", "Placements that this coordinator has published.", published);
        page.counter("moesaic_experts_moved_total", "Experts that workers had to load for them.", moved);
        if let Some(LastPlan { before, after, .. }) = last {
            let help = "The most loaded worker's load over the mean, by the plan that was made last.";
            let mut family = page.gauges("moesaic_placement_imbalance", help);
            family.sample(&[("when", "before")], before).sample(&[("when", "after")], after);
        }
    }

    /// Experts that are lost, or could be.
    pub fn exposure(&self, view: &View) -> Exposure {
        let Some(placement) = &view.placement else { return Exposure::default() };
        let before = {
            let mut state = self.lock();
            if state.in_force.as_ref().is_none_or(|known| known.epoch() != placement.epoch()) {
                state.before = state.in_force.replace(placement.clone());
            }
            state.before.clone()
        };
        let before = before.filter(|before| self.workers.is_used(before.epoch()));
        exposure(placement, before.as_deref(), &self.seen(view), self.policy.replicas)
    }

    /// The expert workers of this model.
    pub fn seen(&self, view: &View) -> Vec<Seen> {
        let loads = self.workers.loads();
        let edges = loads.iter().filter_map(|(_, load)| load.as_ref()).flat_map(|load| &load.edges);
        let experts = view.of_role(Role::ExpertWorker).filter(|member| self.workers.accepts(member));
        seen(experts, view, edges, self.policy.layers.len() * self.policy.experts)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
