//! An engine over a fixture, with its expert workers in this process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use moesaic_attention_worker::core::batcher::{Finish, Limits, Request};
use moesaic_attention_worker::core::sampler::Sampling;
use moesaic_attention_worker::engine::handle::{EngineHandle, Event, Running, Submit, Token};
use moesaic_attention_worker::engine::thread;
use moesaic_attention_worker::engine::weights::Weights;
use moesaic_dispatch::{CombineOps, DispatchConfig, Dispatcher, Hub};
use moesaic_kernels::{Numerics, Pool, add, combine_first, combine_next};
use moesaic_model::Checkpoint;
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
    addresses: BTreeMap<WorkerId, String>,
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
        let addresses = ids.iter().map(|id| (id.clone(), "here:1".into())).collect();
        let placement = Arc::new(Placement::new(Epoch(1), ids, layers).unwrap());
        let weights = Arc::new(Weights::load(checkpoint, numerics).unwrap());
        Self { weights, hub, placement, addresses }
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
            ops: CombineOps { first: combine_first, next: combine_next, add },
        };
        Dispatcher::new(config, Some(self.hub.clone()))
    }

    pub fn engine(&self, limits: Limits) -> EngineHandle {
        let dispatcher = self.dispatcher();
        dispatcher.set_view(self.placement.clone(), &self.addresses);
        thread::start(self.weights.clone(), dispatcher, Pool::new(2), limits, Arc::default()).unwrap().0
    }

    /// An engine that reaches no expert.
    pub fn engine_alone(&self, limits: Limits) -> EngineHandle {
        thread::start(self.weights.clone(), self.dispatcher(), Pool::new(1), limits, Arc::default()).unwrap().0
    }
}

/// Greedy, with all log-probabilities.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> Submit {
    Submit {
        request: Request { prompt: prompt.to_vec(), max_tokens, stop_tokens: vec![] },
        sampling: Sampling::default(),
        logprobs: Some(2),
        prompt_logprobs: Some(0),
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
    let (mut all_prompt, mut tokens) = (Vec::new(), Vec::new());
    loop {
        let event = tokio::time::timeout(Duration::from_secs(60), running.events.recv()).await.unwrap();
        match event.expect("a last event comes before the end") {
            Event::Token { index, token, prompt, finish } => {
                assert_eq!(index, tokens.len());
                assert!(index == 0 || prompt.is_empty());
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
