//! A worker's life: register, load what the placement gives it, serve, stop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use moesaic_dispatch::{Hub, Shape, grpc};
use moesaic_kernels::{Ffn, Numerics, Pool};
use moesaic_model::packed::Experts;
use moesaic_model::{Checkpoint, ModelError, load};
use moesaic_node::server::{self, set_serving, with_health_and_reflection};
use moesaic_node::{Member, Registration, Registry, handshake};
use moesaic_proto::v1::Role;
use moesaic_proto::{Epoch, ExpertId, LayerId, Placement};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::server::HealthReporter;

use crate::config::Config;
use crate::engine::{Engine, Profile};
use crate::shard::Shard;

/// The service's name in health checks.
pub const NAME: &str = "moesaic.v1.Experts";

/// What the worker shares with the process that it runs in.
pub struct Context {
    pub registry: Arc<dyn Registry>,
    /// Where attention workers of this process find it.
    pub hub: Option<Hub>,
    pub pool: Pool,
    pub checkpoint: Arc<Checkpoint>,
    /// Where the worker counts what it computes.
    pub profile: Arc<Profile>,
}

/// Serves until `stop`; then leaves, answers what it has in hand within the bound, and ends.
pub async fn run(config: Config, context: Context, stop: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    let Context { registry, hub, pool, checkpoint, profile } = context;
    let id = handshake::worker_id(config.id.as_deref(), "experts")?;
    let numerics = Numerics::detect(config.dtype()?);
    let hello = handshake::hello(&config.cluster, Role::ExpertWorker, &id, checkpoint.fingerprint(), numerics.name());
    let model = checkpoint.config();
    let shape = Shape { hidden: model.hidden_size, experts: model.n_routed_experts };
    let (engine, ended) =
        Engine::start(shape, numerics, config.inbox_frames, pool, profile).context("starting the compute thread")?;

    let bound = server::bind(config.listen).await?;
    let address = config.advertise.clone().unwrap_or_else(|| bound.address().to_string());
    let closing = CancellationToken::new();
    let service = grpc::service(engine.clone(), hello.clone(), closing.clone());
    let (routes, reporter) = with_health_and_reflection(Routes::new(service), NAME).await;
    let serve = bound.serve(routes, closing.clone(), Duration::from_secs(config.drain_seconds));
    if let Some(hub) = &hub {
        hub.insert(id.clone(), engine.clone());
    }

    let member = Member { hello, id: id.clone(), address: address.clone(), epoch_loaded: Epoch(0) };
    let registration = registry.register(member.clone()).await?;
    tracing::info!(%id, address, numerics = numerics.name(), isa = numerics.isa(), "expert worker serves");
    let follower = Follower { member, numerics, checkpoint, engine: engine.clone(), reporter: reporter.clone() };
    let live = async {
        tokio::select! {
            failed = follower.follow(&*registry, &registration) => return failed,
            () = stop.cancelled() => {}
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
        () = panicked => Err(anyhow::anyhow!("the compute thread has ended by itself: it panicked, see above")),
    };
    if let Some(hub) = &hub {
        hub.remove(&id);
    }
    engine.stop();
    tracing::info!(%id, "expert worker stopped");
    result
}

/// Keeps the worker's experts as the placement says.
struct Follower {
    member: Member,
    numerics: Numerics,
    checkpoint: Arc<Checkpoint>,
    engine: Arc<Engine>,
    reporter: HealthReporter,
}

impl Follower {
    /// Ends with an error alone: experts that cannot be loaded, or a registry that is gone.
    async fn follow(&self, registry: &dyn Registry, registration: &Registration) -> anyhow::Result<()> {
        let mut view = registry.view();
        let mut loaded = Epoch(0);
        loop {
            let placement = view.borrow_and_update().placement.clone();
            if let Some(placement) = placement.filter(|placement| placement.epoch() > loaded) {
                loaded = placement.epoch();
                if placement.is_for(&self.checkpoint.config().moe_layers(), self.checkpoint.config().n_routed_experts) {
                    self.load(placement).await?;
                    registration.update(Member { epoch_loaded: loaded, ..self.member.clone() });
                    set_serving(&self.reporter, NAME, true).await;
                } else {
                    tracing::error!(epoch = %loaded, "a placement of another model's experts");
                }
            }
            view.changed().await.context("the registry has ended")?;
        }
    }

    /// Serves the placement's epoch from now on. Experts that are in memory already stay where they are.
    async fn load(&self, placement: Arc<Placement>) -> anyhow::Result<()> {
        let (checkpoint, numerics, held) = (self.checkpoint.clone(), self.numerics, self.engine.shards().newest());
        let (shard, epoch) = (placement.shard(&self.member.id), placement.epoch());
        let load = move || shard_of(&checkpoint, numerics, shard, held.as_deref());
        let shard = tokio::task::spawn_blocking(load).await?.context("loading the experts")?;
        let (experts, bytes) = (shard.expert_count(), shard.bytes());
        self.engine.shards().install(epoch, shard);
        tracing::info!(%epoch, experts, bytes, "experts are loaded");
        Ok(())
    }
}

/// Loads what `held` does not have, in parallel.
fn shard_of(
    checkpoint: &Checkpoint,
    numerics: Numerics,
    shard: BTreeMap<LayerId, Vec<ExpertId>>,
    held: Option<&Shard>,
) -> Result<Shard, ModelError> {
    let mut layers: BTreeMap<LayerId, BTreeMap<ExpertId, Arc<Ffn>>> =
        checkpoint.config().moe_layers().into_iter().map(|layer| (LayerId(layer as u8), BTreeMap::new())).collect();
    let mut missing = Vec::new();
    for (layer, experts) in shard {
        for expert in experts {
            match held.and_then(|held| held.expert(layer, expert)) {
                Some(ffn) => drop(layers.entry(layer).or_default().insert(expert, ffn.clone())),
                None => missing.push((layer, expert)),
            }
        }
    }
    let experts = Experts::open(checkpoint, numerics)?;
    let pack = |(layer, expert): (LayerId, ExpertId)| {
        let (ffn, bytes) = experts.get(usize::from(layer.0), usize::from(expert.0))?;
        Ok(((layer, expert, Arc::new(ffn)), bytes))
    };
    for (layer, expert, ffn) in load::all("experts", missing, pack)? {
        layers.entry(layer).or_default().insert(expert, ffn);
    }
    Ok(Shard::new(layers))
}
