//! A coordinator's life: open the folder, take the port, follow the registry, serve, lead if it is its turn, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ::http::header;
use anyhow::Context as _;
use axum::Router;
use axum::extract::Request;
use futures::future::BoxFuture;
use moesaic_node::config::check_address;
use moesaic_node::http::{Limits, serve};
use moesaic_node::server::{set_serving, with_health_and_reflection};
use moesaic_node::trace::Traces;
use moesaic_node::{Member, MemberSettings, Membership, Registration, accept, handshake, vitals};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic_health::server::HealthReporter;
use tower::ServiceExt;

use super::access::Doorkeeper;
use super::dashboard::{self, Dashboard};
use super::leader::Leading;
use super::service::Service;
use super::vitals::Front;
use super::workers::Workers;
use super::{admin, grpc, http};
use crate::config::Config;
use crate::core::leader::Policy;
use crate::model::Model;
use crate::text::{ChatTemplate, Tokenizer};

/// What the coordinator shares with the process that it runs in.
pub struct Context {
    pub membership: Membership,
}

/// A coordinator whose port is taken but not served yet.
pub struct Coordinator {
    config: Config,
    id: WorkerId,
    membership: Membership,
    service: Arc<Service>,
    /// None: everybody may use everything.
    keeper: Option<Doorkeeper>,
    listener: TcpListener,
    /// For probes and metrics.
    watched: Option<TcpListener>,
    address: SocketAddr,
}

/// One coordinator as a process of its own: opens what the config names, then runs.
pub async fn start(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    let member = &config.member;
    let traces =
        Traces::start(member.traces.as_deref(), "moesaic-coordinator", member.id.as_deref(), config.trace_ratio)?;
    let membership = member.open(Role::Coordinator).await?;
    let served = membership.keep_up(run(config, Context { membership: membership.clone() }, stop)).await;
    traces.finish().await;
    served
}

/// Serves until `stop`, then lets running requests finish within the bound.
pub async fn run(config: Config, context: Context, stop: CancellationToken) -> anyhow::Result<()> {
    Coordinator::bind(config, context)?.serve(stop).await
}

impl Coordinator {
    /// Reads the checkpoint's folder and takes the port.
    pub fn bind(config: Config, context: Context) -> anyhow::Result<Self> {
        config.validate()?;
        let folder = config.model()?;
        let model = Model::open(folder, config.served_name.as_deref())?;
        let tokenizer = Tokenizer::open(folder)?;
        let template = ChatTemplate::open(folder)?;
        if template.is_none() {
            tracing::warn!("the model has no chat template: /v1/chat/completions will refuse");
        }
        let membership = context.membership;
        let is_guarded = config.keys.is_some() || membership.tls.is_some();
        let keeper = is_guarded.then(|| Doorkeeper::open(config.keys.as_deref())).transpose()?;
        let id = membership.id(config.member.id.as_deref(), "coordinator")?;
        let (registry, connector) = (&*membership.registry, membership.connector());
        let workers = Workers::new(&config.member.cluster, &id, &model, config.expert_workers, registry, connector);
        let service = Service::new(model, tokenizer, template, Arc::new(workers), config.sequences_max);
        let listener = accept::listen(config.listen).with_context(|| format!("cannot listen on {}", config.listen))?;
        let address = listener.local_addr()?;
        let watched = vitals::bind(config.member.metrics_listen)?;
        Ok(Self { config, id, membership, service: Arc::new(service), keeper, listener, watched, address })
    }

