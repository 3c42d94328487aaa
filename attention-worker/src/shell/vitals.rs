//! What an attention worker tells on the port for probes and metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use moesaic_dispatch::Dispatcher;
use moesaic_kernels::{Backend, PAGE_TOKENS};
use moesaic_model::Checkpoint;
use moesaic_node::metrics::Page;
use moesaic_node::vitals::{Detail, Vitals};
use moesaic_proto::v1::EdgeState;
use tokio_util::sync::CancellationToken;

use super::requests::Requests;
use super::service::Service;
use crate::engine::handle::Observer;
use crate::engine::profile::{Part, Profile};

/// Experts that are named one by one where not all are asked for.
const HOTTEST: usize = 8;

pub struct Figures {
    /// Does not keep the engine alive.
    pub engine: Observer,
    pub dispatcher: Dispatcher,
    pub checkpoint: Arc<Checkpoint>,
    pub backend: Backend,
    pub profile: Arc<Profile>,
    pub requests: Requests,
    /// Others know where it is.
    pub is_registered: AtomicBool,
    pub stop: CancellationToken,
}

impl Vitals for Figures {
    /// Its weights are loaded, and it is known.
    fn has_started(&self) -> bool {
        self.is_registered.load(Ordering::Relaxed)
    }

    fn not_ready(&self) -> Option<String> {
        let reason = if !self.has_started() {
            "the worker is starting"
        } else if self.stop.is_cancelled() {
            "the worker is stopping"
        } else if self.engine.counts().is_none() {
            "the engine has ended"
        } else if !Service::is_reachable(&self.checkpoint, &self.dispatcher) {
            "some experts cannot be reached"
        } else {
            return None;
        };
        Some(reason.into())
    }

    fn metrics(&self, page: &mut Page, detail: Detail) {
        self.cache_and_steps(page);
        page.gpu_memory(self.backend.gpu_memory());
        self.dispatch(page);
        self.edges(page);
        self.experts(page, detail);
    }
}

impl Figures {
    fn cache_and_steps(&self, page: &mut Page) {
        if let Some(counts) = self.engine.counts() {
            let used = counts.pages_total - counts.pages_free;
            page.gauge("moesaic_cache_pages", "Pages of the latent cache.", counts.pages_total);
            page.gauge("moesaic_cache_pages_used", "Pages of the latent cache that sequences have.", used);
            page.gauge("moesaic_cache_page_tokens", "Tokens that a page of the latent cache holds.", PAGE_TOKENS);
            page.gauge("moesaic_sequences_running", "Sequences that have pages.", counts.running);
            page.gauge("moesaic_sequences_waiting", "Sequences that wait for pages.", counts.waiting);
            let help = "Sequences that gave up their pages for others and start again.";
            page.counter("moesaic_preemptions_total", help, counts.preemptions);
        }
        let help = "Sequences whose coordinator is gone, kept for another one to resume.";
        page.gauge("moesaic_sequences_orphaned", help, self.requests.orphans());
        let counts = self.profile.counts();
        page.counter("moesaic_micro_batches_total", "Micro-batches that were computed.", counts.steps);
        page.counter("moesaic_micro_batch_rows_total", "Tokens in the micro-batches.", counts.rows);
        let help = "Distinct experts that micro-batches asked for, over all layers.";
        page.counter("moesaic_micro_batch_experts_total", help, counts.experts);
        let mut family = page.counters("moesaic_step_seconds_total", "Where the engine's time has gone.");
        for part in Part::ALL {
            let name = format!("{part:?}").to_lowercase();
            family.sample(&[("part", &name)], counts.of(part).as_secs_f64());
        }
    }

