//! A cluster in this process: the roles' libraries over one registry, one table of experts and one device.

use std::sync::Arc;

use anyhow::Result;
use moesaic_attention_worker::engine::profile::Profile as AttentionProfile;
use moesaic_coordinator::Coordinator;
use moesaic_dispatch::Hub;
use moesaic_expert_worker::engine::Profile as ExpertProfile;
use moesaic_node::{Registry, config, registry};
use moesaic_worker::Context;

use crate::node::Node;
use crate::plan::Plan;
use crate::up::Cluster;

/// What the nodes share.
struct Shared {
    registry: Arc<dyn Registry>,
    /// None: rows go over loopback sockets, as between machines.
    hub: Option<Hub>,
    profiles: Profiles,
}

/// What all workers of a kind count together.
#[derive(Clone, Default)]
pub struct Profiles {
    pub attention: Arc<AttentionProfile>,
    pub experts: Arc<ExpertProfile>,
}

pub async fn start(plan: &Plan) -> Result<Cluster> {
    start_profiled(plan, Profiles::default(), true).await
}

/// `direct`: expert workers are called, not sent to.
pub async fn start_profiled(plan: &Plan, profiles: Profiles, direct: bool) -> Result<Cluster> {
    let spec = plan.args.registry.as_deref().unwrap_or("embedded");
    let registry = registry::open(spec, &plan.cluster).await?;
    // First of all, so that a port that is taken is said before anything is loaded.
    let coordinator = Coordinator::bind(
        config::load(None, plan.coordinator(spec, plan.args.listen).flags)?,
        moesaic_coordinator::Context { membership: registry.clone().into() },
    )?;
    let address = coordinator.address();
    let shared = Shared { registry: registry.clone(), hub: direct.then(Hub::default), profiles };
    let mut nodes = Vec::new();
    for flags in plan.expert_workers(spec) {
        let (name, config) = (flags.title(), config::load(None, flags.flags)?);
        let context = shared.context(plan, &shared.profiles.experts);
        nodes.push(Node::spawn(name, |stop| moesaic_expert_worker::run(config, context, stop)));
    }
    for flags in plan.attention_workers(spec) {
        let (name, config) = (flags.title(), config::load(None, flags.flags)?);
        let context = shared.context(plan, &shared.profiles.attention);
        nodes.push(Node::spawn(name, |stop| moesaic_attention_worker::run(config, context, stop)));
    }
    nodes.push(Node::spawn("coordinator c0", |stop| coordinator.serve(stop)));
    Ok(Cluster { nodes, membership: registry.into(), address })
}

impl Shared {
    fn context<P>(&self, plan: &Plan, profile: &Arc<P>) -> Context<P> {
        Context {
            membership: self.registry.clone().into(),
            hub: self.hub.clone(),
            backend: plan.backend.clone(),
            fabric: None,
            checkpoint: plan.checkpoint.clone(),
            profile: profile.clone(),
        }
    }
}
