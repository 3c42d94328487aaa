//! A worker's life: plan the memory, load, register, follow the placement, serve, stop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_dispatch::nccl::{self, Fabric};
use moesaic_dispatch::{CombineOps, DispatchConfig, Dispatcher, Holder};
use moesaic_kernels::{Backend, Dtype, Numerics, add, combine_first, combine_next};
use moesaic_model::Checkpoint;
use moesaic_node::server::{self, set_serving, with_health_and_reflection};
use moesaic_node::vitals::{self, Vitals};
use moesaic_node::{Connector, Member, View, handshake};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::{Hello, Role};
use moesaic_worker::WorkerSettings;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::server::HealthReporter;

use super::requests::Requests;
use super::service::{NAME, Service};
use super::vitals::Figures;
use crate::config::Config;
use crate::core::batcher::Limits;
use crate::engine::cpu::Cpu;
use crate::engine::gpu::{self, Gpu};
use crate::engine::handle::EngineHandle;
use crate::engine::memory::MemoryPlan;
use crate::engine::profile::Profile;
use crate::engine::thread::{self, Ended};
use crate::engine::weights::Weights;

/// How often the edges to expert workers are looked at: what a change of health is late by.
const HEALTH_INTERVAL: Duration = Duration::from_millis(50);

/// How often it is asked which sequences nobody has resumed in time.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);

/// A step is over by then.
const ENGINE_END: Duration = Duration::from_secs(2);

pub type Context = moesaic_worker::Context<Profile>;

/// One worker as a process of its own: opens what the config names, then runs.
pub async fn start(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    let worker = config.worker.clone();
    let run = |context| run(config, context, stop);
    moesaic_worker::start(&worker, Role::AttentionWorker, "moesaic-attention-worker", run).await
}

/// Serves until `stop`; then takes nothing new, lets running sequences finish within the bound, and leaves.
pub fn run(config: Config, context: Context, stop: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(async move {
        config.validate()?;
        let WorkerSettings { member, listen, node, drain_seconds, .. } = &config.worker;
        let Context { membership, hub, backend, fabric, checkpoint, profile } = context;
        let registry = &membership.registry;
        // Dropped, and so ended, with this function.
        let mut tasks = JoinSet::new();
        let (tell, told) = watch::channel(None);
        if let Some(listener) = vitals::bind(member.metrics_listen)? {
            tasks.spawn(vitals::answer(listener, told));
        }
        let id = membership.id(member.id.as_deref(), "attention")?;
        let (numerics, device) = (backend.numerics(), backend.device());
        let hello =
            Hello { nccl: nccl::version_of(fabric.as_ref()), ..own_hello(&config, &checkpoint, &numerics, &id) };
        let dispatch = dispatch_config(&config, &checkpoint, hello.clone(), membership.connector(), fabric);
        let dispatcher = Dispatcher::new(dispatch, hub);
        let counted = profile.clone();
        let (engine, ended) = start_engine(&config, &checkpoint, backend.clone(), dispatcher.clone(), profile).await?;
        let ended = ended.shared();

        let bound = server::bind(*listen)?;
        let address = member.advertise.clone().unwrap_or_else(|| bound.address().to_string());
        let requests = Requests::new(Duration::from_secs(config.orphan_seconds));
        let figures = Arc::new(Figures {
            engine: engine.observer().clone(),
            dispatcher: dispatcher.clone(),
            checkpoint: checkpoint.clone(),
            backend,
            profile: counted.clone(),
            requests: requests.clone(),
            is_registered: AtomicBool::new(false),
            stop: stop.clone(),
        });
        tell.send_replace(Some(figures.clone() as Arc<dyn Vitals>));
        let service = Service {
            hello: hello.clone(),
            checkpoint: checkpoint.clone(),
            engine,
            dispatcher: dispatcher.clone(),
            waiting_max: config.waiting_max,
            profile: counted,
            stop: stop.clone(),
            requests: requests.clone(),
        };
        let (routes, reporter) = with_health_and_reflection(Routes::new(service.server()), NAME).await;
        let drain = Duration::from_secs(*drain_seconds);
        let serve = bound.serve(routes, membership.tls.clone(), stop.clone(), drain);

        tasks.spawn(follow(registry.view(), checkpoint.clone(), dispatcher.clone()));
        tasks.spawn(report_health(checkpoint, dispatcher, reporter, stop.clone()));
        tasks.spawn(sweep(requests));
        let known = Member::new(hello, id.clone(), address.clone(), node.as_deref());
        let registration = registry.register(known).await?;
        figures.is_registered.store(true, Ordering::Relaxed);
        tracing::info!(%id, address, numerics, device, "attention worker serves");
        let leave = async {
            stop.cancelled().await;
            // First of all, so that coordinators send no more.
            registration.leave().await;
            Ok(())
        };
        let panicked = async {
            let _ = ended.clone().await;
            // After a stop it has ended because nobody holds it any more.
            if stop.is_cancelled() {
                std::future::pending().await
            }
        };
        tokio::select! {
            served = async { tokio::try_join!(serve, leave) } => drop(served?),
            () = panicked => anyhow::bail!("the engine thread has ended by itself: see above"),
        }
        // With the service gone nobody holds the engine; experts are needed until it has put down what it computes.
        if tokio::time::timeout(ENGINE_END, ended).await.is_err() {
            tracing::warn!("the engine thread is still at work");
        }
        tracing::info!(%id, "attention worker stopped");
        Ok(())
    })
}

