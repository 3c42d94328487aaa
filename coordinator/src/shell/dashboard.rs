//! The page that every coordinator serves at `/`, what it reads and what operators do on it. `dashboard/PROTOCOL.md` says
//! what passes; `core::board` makes it. Its files are embedded: `dashboard/dist`.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use futures::stream::{self, StreamExt};
use http::{StatusCode, header};
use moesaic_node::access::Scope;
use moesaic_proto::v1::admin_server::Admin;
use moesaic_proto::v1::{AttentionStatus, CordonRequest, ExpertStatus, RebalanceRequest, Role, StatusResponse};
use moesaic_proto::{Placement, WorkerId};
use serde::Serialize;
use serde_json::json;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use super::admin::{AUTHORIZATION, Operators};
use super::http::{read_fields, routed};
use super::unix_ms;
use crate::core::ApiError;
use crate::core::board::messages::{self, Access, Attention, Bye, Expert, Heat, OfAttention, OfExpert, PROTOCOL};
use crate::core::board::{Board, Look, heats};
use crate::core::keys::Account;

const TICK: Duration = Duration::from_secs(1);
/// Seconds between two heat maps, and between two large ones.
const HEAT_TICKS: u64 = 5;
const HEAT_TICKS_LARGE: u64 = 10;
const HEAT_LARGE: usize = 8192;
/// Messages that a client may be behind by.
const BEHIND_MAX: usize = 10;
/// Of an action.
const BODY_BYTES_MAX: usize = 64 << 10;

const FILES: [(&str, &str, &[u8]); 4] = [
    ("app.js", "text/javascript; charset=utf-8", include_bytes!("../../dashboard/dist/app.js")),
    ("app.css", "text/css; charset=utf-8", include_bytes!("../../dashboard/dist/app.css")),
    ("icon.svg", "image/svg+xml", include_bytes!("../../dashboard/dist/icon.svg")),
    ("NOTICES.txt", "text/plain; charset=utf-8", include_bytes!("../../dashboard/dist/NOTICES.txt")),
];
const PAGE: &[u8] = include_bytes!("../../dashboard/dist/index.html");
const POLICY: &str =
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'";

pub struct Dashboard {
    operators: Operators,
    model: messages::Model,
    sequences_max: usize,
    /// Callers must say who they are.
    is_guarded: bool,
    stop: CancellationToken,
    state: Mutex<Watched>,
    /// To all who watch. Sent while the board is locked, so that who joins misses nothing.
    news: broadcast::Sender<Bytes>,
}

#[derive(Default)]
struct Watched {
    board: Board,
    ticks: u64,
    /// What who joins needs besides the board: the newest placement and heat map, as they were sent.
    placed: Option<(Arc<Placement>, Bytes)>,
    heat: Option<Bytes>,
}

/// Every route, by its row in the table of who may use it.
fn routes() -> [(&'static str, MethodRouter<Arc<Dashboard>>); 5] {
    [
        ("GET /", get(page)),
        ("GET /dashboard/{file}", get(file)),
        ("GET /dashboard/events", get(events)),
        ("POST /dashboard/actions/cordon", post(cordon)),
        ("POST /dashboard/actions/rebalance", post(rebalance)),
    ]
}

pub fn rows() -> Vec<&'static str> {
    routes().into_iter().map(|(row, _)| row).collect()
}

pub fn router(dashboard: Arc<Dashboard>) -> Router {
    routed(routes()).with_state(dashboard)
}

impl Dashboard {
    pub fn new(operators: Operators, sequences_max: usize, is_guarded: bool, stop: CancellationToken) -> Self {
        let model = &operators.service.model;
        let model = messages::Model {
            name: model.name.clone(),
            numerics: String::new(),
            context_max: model.context_max,
            layers: model.moe_layers.iter().map(|layer| layer.0).collect(),
            experts: model.experts,
            chosen: model.chosen,
            replicas: operators.leading.policy().replicas,
        };
        let (news, _) = broadcast::channel(BEHIND_MAX);
        Self { operators, model, sequences_max, is_guarded, stop, state: Mutex::default(), news }
    }

