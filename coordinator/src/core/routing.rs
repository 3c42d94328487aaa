//! Which attention worker takes a sequence: the least loaded of those that are alive, match the cluster's model and
//! reach every expert.
//!
//! The first worker seen fixes the model (fingerprint and numerics); others that differ are left out.

use std::collections::BTreeMap;

use moesaic_proto::WorkerId;
use moesaic_proto::v1::{Hello, LoadResponse, Role};

/// What makes two clusters' tokens the same; a worker knows its part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub fingerprint: String,
    /// Of attention workers.
    attention: Option<String>,
    /// Of expert workers.
    experts: Option<String>,
}

impl Identity {
    /// What a worker says of the cluster that it is for.
    pub fn of(hello: &Hello) -> Self {
        let (own, theirs) = (&hello.numerics, &hello.expert_numerics);
        let is_attention = hello.role() == Role::AttentionWorker;
        let experts = if is_attention && !theirs.is_empty() { theirs } else { own };
        Self {
            fingerprint: hello.fingerprint.clone(),
            attention: is_attention.then(|| own.clone()),
            experts: Some(experts.clone()),
        }
    }

    /// "bf16", or "bf16+bf16-sm_90a" where experts are computed otherwise.
    pub fn numerics(&self) -> String {
        match (&self.attention, &self.experts) {
            (Some(attention), Some(experts)) if attention != experts => format!("{attention}+{experts}"),
            (one, other) => one.as_ref().or(other.as_ref()).cloned().unwrap_or_default(),
        }
    }

    /// Whether both can be of one cluster; then what `other` knows is known here, too.
    fn join(&mut self, other: &Self) -> bool {
        let fit = |own: &Option<String>, other: &Option<String>| own.is_none() || other.is_none() || own == other;
        let fits = self.fingerprint == other.fingerprint
            && fit(&self.attention, &other.attention)
            && fit(&self.experts, &other.experts);
        if fits {
            self.attention = self.attention.take().or_else(|| other.attention.clone());
            self.experts = self.experts.take().or_else(|| other.experts.clone());
        }
        fits
    }
}

#[derive(Default)]
pub struct Router {
    identity: Option<Identity>,
    workers: BTreeMap<WorkerId, Worker>,
}

#[derive(Default)]
struct Worker {
    /// None until the worker has answered, and again when it does not answer any more.
    load: Option<LoadResponse>,
    is_cordoned: bool,
    /// Tokens of our sequences there: prompts and what they may still become.
    outstanding: u64,
}

impl Router {
    /// True if a member matches the model; the first one fixes it.
    pub fn accept(&mut self, identity: &Identity) -> bool {
        self.identity.get_or_insert_with(|| identity.clone()).join(identity)
    }

    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    pub fn add(&mut self, id: WorkerId) {
        self.workers.entry(id).or_default();
    }

    pub fn remove(&mut self, id: &WorkerId) {
        self.workers.remove(id);
    }

    /// The worker's answer to Load, or None if there was none.
    pub fn set_load(&mut self, id: &WorkerId, load: Option<LoadResponse>) {
        if let Some(worker) = self.workers.get_mut(id) {
            worker.load = load;
        }
    }

    pub fn load(&self, id: &WorkerId) -> Option<&LoadResponse> {
        self.workers.get(id)?.load.as_ref()
    }

    /// Workers that get no new sequences.
    pub fn set_cordoned(&mut self, is_cordoned: impl Fn(&WorkerId) -> bool) {
        self.workers.iter_mut().for_each(|(id, worker)| worker.is_cordoned = is_cordoned(id));
    }

    /// Whether any other worker could take a sequence.
    pub fn is_ready_without(&self, without: &WorkerId) -> bool {
        self.workers.iter().any(|(id, worker)| id != without && worker.is_ready())
    }

    /// The least loaded worker that is not in `tried`.
    pub fn pick(&self, tried: &[WorkerId]) -> Option<WorkerId> {
        let ready = self.workers.iter().filter(|(id, worker)| worker.is_ready() && !tried.contains(id));
        // Shares of different capacities are compared by cross multiplication: no rounding, ties by id.
        let (id, _) = ready.min_by(|(_, a), (_, b)| {
            let (a, b) = ((a.used(), a.capacity()), (b.used(), b.capacity()));
            (u128::from(a.0) * u128::from(b.1)).cmp(&(u128::from(b.0) * u128::from(a.1)))
        })?;
        Some(id.clone())
    }

    /// Counts a sequence's tokens on a worker until `release`.
    pub fn hold(&mut self, id: &WorkerId, tokens: u64) {
        if let Some(worker) = self.workers.get_mut(id) {
            worker.outstanding += tokens;
        }
    }

    /// A sequence has ended.
    pub fn release(&mut self, id: &WorkerId, tokens: u64) {
        if let Some(worker) = self.workers.get_mut(id) {
            worker.outstanding = worker.outstanding.saturating_sub(tokens);
        }
    }

    /// Tokens that the largest latent cache holds, among the workers that have answered.
    pub fn capacity_max(&self) -> Option<u64> {
        self.workers.values().filter(|worker| worker.load.is_some()).map(Worker::capacity).max()
    }

