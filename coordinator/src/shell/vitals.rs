//! What a coordinator tells on the port for probes and metrics.

use std::sync::Arc;

use moesaic_node::metrics::Page;
use moesaic_node::vitals::{Detail, Vitals};
use moesaic_node::{Registry, View};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;
use tokio_util::sync::CancellationToken;

use super::leader::Leading;
use super::service::Service;
use crate::core::exposure::Exposure;

pub struct Front {
    pub id: WorkerId,
    pub service: Arc<Service>,
    pub leading: Arc<Leading>,
    pub registry: Arc<dyn Registry>,
    pub stop: CancellationToken,
}

impl Vitals for Front {
    /// It serves from the moment at which it is there.
    fn has_started(&self) -> bool {
        true
    }

    fn not_ready(&self) -> Option<String> {
        if self.stop.is_cancelled() {
            return Some("the coordinator is stopping".into());
        }
        self.service.workers.not_ready().borrow().clone()
    }

    fn metrics(&self, page: &mut Page, detail: Detail) {
        let help = "Sequences that run or wait, and the most that may.";
        page.gauge("moesaic_sequences", help, self.service.sequences());
        page.gauge("moesaic_ready", "1 if a token could be produced.", u8::from(self.not_ready().is_none()));
        self.service.figures.write(page);
        let view = self.registry.view().borrow().clone();
        self.cluster(page, &view);
        self.placement(page, &view, detail);
    }
}

impl Front {
    fn cluster(&self, page: &mut Page, view: &View) {
        let reachable = u8::from(view.is_current);
        page.gauge("moesaic_registry_reachable", "0 while the last view is in force.", reachable);
        let mut members = page.gauges("moesaic_members", "Nodes that are registered.");
        for (role, name) in [
            (Role::Coordinator, "coordinator"),
            (Role::AttentionWorker, "attention-worker"),
            (Role::ExpertWorker, "expert-worker"),
        ] {
            members.sample(&[("role", name)], view.of_role(role).count());
        }
        let leads = view.leader.as_ref().is_some_and(|leader| leader.id == self.id);
        page.gauge("moesaic_leader", "1 at the coordinator that places the experts.", u8::from(leads));
        let term = view.leader.as_ref().map_or(0, |leader| leader.term);
        page.gauge("moesaic_leader_term", "Grows from leader to leader; 0 while there is none.", term);
        let silent = self.service.workers.loads().iter().filter(|(_, load)| load.is_none()).count();
        page.gauge("moesaic_attention_workers_silent", "Attention workers that do not answer.", silent);
        page.gauge("moesaic_workers_cordoned", "Workers that operators have cordoned.", view.cordons.len());
    }

    fn placement(&self, page: &mut Page, view: &View, detail: Detail) {
        let epoch = view.placement.as_ref().map_or(0, |placement| placement.epoch().0);
        page.gauge("moesaic_placement_epoch", "The placement in force; 0 for none.", epoch);
        let Exposure { lost, exposed } = self.leading.exposure(view);
        page.gauge("moesaic_experts_lost", "Experts, over all layers, that nobody serves.", lost);
        page.gauge("moesaic_experts_exposed", "Experts with fewer live holders than there should be.", exposed);
        self.leading.figures(page);
        if let (Detail::Experts, Some(placement)) = (detail, &view.placement) {
            let mut holders = page.gauges("moesaic_expert_holders", "Workers that hold an expert.");
            for (layer, expert, held_by) in placement.experts_of_layers() {
                holders.sample(&[("layer", &layer.to_string()), ("expert", &expert.to_string())], held_by.len());
            }
        }
    }
}
