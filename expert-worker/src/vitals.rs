//! What an expert worker tells on the port for probes and metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use moesaic_node::metrics::Page;
use moesaic_node::vitals::{Detail, Vitals};
use moesaic_node::{Membership, View};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::RefusalReason;
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;

pub struct Figures {
    pub id: WorkerId,
    pub engine: Arc<Engine>,
    pub membership: Membership,
    /// It has once had all that it was given.
    pub has_started: AtomicBool,
    pub stop: CancellationToken,
}

impl Figures {
    /// What a placement gives it is in memory. A spare has nothing to load, nor has anybody before the first placement.
    fn has_loaded(&self, view: &View) -> bool {
        let Some(placement) = &view.placement else { return true };
        let loaded = self.engine.shards().newest().map(|(epoch, _)| epoch);
        placement.held_by(&self.id) == 0 || loaded.is_some()
    }
}

impl Vitals for Figures {
    fn has_started(&self) -> bool {
        if !self.has_started.load(Ordering::Relaxed) && self.has_loaded(&self.membership.registry.view().borrow()) {
            self.has_started.store(true, Ordering::Relaxed);
        }
        self.has_started.load(Ordering::Relaxed)
    }

    fn not_ready(&self) -> Option<String> {
        if self.stop.is_cancelled() {
            return Some("the worker is stopping".into());
        }
        (!self.has_started()).then(|| "its experts are loading".into())
    }

    fn metrics(&self, page: &mut Page, _: Detail) {
        let newest = self.engine.shards().newest();
        let epoch = newest.as_ref().map_or(0, |(epoch, _)| epoch.0);
        page.gauge("moesaic_placement_epoch", "The newest placement whose experts are loaded; 0 for none.", epoch);
        let experts = newest.as_ref().map_or(0, |(_, shard)| shard.expert_count());
        page.gauge("moesaic_experts", "Experts in memory, over all layers.", experts);
        let bytes = newest.as_ref().map_or(0, |(_, shard)| shard.bytes());
        page.gauge("moesaic_experts_bytes", "What they take.", bytes);
        page.gpu_memory(self.engine.backend().gpu_memory());
        page.gauge("moesaic_inbox_frames", "Frames that wait to be computed.", self.engine.waiting());
        let profile = self.engine.profile();
        page.counter("moesaic_expert_terms_total", "Rows times experts that were computed.", profile.rows());
        page.counter("moesaic_busy_seconds_total", "Time spent computing.", profile.busy().as_secs_f64());
        let mut refused = page.counters("moesaic_frames_refused_total", "Frames that were not computed.");
        for (reason, name) in [
            (RefusalReason::Malformed, "malformed"),
            (RefusalReason::Epoch, "epoch"),
            (RefusalReason::NotHeld, "not_held"),
            (RefusalReason::Busy, "busy"),
            (RefusalReason::Stopping, "stopping"),
        ] {
            refused.sample(&[("reason", name)], profile.refused(reason));
        }
    }
}
