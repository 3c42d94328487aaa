//! An engine over a fixture, with its expert workers in this process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use moesaic_attention_worker::core::batcher::{Counts, Finish, Limits, Request};
use moesaic_attention_worker::core::sampler::Sampling;
use moesaic_attention_worker::engine::cpu::Cpu;
use moesaic_attention_worker::engine::events::Event;
use moesaic_attention_worker::engine::handle::{EngineHandle, Running, Submit, Token};
use moesaic_attention_worker::engine::thread;
use moesaic_attention_worker::engine::weights::Weights;
use moesaic_dispatch::{CombineOps, DispatchConfig, Dispatcher, Holder, Hub};
use moesaic_kernels::{Numerics, Pool, add, combine_first, combine_next};
use moesaic_model::Checkpoint;
use moesaic_node::Connector;
use moesaic_proto::{Epoch, LayerId, Placement, WorkerId, v1};

use crate::experts::Experts;

pub const LIMITS: Limits =
    Limits { pages: 64, chunk: 64, token_budget: 128, micro_batches: 2, micro_batch_rows: 1, waiting_max: 64 };

pub fn fixture(name: &str) -> PathBuf {
    let folder = if name.starts_with("tiny") { "../crates/moesaic/models" } else { "../tests/fixtures" };
    Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(name)
}

/// What engines with different limits share.
pub struct Model {
    pub weights: Arc<Weights>,
    hub: Hub,
    placement: Arc<Placement>,
    holders: BTreeMap<WorkerId, Holder>,
}

impl Model {
    /// Expert `e` of every layer is on worker `e % workers`, so that hardly a worker has all of a row's experts.
    pub fn open(name: &str, numerics: Numerics, workers: usize) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(&fixture(name)).unwrap());
        let config = checkpoint.config();
        let (hub, mut ids) = (Hub::default(), Vec::new());
        for worker in 0..workers {
            let held: Vec<usize> = (worker..config.n_routed_experts).step_by(workers).collect();
            ids.push(WorkerId::new(&format!("experts-{worker}")).unwrap());
            hub.insert(ids[worker].clone(), Experts::start(&checkpoint, numerics, &held));
        }
        let holders: Vec<Vec<u32>> = (0..config.n_routed_experts).map(|e| vec![(e % workers) as u32]).collect();
        let layers = config.moe_layers().into_iter().map(|layer| (LayerId(layer as u8), holders.clone())).collect();
        let holder = || Holder { address: "here:1".into(), epoch_loaded: Epoch(1) };
        let registered = ids.iter().map(|id| (id.clone(), holder())).collect();
        let placement = Arc::new(Placement::new(Epoch(1), ids, layers).unwrap());
        let weights = Arc::new(Weights::load(checkpoint, numerics).unwrap());
        Self { weights, hub, placement, holders: registered }
    }

    pub fn hub(&self) -> Hub {
        self.hub.clone()
    }

    pub fn placement(&self) -> Arc<Placement> {
        self.placement.clone()
    }

    fn dispatcher(&self) -> Dispatcher {
        let config = self.weights.config();
        let config = DispatchConfig {
            hidden: config.hidden_size,
            experts: config.n_routed_experts,
            groups: config.logical_groups(),
            source: 1,
            layer_deadline: Duration::from_secs(10),
            hello: v1::Hello::default(),
            connector: Connector::default(),
            fabric: None,
            ops: CombineOps { first: combine_first, next: combine_next, add },
        };
        Dispatcher::new(config, Some(self.hub.clone()))
    }

    pub fn engine(&self, limits: Limits) -> EngineHandle {
        let dispatcher = self.dispatcher();
        dispatcher.set_view(self.placement.clone(), &self.holders);
        let cpu = Cpu::new(self.weights.clone(), Pool::new(2), limits.pages);
        thread::start(cpu, dispatcher, limits, Arc::default()).unwrap().0
    }

    /// An engine that reaches no expert.
    pub fn engine_alone(&self, limits: Limits) -> EngineHandle {
        let cpu = Cpu::new(self.weights.clone(), Pool::new(1), limits.pages);
        thread::start(cpu, self.dispatcher(), limits, Arc::default()).unwrap().0
    }
}

/// Waits until nothing runs and every page is free, as it must be within a second, and says what else is counted.
pub async fn wait_until_idle(engine: &EngineHandle) -> Counts {
    let idle = async {
        loop {
            let counts = engine.load().unwrap();
            if (counts.running, counts.waiting, counts.pages_free) == (0, 0, counts.pages_total) {
                return counts;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), idle).await.expect("all pages come back within a second")
}

/// Greedy, with all log-probabilities.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> Submit {
    Submit {
        request: Request { prompt: prompt.to_vec(), emitted: vec![], max_tokens, stop_tokens: vec![] },
        emitted: vec![],
        sampling: Sampling::default(),
        logprobs: Some(2),
        prompt_logprobs: Some(0),
        traceparent: None,
    }
}

/// Everything that a sequence answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub prompt: Vec<Token>,
    pub tokens: Vec<Token>,
    pub finish: Finish,
}

pub async fn answer(mut running: Running) -> Answer {
    let (mut all_prompt, mut tokens, mut first) = (Vec::new(), Vec::new(), 0);
    loop {
        let event = tokio::time::timeout(Duration::from_secs(60), running.events.next()).await.unwrap();
        match event.expect("a last event comes before the end") {
            Event::Token { index, token, prompt, finish } => {
                assert!(tokens.is_empty() || index == first + tokens.len());
                assert!(index == 0 || prompt.is_empty());
                if tokens.is_empty() {
                    first = index;
                }
                all_prompt.extend(prompt);
                tokens.push(token);
                if let Some(finish) = finish {
                    return Answer { prompt: all_prompt, tokens, finish };
                }
            }
            Event::Aborted => return Answer { prompt: all_prompt, tokens, finish: Finish::Aborted },
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

pub async fn run(engine: &EngineHandle, submit: Submit) -> Answer {
    answer(engine.submit(submit).await.unwrap()).await
}
