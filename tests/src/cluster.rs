//! A cluster in this process: the roles' libraries over one registry, as `moesaic up` runs them, with every knob that
//! must not change a token.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use moesaic_attention_worker as attention_worker;
use moesaic_coordinator as coordinator;
use moesaic_dispatch::Hub;
use moesaic_dispatch::nccl::Fabric;
use moesaic_dispatch::nccl::fake::FakeFabric;
use moesaic_expert_worker as expert_worker;
use moesaic_kernels::cuda::Device;
use moesaic_kernels::{Backend, DtypeChoice, Pool};
use moesaic_model::Checkpoint;
use moesaic_node::MemberSettings;
use moesaic_node::{Registry, registry};
use moesaic_proto::v1::Role;
use moesaic_proto::v1::attention_worker_client::AttentionWorkerClient;
use moesaic_proto::v1::inference_client::InferenceClient;
use moesaic_proto::v1::{GenerateRequest, LoadRequest, LoadResponse};
use moesaic_worker::WorkerSettings;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

use crate::fixtures;
use crate::requests::Answer;

/// How attention workers reach expert workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Local,
    Grpc,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub model: PathBuf,
    pub dtype: &'static str,
    pub attention_workers: usize,
    pub expert_workers: usize,
    pub transport: Transport,
    pub threads: usize,
    pub chunk: usize,
    pub token_budget: usize,
    pub micro_batches: usize,
    pub cache_tokens: usize,
    pub sequences_max: usize,
    /// Workers that hold each expert.
    pub replicas: usize,
    /// A GPU that attention workers compute on, and one for expert workers; none: the processor.
    pub attention_gpu: Option<Device>,
    pub experts_gpu: Option<Device>,
    /// Rows travel over it, where they do not stay in the process.
    pub fabric: Option<FakeFabric>,
}

impl Options {
    pub fn new(model: &str, dtype: &'static str) -> Self {
        Self {
            model: fixtures::folder(model),
            dtype,
            attention_workers: 1,
            expert_workers: 2,
            transport: Transport::Local,
            threads: 2,
            chunk: 128,
            token_budget: 256,
            micro_batches: 2,
            cache_tokens: 16_384,
            sequences_max: 1024,
            replicas: 1,
            attention_gpu: None,
            experts_gpu: None,
            fabric: None,
        }
    }
}

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until it is so, and not for longer than that.
pub async fn until(patience: Duration, is_so: impl AsyncFn() -> bool) {
    let look = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(patience, look).await.expect("it becomes so");
}