fn own_hello(config: &Config, checkpoint: &Checkpoint, numerics: &str, id: &WorkerId) -> Hello {
    let (role, fingerprint) = (Role::AttentionWorker, checkpoint.fingerprint());
    let mut hello = handshake::hello(&config.worker.member.cluster, role, id, fingerprint, numerics);
    // Tells this worker's frames from others' in logs; streams keep them apart anyhow.
    hello.source = (hello.incarnation & u64::from(u16::MAX)) as u32;
    hello.expert_numerics = config.expert_numerics.clone().unwrap_or_default();
    hello
}

fn dispatch_config(
    config: &Config,
    checkpoint: &Checkpoint,
    hello: Hello,
    connector: Connector,
    fabric: Option<Arc<dyn Fabric>>,
) -> DispatchConfig {
    let model = checkpoint.config();
    DispatchConfig {
        hidden: model.hidden_size,
        experts: model.n_routed_experts,
        groups: model.logical_groups(),
        source: hello.source as u16,
        layer_deadline: Duration::from_millis(config.layer_deadline_ms),
        hello,
        connector,
        fabric,
        ops: CombineOps { first: combine_first, next: combine_next, add },
    }
}

async fn start_engine(
    config: &Config,
    checkpoint: &Arc<Checkpoint>,
    backend: Backend,
    dispatcher: Dispatcher,
    profile: Arc<Profile>,
) -> anyhow::Result<(EngineHandle, Ended)> {
    let rows = config.micro_batches * config.token_budget;
    let numerics = match &backend {
        Backend::Cpu(numerics, _) => *numerics,
        // Weights and pages are of the same sizes there.
        Backend::Gpu(_) => Numerics::portable(Dtype::Bf16),
    };
    let plan = MemoryPlan::new(checkpoint, numerics, config.cache_size()?, rows)?;
    tracing::info!(%plan, "memory");
    let limits = Limits {
        pages: plan.pages,
        chunk: config.chunk,
        token_budget: config.token_budget,
        micro_batches: config.micro_batches,
        micro_batch_rows: config.micro_batch_rows,
        waiting_max: config.waiting_max,
    };
    let checkpoint = checkpoint.clone();
    let started = match backend {
        Backend::Cpu(numerics, pool) => {
            let load = tokio::task::spawn_blocking(move || Weights::load(checkpoint, numerics));
            let weights = Arc::new(load.await.context("loading the weights")??);
            thread::start(Cpu::new(weights, pool, limits.pages), dispatcher, limits, profile)
        }
        Backend::Gpu(device) => {
            let sizes = gpu::Limits { pages: limits.pages, rows: limits.token_budget };
            let load = tokio::task::spawn_blocking(move || Gpu::new(&checkpoint, device, sizes));
            let gpu = load.await.context("loading the weights")??;
            let (weights, cache) = gpu.bytes();
            tracing::info!(weights, cache, "loaded to the GPU");
            thread::start(gpu, dispatcher, limits, profile)
        }
    };
    started.context("starting the engine thread")
}

/// Keeps the dispatcher's placement and addresses as the registry has them, for as long as it is polled.
pub async fn follow(mut view: watch::Receiver<Arc<View>>, checkpoint: Arc<Checkpoint>, dispatcher: Dispatcher) {
    loop {
        let now = view.borrow_and_update().clone();
        if let Some(placement) = &now.placement {
            let model = checkpoint.config();
            match placement.is_for(&model.moe_layers(), model.n_routed_experts) {
                true => dispatcher.set_view(placement.clone(), &holders(&now)),
                false => tracing::error!(epoch = placement.epoch().0, "a placement of another model's experts"),
            }
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

/// The expert workers that are registered.
fn holders(view: &View) -> BTreeMap<WorkerId, Holder> {
    let holder = |member: &Member| Holder { address: member.address.clone(), epoch_loaded: member.epoch_loaded };
    view.of_role(Role::ExpertWorker).map(|member| (member.id.clone(), holder(member))).collect()
}

/// Forgets sequences that nobody has resumed in time, for as long as it is polled.
pub async fn sweep(requests: Requests) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        requests.sweep();
    }
}

/// Serving means that a token could be produced.
async fn report_health(
    checkpoint: Arc<Checkpoint>,
    dispatcher: Dispatcher,
    reporter: HealthReporter,
    stop: CancellationToken,
) {
    let mut before = false;
    loop {
        let now = !stop.is_cancelled() && Service::is_reachable(&checkpoint, &dispatcher);
        if now != before {
            tracing::info!(reachable = now, "experts");
            set_serving(&reporter, NAME, now).await;
            before = now;
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}
