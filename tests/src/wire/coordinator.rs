//! A coordinator: everything but its two listeners and its checks of the command line.

use std::sync::Arc;

use axum::Router;
use moesaic_coordinator::core::leader::Policy;
use moesaic_coordinator::model::Model;
use moesaic_coordinator::shell::leader::Leading;
use moesaic_coordinator::shell::service::Service;
use moesaic_coordinator::shell::workers::Workers;
use moesaic_coordinator::shell::{grpc, http};
use moesaic_coordinator::text::Tokenizer;
use moesaic_proto::v1::Role;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::net;
use super::site::{CLUSTER, MODEL, Site, worker_id};
use crate::fixtures;

const SEQUENCES_MAX: usize = 256;
const BODY_BYTES_MAX: usize = 1 << 20;

/// Lives until it is killed.
pub async fn run(site: Site, id: String, expert_workers: usize) -> turmoil::Result {
    let folder = fixtures::folder(MODEL);
    let (model, tokenizer) = (Model::open(&folder, None)?, Tokenizer::open(&folder)?);
    let policy = Policy {
        layers: model.moe_layers.clone(),
        experts: model.experts,
        groups: model.groups,
        replicas: 2,
        workers: expert_workers,
    };
    let (name, registry) = (worker_id(&id), &site.registry);
    let workers = Arc::new(Workers::new(CLUSTER, &name, &model, expert_workers, &**registry, net::connector()));
    let service = Arc::new(Service::new(model, tokenizer, None, workers.clone(), SEQUENCES_MAX));
    let leading = Arc::new(Leading::new(workers.clone(), registry.clone(), policy));
    let campaign = registry.campaign(name);
    tokio::spawn(workers.follow());
    tokio::spawn(leading.clone().run(campaign.term.clone()));
    tokio::spawn(leading.measure());
    site.register(site.hello(Role::Coordinator, &id)).await;
    let router = http::router(service.clone(), BODY_BYTES_MAX, Router::new(), None, CancellationToken::new());
    tokio::try_join!(net::serve(Routes::new(grpc::server(service))), net::serve_http(router))?;
    Ok(())
}
