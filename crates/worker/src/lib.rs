//! What attention and expert workers have in common: their settings, what they compute on, and how they begin as a
//! process of their own.

#![forbid(unsafe_code)]

pub mod settings;

use std::sync::Arc;

use moesaic_dispatch::Hub;
use moesaic_dispatch::nccl::{self, Fabric};
use moesaic_kernels::Backend;
use moesaic_model::Checkpoint;
use moesaic_node::Membership;
use moesaic_node::trace::Traces;
use moesaic_proto::v1::Role;

pub use settings::{InvalidSettings, WorkerSettings};

/// What a worker shares with the process that it runs in.
pub struct Context<P> {
    pub membership: Membership,
    /// Where attention workers find the expert workers of this process.
    pub hub: Option<Hub>,
    pub backend: Backend,
    /// From GPU to GPU, if there is such a way.
    pub fabric: Option<Arc<dyn Fabric>>,
    pub checkpoint: Arc<Checkpoint>,
    /// Where the worker counts what it does.
    pub profile: Arc<P>,
}

/// One worker as a process of its own: opens what the settings name, runs, and waits for NCCL's end. `service` is its name
/// in traces.
pub async fn start<P, R>(
    settings: &WorkerSettings,
    role: Role,
    service: &'static str,
    run: impl FnOnce(Context<P>) -> R,
) -> anyhow::Result<()>
where
    P: Default,
    R: Future<Output = anyhow::Result<()>>,
{
    let member = &settings.member;
    let traces = Traces::start(member.traces.as_deref(), service, member.id.as_deref(), 1.0)?;
    let backend = settings.backend()?;
    let context = Context {
        fabric: settings.fabric(&backend)?,
        checkpoint: Arc::new(Checkpoint::open(settings.model()?)?),
        membership: member.open(role).await?,
        hub: None,
        backend,
        profile: Arc::default(),
    };
    let membership = context.membership.clone();
    let served = membership.keep_up(run(context)).await;
    traces.finish().await;
    tokio::task::spawn_blocking(nccl::settle).await?;
    served
}
