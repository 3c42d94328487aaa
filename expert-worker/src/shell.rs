//! A worker's life: register, load what the placement gives it, serve, hand over, stop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use moesaic_dispatch::nccl;
use moesaic_dispatch::{Shape, grpc};
use moesaic_kernels::Backend;
use moesaic_model::{Checkpoint, ModelError, load};
use moesaic_node::server::{self, set_serving, with_health_and_reflection};
use moesaic_node::{Member, Registration, Registry, handshake, vitals};
use moesaic_proto::v1::Role;
use moesaic_proto::{Epoch, ExpertId, LayerId, Placement};
use moesaic_worker::WorkerSettings;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::server::HealthReporter;

use crate::config::Config;
use crate::core::handover::{is_covered, may_leave};
use crate::engine::{Engine, Profile};
use crate::experts::{Expert, Loader};
use crate::shard::Shard;
use crate::vitals::Figures;

/// The service's name in health checks.
pub const NAME: &str = "moesaic.v1.Experts";

/// Between two tries to load a placement's experts.
const LOAD_RETRY_MIN: Duration = Duration::from_secs(1);
const LOAD_RETRY_MAX: Duration = Duration::from_secs(30);
/// How often it is asked whether the old epoch is over.
const RETIRE_INTERVAL: Duration = Duration::from_secs(2);
/// From a placement that this worker is not needed for to the last rows that were sent under the one before.
const MOVED_ON: Duration = Duration::from_millis(500);

pub type Context = moesaic_worker::Context<Profile>;

/// One worker as a process of its own: opens what the config names, then runs.
pub async fn start(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    let worker = config.worker.clone();
    moesaic_worker::start(&worker, Role::ExpertWorker, "moesaic-expert-worker", |context| run(config, context, stop))
        .await
}

/// Serves until `stop`; then waits until others have what it alone had, leaves, answers what it has in hand, all within
/// the bound, and ends.
pub fn run(config: Config, context: Context, stop: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(async move {
        config.validate()?;
        let WorkerSettings { member, listen, node, drain_seconds, .. } = &config.worker;
        let Context { membership, hub, backend, fabric, checkpoint, profile } = context;
        let registry = &membership.registry;
        let id = membership.id(member.id.as_deref(), "experts")?;
        let (numerics, device) = (backend.numerics(), backend.device());
        let mut hello = handshake::hello(&member.cluster, Role::ExpertWorker, &id, checkpoint.fingerprint(), &numerics);
        hello.nccl = nccl::version_of(fabric.as_ref());
        let model = checkpoint.config();
        let shape = Shape { hidden: model.hidden_size, experts: model.n_routed_experts };
        let (engine, ended) = Engine::start(shape, backend.clone(), config.inbox_frames, profile)
            .context("starting the compute thread")?;

        let bound = server::bind(*listen)?;
        let watched = vitals::bind(member.metrics_listen)?;
        let address = member.advertise.clone().unwrap_or_else(|| bound.address().to_string());
        let closing = CancellationToken::new();
        let service = grpc::service(engine.clone(), fabric, hello.clone(), closing.clone());
        let (routes, reporter) = with_health_and_reflection(Routes::new(service), NAME).await;
        let drain = Duration::from_secs(*drain_seconds);
        let serve = bound.serve(routes, membership.tls.clone(), closing.clone(), drain);
        if let Some(hub) = &hub {
            hub.insert(id.clone(), engine.clone());
        }

        let known = Member::new(hello, id.clone(), address.clone(), node.as_deref());
        let known = Member { expert_slots: config.expert_slots, ..known };
        let registration = registry.register(known.clone()).await?;
        tracing::info!(%id, address, numerics, device, "expert worker serves");
        let figures = Figures {
            id: id.clone(),
            engine: engine.clone(),
            membership: membership.clone(),
            has_started: AtomicBool::new(false),
            stop: stop.clone(),
        };
        // Ends with this function.
        let mut tasks = JoinSet::new();
        if let Some(listener) = watched {
            tasks.spawn(vitals::answer(listener, vitals::told(figures)));
        }
        let follower = Follower {
            member: known,
            backend,
            checkpoint,
            engine: engine.clone(),
            reporter: reporter.clone(),
            bytes_per_second: config.load_mib_per_second << 20,
        };
        let live = async {
            tokio::select! {
                failed = follower.follow(&**registry, &registration) => return failed,
                () = stop.cancelled() => {}
            }
            let handed_over = timeout(drain, follower.hand_over(&**registry, &registration)).await;
            if handed_over.is_err() {
                tracing::warn!(seconds = drain.as_secs(), "nobody else has loaded what this worker alone holds");
            }
            set_serving(&reporter, NAME, false).await;
            // Before anything is refused, so that attention workers send no more.
            registration.leave().await;
            closing.cancel();
            engine.stop();
            Ok(())
        };
        let panicked = async {
            let _ = ended.await;
            // After a stop it has ended because it was told to.
            if closing.is_cancelled() {
                std::future::pending().await
            }
        };
        let result = tokio::select! {
            lived = async { tokio::try_join!(async { Ok(serve.await?) }, live) } => lived.map(drop),
            () = panicked => Err(anyhow::anyhow!("the compute thread has ended by itself: see above")),
        };
        if let Some(hub) = &hub {
            hub.remove(&id);
        }
        engine.stop();
        tracing::info!(%id, "expert worker stopped");
        result
    })
}

/// Keeps the worker's experts as the placement says.
struct Follower {
    member: Member,
    backend: Backend,
    checkpoint: Arc<Checkpoint>,
    engine: Arc<Engine>,
    reporter: HealthReporter,
    /// While others are served; 0 for no bound.
    bytes_per_second: u64,
}

