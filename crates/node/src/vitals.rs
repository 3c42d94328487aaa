//! What a node tells of itself, on a port of its own: whether it lives, has started and is ready, for an orchestrator's
//! probes, and its figures for Prometheus. Nothing there tells of a request's content; without TLS, so the port belongs
//! in a network that only those who watch can reach.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::future::BoxFuture;
use http::{StatusCode, header};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::accept;
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

/// Takes the port, if one is wanted.
pub fn bind(address: Option<SocketAddr>) -> Result<Option<TcpListener>, ServerError> {
    let Some(address) = address else { return Ok(None) };
    let listener = accept::listen(address).map_err(|source| ServerError::Bind { address, source })?;
    Ok(Some(listener))
}

/// A node that is there; None: it is starting.
pub type Told = watch::Receiver<Option<Arc<dyn Vitals>>>;

/// One that is there from the beginning.
pub fn told(vitals: impl Vitals) -> Told {
    watch::channel(Some(Arc::new(vitals) as _)).1
}

#[derive(Clone)]
struct App {
    told: Told,
    /// When the process began, nearly: seconds since 1970.
    begun: f64,
}

/// Answers for as long as it is polled: until the end, as a node that drains still says so.
pub fn answer(listener: TcpListener, told: Told) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let begun = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let router = Router::new()
            // Served by the same threads as everything else: an answer means that they turn.
            .route("/livez", get(async || "ok\n"))
            .route("/startupz", get(started))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(App { told, begun });
        serve(listener, router, None, LIMITS, CancellationToken::new()).await;
    })
}

impl App {
    fn vitals(&self) -> Option<Arc<dyn Vitals>> {
        self.told.borrow().clone()
    }
}

async fn started(State(app): State<App>) -> Response {
    match app.vitals().is_some_and(|vitals| vitals.has_started()) {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "still starting\n").into_response(),
    }
}

async fn ready(State(app): State<App>) -> Response {
    let reason = app.vitals().map_or_else(|| Some("still starting".into()), |vitals| vitals.not_ready());
    match reason {
        None => "ok\n".into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

#[derive(Deserialize)]
struct Scrape {
    /// "all": every expert of every layer.
    experts: Option<String>,
}

async fn metrics(State(app): State<App>, Query(scrape): Query<Scrape>) -> Response {
    let detail = match scrape.experts.as_deref() {
        None => Detail::Nodes,
        Some("all") => Detail::Experts,
        Some(_) => return (StatusCode::BAD_REQUEST, "experts: expected all\n").into_response(),
    };
    let mut page = Page::default();
    page.gauges("moesaic_build_info", "The program's version.").sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.gauge("process_start_time_seconds", "When the process began, in seconds since 1970.", app.begun);
    if let Some(vitals) = app.vitals() {
        vitals.metrics(&mut page, detail);
    }
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], page.into_text()).into_response()
}