    /// With the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn model_name(&self) -> &str {
        &self.service.model.name
    }

    pub fn serve(mut self, stop: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
        Box::pin(async move {
            let (workers, registry) = (&self.service.workers, &self.membership.registry);
            let leading = Arc::new(Leading::new(workers.clone(), registry.clone(), self.policy()));
            let operators = admin::Operators {
                id: self.id.clone(),
                service: self.service.clone(),
                leading: leading.clone(),
                registry: registry.clone(),
                connector: self.membership.connector(),
            };
            let routes = tonic::service::Routes::new(grpc::server(self.service.clone()));
            let routes = routes.add_service(admin::server(operators.clone()));
            let (routes, reporter) = with_health_and_reflection(routes, grpc::NAME).await;
            // Dropped, and so ended, with this function.
            let mut tasks = JoinSet::new();
            if let Some(listener) = self.watched.take() {
                let front = Front {
                    id: self.id.clone(),
                    service: self.service.clone(),
                    leading: leading.clone(),
                    registry: registry.clone(),
                    stop: stop.clone(),
                };
                tasks.spawn(vitals::answer(listener, vitals::told(front)));
            }
            tasks.spawn(workers.clone().follow());
            tasks.spawn(report_health(workers.clone(), reporter, stop.clone()));
            let campaign = registry.campaign(self.id.clone());
            tasks.spawn(leading.clone().run(campaign.term.clone()));
            tasks.spawn(leading.measure());
            let registration = self.register().await?;

            let limits = Limits {
                connections_max: self.config.connections_max,
                drain: Duration::from_secs(self.config.drain_seconds),
            };
            let (keeper, tls) = (self.keeper.clone(), self.membership.tls.clone());
            let board = Dashboard::new(operators.clone(), self.config.sequences_max, keeper.is_some(), stop.clone());
            let board = Arc::new(board);
            tasks.spawn(board.clone().run());
            let (service, body_bytes_max) = (self.service.clone(), self.config.body_bytes_max);
            let http = http::router(service, body_bytes_max, dashboard::router(board), keeper.clone(), stop.clone());
            let grpc = routes.prepare().into_axum_router();
            let grpc = match keeper {
                Some(keeper) => {
                    tasks.spawn(keeper.clone().follow());
                    keeper.guard_grpc(grpc)
                }
                None => grpc,
            };
            tracing::info!(address = %self.address, model = self.service.model.name, "serving gRPC and HTTP");
            let resign = async {
                stop.cancelled().await;
                self.service.stop();
                campaign.resign().await;
                if let Some(registration) = registration {
                    registration.leave().await;
                }
            };
            let serve = serve(self.listener, doors(http, grpc), tls, limits, stop.clone());
            tokio::join!(serve, resign);
            tracing::info!("stopped");
            Ok(())
        })
    }
}

impl Coordinator {
    fn policy(&self) -> Policy {
        let model = &self.service.model;
        Policy {
            layers: model.moe_layers.clone(),
            experts: model.experts,
            groups: model.groups,
            replicas: self.config.replicas,
            workers: self.config.expert_workers,
        }
    }

    /// Makes the coordinator known to others, if it has an address that they can reach.
    async fn register(&self) -> anyhow::Result<Option<Registration>> {
        let MemberSettings { advertise, cluster, .. } = &self.config.member;
        if let Err(error) = check_address(self.address, advertise.as_deref()) {
            tracing::info!(%error, "other coordinators do not know where this one is");
            return Ok(None);
        }
        let hello = handshake::hello(cluster, Role::Coordinator, &self.id, "", "");
        let address = advertise.clone().unwrap_or_else(|| self.address.to_string());
        let member = Member::new(hello, self.id.clone(), address, None);
        Ok(Some(self.membership.registry.register(member).await?))
    }
}

/// One port for both, told apart by the requests' content type.
fn doors(http: Router, grpc: Router) -> Router {
    let door = move |request: Request| {
        let content_type = request.headers().get(header::CONTENT_TYPE);
        let is_grpc = content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        if is_grpc { grpc.clone().oneshot(request) } else { http.clone().oneshot(request) }
    };
    Router::new().fallback_service(tower::service_fn(door))
}

/// grpc.health.v1 says the same as /health.
async fn report_health(workers: Arc<Workers>, reporter: HealthReporter, stop: CancellationToken) {
    let mut not_ready = workers.not_ready();
    loop {
        let reason = not_ready.borrow_and_update().clone();
        match &reason {
            None => tracing::info!("ready: a token could be produced"),
            Some(reason) => tracing::info!(reason, "not ready"),
        }
        set_serving(&reporter, grpc::NAME, reason.is_none()).await;
        tokio::select! {
            changed = not_ready.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return set_serving(&reporter, grpc::NAME, false).await,
        }
    }
}
