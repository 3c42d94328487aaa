//! What a node tells of itself, on a port of its own: whether it lives, has started and is ready, for an orchestrator's
//! probes, and its figures for Prometheus. Nothing there tells of a request's content; without TLS, so the port belongs
//! in a network that only those who watch can reach.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{StatusCode, header};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::http::{Limits, serve};
use crate::metrics::{CONTENT_TYPE, Page};
use crate::server::ServerError;

/// Probes and scrapers are few.
const LIMITS: Limits = Limits { connections_max: 64, drain: Duration::from_secs(1) };

/// One node.
pub trait Vitals: Send + Sync + 'static {
    /// Whether it has what it needs to begin its work. Once true, always true.
    fn has_started(&self) -> bool;
    /// Why it should be given nothing new; None if it should.
    fn not_ready(&self) -> Option<String>;
    fn metrics(&self, page: &mut Page, detail: Detail);
}

/// How much a scrape asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// What is bounded by the number of nodes.
    #[default]
    Nodes,
    /// Also every expert of every layer.
    Experts,
}

/// Takes the port.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ServerError> {
    TcpListener::bind(address).await.map_err(|source| ServerError::Bind { address, source })
}

/// Answers until `stop`, which should come last: a node that drains still says so.
pub async fn answer(listener: TcpListener, vitals: Arc<dyn Vitals>, stop: CancellationToken) {
    let router = Router::new()
        // Served by the same threads as everything else: an answer means that they turn.
        .route("/livez", get(async || "ok\n"))
        .route("/startupz", get(started))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(vitals);
    serve(listener, router, None, LIMITS, stop).await;
}

async fn started(State(vitals): State<Arc<dyn Vitals>>) -> Response {
    match vitals.has_started() {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "still starting\n").into_response(),
    }
}

async fn ready(State(vitals): State<Arc<dyn Vitals>>) -> Response {
    match vitals.not_ready() {
        None => "ok\n".into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

#[derive(Deserialize)]
struct Scrape {
    /// "all": every expert of every layer.
    experts: Option<String>,
}

async fn metrics(State(vitals): State<Arc<dyn Vitals>>, Query(scrape): Query<Scrape>) -> Response {
    let detail = match scrape.experts.as_deref() {
        None => Detail::Nodes,
        Some("all") => Detail::Experts,
        Some(_) => return (StatusCode::BAD_REQUEST, "experts: expected all\n").into_response(),
    };
    let mut page = Page::default();
    page.gauges("moesaic_build_info", "The program's version.").sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    vitals.metrics(&mut page, detail);
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], page.into_text()).into_response()
}