pub struct Cluster {
    pub client: InferenceClient<Channel>,
    /// "http://host:port"
    pub url: String,
    pub registry: Arc<dyn Registry>,
    stop: CancellationToken,
    nodes: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Cluster {
    /// Returns when a token could be produced.
    pub fn start(options: &Options) -> BoxFuture<'_, Self> {
        Box::pin(async move {
            let registry = registry::open("embedded", "test").await.unwrap();
            let checkpoint = Arc::new(Checkpoint::open(&options.model).unwrap());
            let hub = (options.transport == Transport::Local).then(Hub::default);
            let pool = Pool::new(options.threads);
            let backend = |gpu: &Option<Device>| match gpu {
                Some(device) => Backend::Gpu(device.clone()),
                None => Backend::Cpu(options.dtype.parse::<DtypeChoice>().unwrap().numerics(), pool.clone()),
            };
            let (attention, experts) = (backend(&options.attention_gpu), backend(&options.experts_gpu));
            // A worker's rows lie where it computes.
            let fabric = |gpu: &Option<Device>| -> Option<Arc<dyn Fabric>> {
                let fabric = options.fabric.clone()?;
                Some(Arc::new(gpu.clone().map_or(fabric.clone(), |gpu| fabric.on(gpu))))
            };
            let (attention_fabric, experts_fabric) = (fabric(&options.attention_gpu), fabric(&options.experts_gpu));
            let expert_numerics = (attention.numerics() != experts.numerics()).then(|| experts.numerics());
            let worker = |id| WorkerSettings {
                member: MemberSettings::named(id, "test"),
                dtype: options.dtype.into(),
                ..Default::default()
            };
            let stop = CancellationToken::new();
            let mut nodes = Vec::new();
            for i in 0..options.expert_workers {
                let config = expert_worker::Config { worker: worker(format!("e{i}")), ..Default::default() };
                let context = expert_worker::Context {
                    membership: registry.clone().into(),
                    hub: hub.clone(),
                    backend: experts.clone(),
                    fabric: experts_fabric.clone(),
                    checkpoint: checkpoint.clone(),
                    profile: Arc::default(),
                };
                nodes.push(tokio::spawn(expert_worker::run(config, context, stop.clone())));
            }
            for i in 0..options.attention_workers {
                let config = attention_worker::Config {
                    worker: worker(format!("a{i}")),
                    chunk: options.chunk,
                    token_budget: options.token_budget,
                    micro_batches: options.micro_batches,
                    // Few and small requests fill several.
                    micro_batch_rows: 1,
                    cache_tokens: Some(options.cache_tokens),
                    expert_numerics: expert_numerics.clone(),
                    ..Default::default()
                };
                let context = attention_worker::Context {
                    membership: registry.clone().into(),
                    hub: hub.clone(),
                    backend: attention.clone(),
                    fabric: attention_fabric.clone(),
                    checkpoint: checkpoint.clone(),
                    profile: Arc::default(),
                };
                nodes.push(tokio::spawn(attention_worker::run(config, context, stop.clone())));
            }
            let config = coordinator::Config {
                model: Some(options.model.clone()),
                member: MemberSettings::named("c0", "test"),
                listen: ([127, 0, 0, 1], 0).into(),
                expert_workers: options.expert_workers,
                replicas: options.replicas,
                sequences_max: options.sequences_max,
                ..Default::default()
            };
            let context = coordinator::Context { membership: registry.clone().into() };
            let coordinator = coordinator::Coordinator::bind(config, context).unwrap();
            let url = format!("http://{}", coordinator.address());
            nodes.push(tokio::spawn(coordinator.serve(stop.clone())));
            let client = InferenceClient::connect(url.clone()).await.unwrap();
            let cluster = Self { client, url, registry, stop, nodes };
            cluster.until_ready(options.attention_workers).await;
            cluster
        })
    }

    async fn until_ready(&self, attention_workers: usize) {
        let ready = async {
            while !reqwest::get(format!("{}/health", self.url)).await.is_ok_and(|answer| answer.status() == 200)
                || self.loads().await.iter().filter(|load| load.experts_reachable).count() < attention_workers
            {
                if let Some(ended) = self.nodes.iter().find(|node| node.is_finished()) {
                    panic!("a node has ended: {:?}", ended.id());
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("the cluster becomes ready");
    }

    /// What each attention worker says of its room.
    pub fn loads(&self) -> BoxFuture<'_, Vec<LoadResponse>> {
        Box::pin(async move {
            let view = self.registry.view().borrow().clone();
            let mut loads = Vec::new();
            for member in view.of_role(Role::AttentionWorker) {
                let mut client = AttentionWorkerClient::connect(format!("http://{}", member.address)).await.unwrap();
                loads.push(client.load(LoadRequest {}).await.unwrap().into_inner());
            }
            loads
        })
    }

    pub fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Answer, Status>> {
        Box::pin(async move { Answer::read(self.client.clone().generate(request).await?.into_inner()).await })
    }

    /// One after the other.
    pub async fn alone(&self, requests: &[GenerateRequest]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for request in requests {
            answers.push(self.generate(request.clone()).await.unwrap());
        }
        answers
    }

    pub async fn at_once(&self, requests: &[GenerateRequest]) -> Vec<Answer> {
        let answers = requests.iter().map(|request| self.generate(request.clone()));
        futures::future::join_all(answers).await.into_iter().map(Result::unwrap).collect()
    }

    /// Every node must end by itself and well.
    pub async fn stop(self) {
        self.stop.cancel();
        for node in self.nodes {
            tokio::time::timeout(PATIENCE, node).await.expect("a node stops").unwrap().unwrap();
        }
    }
}