impl Follower {
    /// Ends with an error alone: experts that cannot be loaded at first, or a registry that is gone.
    async fn follow(&self, registry: &dyn Registry, registration: &Registration) -> anyhow::Result<()> {
        let mut view = registry.view();
        let mut loaded = Epoch(0);
        let mut retry = LOAD_RETRY_MIN;
        loop {
            let placement = view.borrow_and_update().placement.clone();
            if let Some(placement) = placement.filter(|placement| placement.epoch() > loaded) {
                match self.load(&placement).await {
                    Ok(()) => {
                        (loaded, retry) = (placement.epoch(), LOAD_RETRY_MIN);
                        registration.update(Member { epoch_loaded: loaded, ..self.member.clone() });
                        set_serving(&self.reporter, NAME, true).await;
                    }
                    Err(error) if loaded == Epoch(0) => return Err(error),
                    Err(error) => {
                        tracing::error!(epoch = %placement.epoch(), %loaded, "still serving the old placement: {error:#}");
                        sleep(retry).await;
                        retry = (retry * 2).min(LOAD_RETRY_MAX);
                        continue;
                    }
                }
            }
            tokio::select! {
                changed = view.changed() => changed.context("the registry has ended")?,
                () = sleep(RETIRE_INTERVAL) => if let Some(epoch) = self.engine.shards().retire() {
                    tracing::info!(%epoch, "a placement is over");
                },
            }
        }
    }

    /// Serves the placement's epoch from now on. Experts that are in memory already stay where they are.
    async fn load(&self, placement: &Arc<Placement>) -> anyhow::Result<()> {
        let (epoch, model) = (placement.epoch(), self.checkpoint.config());
        if !placement.is_for(&model.moe_layers(), model.n_routed_experts) {
            anyhow::bail!("the placement of epoch {epoch} is of another model's experts");
        }
        let held = self.engine.shards().newest().map(|(_, shard)| shard);
        let (checkpoint, backend) = (self.checkpoint.clone(), self.backend.clone());
        let shard = placement.shard(&self.member.id);
        // Nobody is served yet, or somebody waits for just these.
        let is_hurried = held.is_none() || placement.is_urgent();
        let bytes_per_second = if is_hurried { 0 } else { self.bytes_per_second };
        let load = move || shard_of(&checkpoint, &backend, shard, held.as_deref(), bytes_per_second);
        let shard = tokio::task::spawn_blocking(load).await?.context("loading the experts")?;
        let (experts, bytes) = (shard.expert_count(), shard.bytes());
        self.engine.shards().install(epoch, shard);
        tracing::info!(%epoch, experts, bytes, "experts are loaded");
        Ok(())
    }

    /// Says that this worker is about to stop, and waits until nobody needs it: every expert that it holds has another
    /// holder. At once where nobody leads, or nobody else is there.
    async fn hand_over(&self, registry: &dyn Registry, registration: &Registration) {
        let epoch_loaded = self.engine.shards().newest().map_or(Epoch(0), |(epoch, _)| epoch);
        registration.update(Member { epoch_loaded, draining: true, ..self.member.clone() });
        let mut view = registry.view();
        let id = &self.member.id;
        let was_covered = is_covered(&view.borrow_and_update(), id);
        // The registry has ended where this fails: there is nobody to wait for.
        let _ = view.wait_for(|view| may_leave(view, id)).await;
        if !was_covered {
            // Attention workers are about to use the new placement.
            sleep(MOVED_ON).await;
        }
    }
}

/// Loads what `held` does not have: in parallel, or one after the other at a bounded rate.
fn shard_of(
    checkpoint: &Checkpoint,
    backend: &Backend,
    shard: BTreeMap<LayerId, Vec<ExpertId>>,
    held: Option<&Shard>,
    bytes_per_second: u64,
) -> Result<Shard, ModelError> {
    let mut layers: BTreeMap<LayerId, BTreeMap<ExpertId, Expert>> =
        checkpoint.config().moe_layers().into_iter().map(|layer| (LayerId(layer as u8), BTreeMap::new())).collect();
    let mut missing = Vec::new();
    for (layer, experts) in shard {
        for expert in experts {
            match held.and_then(|held| held.expert(layer, expert)) {
                Some(held) => drop(layers.entry(layer).or_default().insert(expert, held.clone())),
                None => missing.push((layer, expert)),
            }
        }
    }
    let loader = Loader::of(backend, checkpoint)?;
    let pack = |(layer, expert): (LayerId, ExpertId)| {
        let (loaded, bytes) = loader.get(usize::from(layer.0), usize::from(expert.0))?;
        Ok(((layer, expert, loaded), bytes))
    };
    let loaded = match bytes_per_second {
        0 => load::all("experts", missing, pack)?,
        _ => at_rate(bytes_per_second, missing.into_iter().map(pack))?,
    };
    for (layer, expert, loaded) in loaded {
        layers.entry(layer).or_default().insert(expert, loaded);
    }
    Ok(Shard::new(layers))
}

/// Takes items, each with its size, no faster than so many bytes a second.
fn at_rate<T, E>(bytes_per_second: u64, items: impl Iterator<Item = Result<(T, u64), E>>) -> Result<Vec<T>, E> {
    let (start, mut bytes) = (Instant::now(), 0);
    let mut taken = Vec::new();
    for item in items {
        let (item, size) = item?;
        taken.push(item);
        bytes += size;
        let due = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    Ok(taken)
}