    /// Looks at the cluster once a second, for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        let mut every = interval(TICK);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            self.tick();
        }
    }

    fn tick(&self) {
        let status = self.operators.status_now();
        let figures = &self.operators.service.figures;
        figures.turn();
        let (first_token, gap) = figures.waits();
        let sums = figures.sums();
        let view = self.operators.registry.view().borrow().clone();
        let incarnation = |role, id: &str| {
            let member = WorkerId::new(id).ok().and_then(|id| view.members.get(&(role, id)));
            member.map_or(0, |member| member.hello.incarnation)
        };
        let attention = status
            .attention
            .iter()
            .map(|of| (attention(of, incarnation(Role::AttentionWorker, &of.id)), of.load.as_ref()));
        let experts = status.experts.iter().map(|of| expert(of, incarnation(Role::ExpertWorker, &of.id)));
        let look = Look {
            t: unix_ms(),
            status: self.status(&status),
            coordinators: self.coordinators(&view),
            attention: attention.collect(),
            experts: experts.collect(),
            sequences: self.operators.service.seats.all(),
            tokens: sums.tokens,
            requests: sums.requests,
            refusals: sums.refusals,
            first_token,
            gap,
            why_placed: self.operators.leading.why_placed(status.epoch),
        };
        let mut state = self.lock();
        let update = state.board.tick(look);
        self.send(event("update", &update));
        let is_new = |placement: &Arc<Placement>| {
            state.placed.as_ref().is_none_or(|(sent, _)| sent.epoch() != placement.epoch())
        };
        if let Some(placement) = view.placement.clone().filter(is_new) {
            let text = event("placement", &state.board.placed(&placement));
            self.send(text.clone());
            state.placed = Some((placement, text));
        }
        let is_large = self.model.layers.len() * self.model.experts > HEAT_LARGE;
        let heat_ticks = if is_large { HEAT_TICKS_LARGE } else { HEAT_TICKS };
        if state.ticks.is_multiple_of(heat_ticks) {
            let load = self.operators.leading.load(|load| heats(&self.model.layers, self.model.experts, load));
            let text = event("heat", &Heat { t: unix_ms(), load });
            self.send(text.clone());
            state.heat = Some(text);
        }
        state.ticks += 1;
    }

    /// Nobody may be listening.
    fn send(&self, text: Bytes) {
        let _ = self.news.send(text);
    }

    fn status(&self, status: &StatusResponse) -> messages::Status {
        messages::Status {
            coordinator: status.coordinator.clone(),
            leader: status.leader.clone(),
            term: status.term,
            registry_reachable: status.registry_reachable,
            not_ready: status.not_ready.clone(),
            epoch: status.epoch,
            experts_lost: status.experts_lost,
            experts_exposed: status.experts_exposed,
            sequences: status.sequences as usize,
            sequences_max: self.sequences_max,
        }
    }

    /// Those that are registered, and this one.
    fn coordinators(&self, view: &moesaic_node::View) -> Vec<messages::Coordinator> {
        let of = |member: &moesaic_node::Member| messages::Coordinator {
            id: member.hello.id.clone(),
            address: member.address.clone(),
        };
        let mut all: Vec<_> = view.of_role(Role::Coordinator).map(of).collect();
        if all.iter().all(|coordinator| coordinator.id != self.operators.id.as_str()) {
            let id = self.operators.id.as_str().to_owned();
            all.push(messages::Coordinator { id, address: String::new() });
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What who joins is told first, and all news from then on.
    fn join(&self) -> (Vec<Bytes>, broadcast::Receiver<Bytes>) {
        let numerics = self.operators.service.workers.identity().map(|identity| identity.numerics());
        let model = messages::Model { numerics: numerics.unwrap_or_default(), ..self.model.clone() };
        let state = self.lock();
        let news = self.news.subscribe();
        let mut first = vec![event("snapshot", &state.board.snapshot(unix_ms(), &model))];
        first.extend(state.placed.as_ref().map(|(_, text)| text.clone()));
        first.extend(state.heat.clone());
        (first, news)
    }
}

fn attention(of: &AttentionStatus, incarnation: u64) -> Attention {
    let load = of.load.as_ref();
    Attention {
        n: 0,
        id: of.id.clone(),
        address: of.address.clone(),
        node: of.node.clone(),
        cordoned: of.cordoned,
        draining: load.is_some_and(|load| load.draining),
        own: OfAttention {
            answers: load.is_some(),
            experts_reachable: load.is_some_and(|load| load.experts_reachable),
            epoch: load.map_or(0, |load| load.epoch),
            pages_total: load.map_or(0, |load| load.pages_total),
            page_tokens: load.map_or(0, |load| load.page_tokens),
            waiting_max: load.map_or(0, |load| load.waiting_max),
        },
        incarnation,
    }
}

fn expert(of: &ExpertStatus, incarnation: u64) -> Expert {
    Expert {
        n: 0,
        id: of.id.clone(),
        address: of.address.clone(),
        node: of.node.clone(),
        cordoned: of.cordoned,
        draining: of.draining,
        own: OfExpert { epoch_loaded: of.epoch_loaded, experts: of.experts, slots: of.slots },
        incarnation,
    }
}

fn event(name: &str, data: &impl Serialize) -> Bytes {
    let data = serde_json::to_string(data).expect("messages are plain data");
    format!("event: {name}\ndata: {data}\n\n").into()
}

// === what the page asks for ===

async fn page() -> Response {
    embedded("text/html; charset=utf-8", PAGE)
}

async fn file(Path(name): Path<String>) -> Response {
    match FILES.iter().find(|(of, ..)| *of == name) {
        Some((_, kind, bytes)) => embedded(kind, bytes),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn embedded(kind: &'static str, bytes: &'static [u8]) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
    ];
    (headers, bytes).into_response()
}

async fn events(State(dashboard): State<Arc<Dashboard>>, request: Request) -> Response {
    let account = request.extensions().get::<Arc<Account>>();
    let has = |scope| !dashboard.is_guarded || account.is_none_or(|account| account.has(scope));
    let access = Access {
        protocol: PROTOCOL,
        keys: dashboard.is_guarded,
        key: account.map(|account| account.name.clone()),
        infer: has(Scope::Infer),
        operate: has(Scope::Operate),
    };
    let (first, news) = dashboard.join();
    let first = stream::iter([event("access", &access)]).chain(stream::iter(first));
    let stop = dashboard.stop.clone();
    let news = stream::unfold(Some((news, stop)), |state| async move {
        let (mut news, stop) = state?;
        let message = tokio::select! {
            message = news.recv() => message,
            () = stop.cancelled() => {
                return Some((event("bye", &Bye { reason: "the coordinator is stopping".into() }), None));
            }
        };
        match message {
            Ok(text) => Some((text, Some((news, stop)))),
            // It reads too slowly, and is to connect again.
            Err(RecvError::Lagged(_) | RecvError::Closed) => None,
        }
    });
    let body = Body::from_stream(first.chain(news).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")], body).into_response()
}

async fn cordon(State(dashboard): State<Arc<Dashboard>>, request: Request) -> Result<Response, ApiError> {
    let fields = read_fields(json_only(request)?, BODY_BYTES_MAX).await?;
    let not_set = || ApiError::invalid("worker", "is not set; expected a worker's id");
    let worker = fields.string("worker")?.ok_or_else(not_set)?;
    let cordoned = fields.boolean("cordoned")?.unwrap_or(true);
    let drain = fields.boolean("drain")?.unwrap_or(false);
    let asked = CordonRequest { worker, cordoned, drain };
    dashboard.operators.cordon(tonic::Request::new(asked)).await.map_err(refusal)?;
    Ok(Json(json!({})).into_response())
}

async fn rebalance(State(dashboard): State<Arc<Dashboard>>, request: Request) -> Result<Response, ApiError> {
    let key = request.headers().get(header::AUTHORIZATION).and_then(|key| MetadataValue::try_from(key.as_bytes()).ok());
    let fields = read_fields(json_only(request)?, BODY_BYTES_MAX).await?;
    let asked = RebalanceRequest { dry_run: fields.boolean("dry_run")?.unwrap_or(true) };
    let mut asked = tonic::Request::new(asked);
    if let Some(key) = key {
        asked.metadata_mut().insert(AUTHORIZATION, key);
    }
    let answer = dashboard.operators.rebalance(asked).await.map_err(refusal)?.into_inner();
    Ok(Json(json!({
        "epoch": answer.epoch,
        "moved": answer.moved,
        "imbalance_before": answer.imbalance_before,
        "imbalance_after": answer.imbalance_after,
    }))
    .into_response())
}

/// A form of a foreign page cannot send JSON.
fn json_only(request: Request) -> Result<Request, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    match kind.split(';').next().map(str::trim) {
        Some("application/json") => Ok(request),
        _ => Err(ApiError::invalid("content-type", "is not application/json")),
    }
}

fn refusal(status: Status) -> ApiError {
    let reason = status.message().to_owned();
    match status.code() {
        Code::InvalidArgument | Code::NotFound => ApiError::invalid("worker", reason),
        Code::Unavailable => ApiError::Unavailable { reason },
        _ => ApiError::Failed { reason },
    }
}