    fn dispatch(&self, page: &mut Page) {
        let counts = self.dispatcher.counts();
        page.counter("moesaic_frames_sent_total", "Frames sent to expert workers.", counts.sent);
        let help = "Of those, frames that left over lanes before it was known which experts they ask.";
        page.counter("moesaic_frames_ahead_total", help, counts.ahead);
        page.counter("moesaic_frames_resent_total", "Frames sent again after a loss.", counts.resent);
        let help = "Frames sent to a second holder because the first was late.";
        page.counter("moesaic_frames_hedged_total", help, counts.hedged);
        page.counter("moesaic_terms_total", "Rows times experts in all frames.", counts.terms);
        page.counter("moesaic_terms_hedged_total", "Rows times experts that were sent twice.", counts.terms_hedged);
        let dropped =
            [("unmatched", counts.unmatched), ("misdirected", counts.misdirected), ("rejected", counts.rejected)];
        let help = "Answers dropped: nobody waited for them, another worker sent them, or they did not fit.";
        let mut family = page.counters("moesaic_answers_dropped_total", help);
        for (why, count) in dropped {
            family.sample(&[("why", why)], count);
        }
        page.gauge("moesaic_frames_outstanding", "Frames that wait for their answers.", self.dispatcher.outstanding());
        let epoch = self.dispatcher.epoch().map_or(0, |epoch| epoch.0);
        page.gauge("moesaic_placement_epoch", "The placement that rows are sent under; 0 for none.", epoch);
        let reachable = Service::is_reachable(&self.checkpoint, &self.dispatcher);
        page.gauge("moesaic_experts_reachable", "1 if every expert can be reached.", u8::from(reachable));
    }

    fn edges(&self, page: &mut Page) {
        let edges = self.dispatcher.edges();
        let mut states =
            page.gauges("moesaic_edge_state", "The state of the way to an expert worker: 1 for the one it has.");
        for edge in &edges {
            for (state, name) in [
                (EdgeState::Live, "live"),
                (EdgeState::Slow, "slow"),
                (EdgeState::Silent, "silent"),
                (EdgeState::Down, "down"),
            ] {
                states.sample(&[("worker", &edge.worker), ("state", name)], u8::from(edge.state() == state));
            }
        }
        let mut answers =
            page.gauges("moesaic_edge_answer_seconds", "How long a frame takes to be answered, smoothed.");
        for edge in &edges {
            answers.sample(&[("worker", &edge.worker)], f64::from(edge.answer_us) / 1e6);
        }
        let mut terms = page.counters("moesaic_edge_terms_total", "Rows times experts that a worker has answered.");
        for edge in &edges {
            terms.sample(&[("worker", &edge.worker)], edge.terms);
        }
        let mut transports =
            page.gauges("moesaic_edge_transport", "What frames to an expert worker travel by at present.");
        for edge in &edges {
            transports.sample(&[("worker", &edge.worker), ("transport", &edge.transport)], 1);
        }
        let help = "Bytes of frames to and from an expert worker of another process.";
        let mut bytes = page.counters("moesaic_edge_bytes_total", help);
        for edge in &edges {
            for (direction, count) in [("sent", edge.sent_bytes), ("received", edge.received_bytes)] {
                bytes.sample(&[("worker", &edge.worker), ("direction", direction)], count);
            }
        }
        let mut failures = page.counters("moesaic_lane_failures_total", "Lanes from GPU to GPU that have failed.");
        for edge in &edges {
            failures.sample(&[("worker", &edge.worker)], edge.lane_failures);
        }
    }

    /// How evenly the gate chooses: the spread of each layer, and the experts that are chosen most; or all.
    fn experts(&self, page: &mut Page, detail: Detail) {
        let layers: Vec<(usize, Vec<u64>)> = self.engine.experts().read().collect();
        let mean = |rows: &[u64]| (rows.iter().sum::<u64>() as f64 / rows.len().max(1) as f64).max(1.0);
        let help = "Rows of the expert that a layer chooses most over the mean of the layer's experts.";
        let mut spread = page.gauges("moesaic_expert_rows_max_over_mean", help);
        for (layer, rows) in &layers {
            let max = rows.iter().copied().max().unwrap_or(0) as f64;
            spread.sample(&[("layer", &layer.to_string())], max / mean(rows));
        }
        let mut experts: Vec<(u64, usize, usize)> = Vec::new();
        for (layer, rows) in &layers {
            experts.extend(rows.iter().enumerate().map(|(expert, rows)| (*rows, *layer, expert)));
        }
        if detail == Detail::Nodes {
            let hottest = HOTTEST.min(experts.len());
            if hottest < experts.len() {
                experts.select_nth_unstable_by(hottest, |a, b| b.cmp(a));
            }
            experts.truncate(hottest);
        }
        let help = "Rows that chose an expert: of those that are chosen most, or with ?experts=all of all.";
        let mut chosen = page.counters("moesaic_expert_rows_total", help);
        for (rows, layer, expert) in experts {
            chosen.sample(&[("layer", &layer.to_string()), ("expert", &expert.to_string())], rows);
        }
    }
}