    /// Why no token could be produced; None if one could.
    pub fn not_ready(&self) -> Option<String> {
        if self.workers.values().any(Worker::is_ready) {
            return None;
        }
        let answering = self.workers.values().filter(|worker| worker.load.is_some()).count();
        Some(match (self.workers.len(), answering) {
            (0, _) => "no attention worker is registered".into(),
            (known, 0) => format!("none of {known} attention workers answers"),
            (_, answering) => format!("no attention worker reaches every expert ({answering} answer)"),
        })
    }
}

impl Worker {
    fn is_ready(&self) -> bool {
        !self.is_cordoned && self.load.as_ref().is_some_and(|load| load.experts_reachable && !load.draining)
    }

    fn capacity(&self) -> u64 {
        self.load.as_ref().map_or(0, |load| u64::from(load.pages_total) * u64::from(load.page_tokens)).max(1)
    }

    /// Our own count is newer than the worker's; the worker's has other coordinators' sequences too.
    fn used(&self) -> u64 {
        let tokens = |load: &LoadResponse| {
            u64::from(load.pages_total.saturating_sub(load.pages_free)) * u64::from(load.page_tokens)
        };
        self.outstanding.max(self.load.as_ref().map_or(0, tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> WorkerId {
        WorkerId::new(name).unwrap()
    }

    fn load(pages_total: u32, pages_free: u32) -> Option<LoadResponse> {
        Some(LoadResponse { pages_total, pages_free, page_tokens: 64, experts_reachable: true, ..Default::default() })
    }

    fn router(workers: &[(&str, Option<LoadResponse>)]) -> Router {
        let mut router = Router::default();
        for (name, load) in workers {
            router.add(id(name));
            router.set_load(&id(name), load.clone());
        }
        router
    }

    #[test]
    fn sequences_spread_by_outstanding_tokens_and_come_back() {
        let mut router = router(&[("a", load(10, 10)), ("b", load(10, 10))]);
        for (tokens, expected) in [(100, "a"), (10, "b"), (10, "b")] {
            assert_eq!(router.pick(&[]), Some(id(expected)));
            router.hold(&id(expected), tokens);
        }
        router.release(&id("a"), 100);
        assert_eq!(router.pick(&[]), Some(id("a")));
        assert_eq!(router.pick(&[id("a"), id("b")]), None);
        router.set_cordoned(|worker| *worker == id("a"));
        assert_eq!(router.pick(&[]), Some(id("b")), "a is cordoned");
        router.set_load(&id("b"), load(10, 10).map(|load| LoadResponse { draining: true, ..load }));
        assert_eq!(router.pick(&[]), None, "b is draining");
    }

    #[test]
    fn the_share_of_the_cache_counts_not_the_tokens() {
        let router = router(&[("large", load(100, 60)), ("small", load(10, 5))]);
        assert_eq!(router.pick(&[]), Some(id("large")), "40 of 100 pages against 5 of 10");
        assert_eq!(router.capacity_max(), Some(6400));
    }

    #[test]
    fn health_says_what_is_missing() {
        let unreachable = load(1, 1).map(|load| LoadResponse { experts_reachable: false, ..load });
        let table = [
            (router(&[]), Some("no attention worker is registered")),
            (router(&[("a", None)]), Some("none of 1 attention workers answers")),
            (router(&[("a", unreachable)]), Some("no attention worker reaches every expert (1 answer)")),
            (router(&[("a", load(1, 1)), ("b", None)]), None),
        ];
        for (router, expected) in table {
            assert_eq!(router.not_ready().as_deref(), expected);
        }
    }

    #[test]
    fn the_first_worker_fixes_the_model() {
        let worker = |role: Role, fingerprint: &str, numerics: &str, expert_numerics: &str| {
            let (fingerprint, numerics) = (fingerprint.into(), numerics.into());
            let expert_numerics = expert_numerics.into();
            Identity::of(&Hello { role: role.into(), fingerprint, numerics, expert_numerics, ..Hello::default() })
        };
        let (experts, attention) = (Role::ExpertWorker, Role::AttentionWorker);
        let mut router = Router::default();
        assert!(router.accept(&worker(experts, "one", "gpu", "")));
        assert!(!router.accept(&worker(experts, "two", "gpu", "")));
        assert!(!router.accept(&worker(experts, "one", "cpu", "")), "a replica with other bits");
        assert!(!router.accept(&worker(attention, "one", "cpu", "")), "its experts would have to be cpu");
        assert!(router.accept(&worker(attention, "one", "cpu", "gpu")));
        assert!(!router.accept(&worker(attention, "one", "gpu", "")), "attention is cpu by now");
        assert!(router.accept(&worker(experts, "one", "gpu", "")));
        assert_eq!(router.identity().unwrap().numerics(), "cpu+gpu");
        let mut router = Router::default();
        assert!(router.accept(&worker(attention, "one", "cpu", "")));
        assert!(router.accept(&worker(experts, "one", "cpu", "")));
        assert_eq!(router.identity().unwrap().numerics(), "cpu");
    }
}
