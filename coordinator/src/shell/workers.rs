//! The cluster's workers as the coordinator sees them: a channel to each attention worker, its load, and the first
//! placement of experts. Follows the registry's view; decides nothing by itself (`core::routing`, `core::placement`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moesaic_node::{Member, Registry, View, handshake};
use moesaic_proto::limits::WORKER_MESSAGE_BYTES_MAX;
use moesaic_proto::v1::attention_worker_client::AttentionWorkerClient;
use moesaic_proto::v1::{Hello, LoadRequest, Role, RunEvent, RunRequest};
use moesaic_proto::{Epoch, WorkerId};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::core::placement::first_placement;
use crate::core::routing::Identity;
use crate::core::{ApiError, Router};
use crate::model::Model;

/// How often a worker's load is asked for: soon after it has joined, then at leisure.
const LOAD_INTERVAL_JOINING: Duration = Duration::from_millis(50);
const LOAD_INTERVAL: Duration = Duration::from_millis(500);
/// A worker that does not answer for this long gets no new sequences.
const LOAD_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A call is refused or accepted within this time.
const RUN_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that does not answer a ping for this long is gone, and its streams with it.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// After the registry has refused a placement.
const PUBLISH_RETRY: Duration = Duration::from_secs(1);

pub type Client = AttentionWorkerClient<Channel>;

pub struct Workers {
    state: Mutex<State>,
    view: watch::Receiver<Arc<View>>,
    /// Why no token could be produced; None if one could.
    not_ready: watch::Sender<Option<String>>,
    /// What this coordinator says of itself; the model's fingerprint is added when it is known.
    hello: Hello,
    moe_layers: Vec<moesaic_proto::LayerId>,
    experts: usize,
    expert_workers: usize,
}

#[derive(Default)]
struct State {
    router: Router,
    clients: HashMap<WorkerId, Connected>,
    /// Members with another model, so that each is warned of once.
    refused: Vec<(Role, WorkerId, u64)>,
}

struct Connected {
    member: Member,
    client: Client,
    polling: AbortHandle,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.polling.abort();
    }
}

/// A sequence's place on a worker; given back when dropped.
pub struct Place {
    workers: Arc<Workers>,
    worker: WorkerId,
    tokens: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.workers.lock().router.release(&self.worker, self.tokens);
    }
}

impl Workers {
    pub fn new(cluster: &str, id: &WorkerId, model: &Model, expert_workers: usize, registry: &dyn Registry) -> Self {
        Self {
            state: Mutex::default(),
            view: registry.view(),
            not_ready: watch::Sender::new(Some("starting".into())),
            hello: handshake::hello(cluster, Role::Coordinator, id, "", ""),
            moe_layers: model.moe_layers.clone(),
            experts: model.experts,
            expert_workers,
        }
    }

    /// Why no token could be produced at present; None if one could.
    pub fn not_ready(&self) -> watch::Receiver<Option<String>> {
        self.not_ready.subscribe()
    }

    pub fn identity(&self) -> Option<Identity> {
        self.lock().router.identity().cloned()
    }

    /// Tokens that the largest latent cache holds.
    pub fn capacity_max(&self) -> Option<usize> {
        self.lock().router.capacity_max().map(|tokens| tokens as usize)
    }

    /// Starts a sequence on the least loaded worker, or on the next one if that cannot take it.
    pub async fn start(
        self: &Arc<Self>,
        mut run: RunRequest,
        retry_after_s: u64,
    ) -> Result<(Streaming<RunEvent>, Place), ApiError> {
        let tokens = run.prompt.len() as u64 + u64::from(run.max_tokens);
        run.hello = Some(self.own_hello());
        let mut tried: Vec<WorkerId> = Vec::new();
        let mut last = None;
        while let Some((place, mut client)) = self.take(tokens, &tried) {
            let call = tokio::time::timeout(RUN_TIMEOUT, client.run(run.clone()));
            let status = match call.await {
                Ok(Ok(events)) => return Ok((events.into_inner(), place)),
                Ok(Err(status)) => status,
                Err(_) => Status::unavailable(format!("attention worker {} does not answer", place.worker)),
            };
            if !matches!(status.code(), Code::Unavailable | Code::ResourceExhausted) {
                return Err(refusal(&status, &run.request_id, retry_after_s));
            }
            tracing::debug!(worker = %place.worker, code = ?status.code(), "a worker takes no sequence");
            if status.code() == Code::Unavailable {
                self.set_load(&place.worker, None);
            }
            tried.push(place.worker.clone());
            last = Some(status);
        }
        match last {
            Some(status) => Err(refusal(&status, &run.request_id, retry_after_s)),
            None => Err(ApiError::Unavailable { reason: self.reason().unwrap_or_else(|| "no worker is free".into()) }),
        }
    }

    fn take(self: &Arc<Self>, tokens: u64, tried: &[WorkerId]) -> Option<(Place, Client)> {
        let mut state = self.lock();
        let worker = state.router.pick(tokens, tried)?;
        let client = state.clients.get(&worker).map(|connected| connected.client.clone());
        drop(state);
        let place = Place { workers: self.clone(), worker, tokens };
        client.map(|client| (place, client))
    }

    fn own_hello(&self) -> Hello {
        let fingerprint = self.identity().map(|identity| identity.fingerprint).unwrap_or_default();
        Hello { fingerprint, ..self.hello.clone() }
    }

    /// Follows the registry for as long as it is polled.
    pub async fn follow(self: Arc<Self>) {
        let mut view = self.view.clone();
        loop {
            let now = view.borrow_and_update().clone();
            self.apply(&now);
            if view.changed().await.is_err() {
                return;
            }
        }
    }

    fn apply(self: &Arc<Self>, view: &View) {
        let mut state = self.lock();
        for member in view.members.values().filter(|member| member.hello.role() != Role::Coordinator) {
            state.warn_if_refused(member);
        }
        let known: HashMap<_, _> = view.of_role(Role::AttentionWorker).map(|m| (m.id.clone(), m)).collect();
        let gone = |(id, connected): (&WorkerId, &Connected)| {
            let same = |m: &&Member| m.address == connected.member.address && m.hello == connected.member.hello;
            (!known.get(id).is_some_and(same)).then(|| id.clone())
        };
        let gone: Vec<WorkerId> = state.clients.iter().filter_map(gone).collect();
        for id in gone {
            tracing::info!(worker = %id, "an attention worker has left");
            state.clients.remove(&id);
            state.router.remove(&id);
        }
        for (id, member) in known {
            if state.clients.contains_key(&id) || !state.router.accept(&identity_of(member)) {
                continue;
            }
            let Some(client) = connect(&member.address) else { continue };
            tracing::info!(worker = %id, address = member.address, "an attention worker has joined");
            state.router.add(id.clone());
            let polling = tokio::spawn(poll(Arc::downgrade(self), id.clone(), client.clone())).abort_handle();
            state.clients.insert(id, Connected { member: member.clone(), client, polling });
        }
        drop(state);
        self.update_readiness();
    }

    fn set_load(&self, worker: &WorkerId, load: Option<moesaic_proto::v1::LoadResponse>) {
        self.lock().router.set_load(worker, load);
        self.update_readiness();
    }

    fn update_readiness(&self) {
        let reason = self.reason();
        self.not_ready.send_if_modified(|now| {
            let changed = *now != reason;
            *now = reason;
            changed
        });
    }

    fn reason(&self) -> Option<String> {
        let reason = self.lock().router.not_ready()?;
        let view = self.view.borrow().clone();
        Some(match self.experts_missing(&view) {
            Some(missing) => format!("{missing}; {reason}"),
            None => reason,
        })
    }

    fn experts_missing(&self, view: &View) -> Option<String> {
        if self.moe_layers.is_empty() {
            return None;
        }
        let Some(placement) = &view.placement else {
            let (there, expected) = (view.of_role(Role::ExpertWorker).count(), self.expert_workers);
            return Some(format!("{there} of {expected} expert workers are registered"));
        };
        let loaded = |id: &WorkerId| {
            let member = view.members.get(&(Role::ExpertWorker, id.clone()));
            member.is_some_and(|member| member.epoch_loaded >= placement.epoch())
        };
        let (all, ready) = (placement.workers().len(), placement.workers().iter().filter(|id| loaded(id)).count());
        (ready < all).then(|| format!("{ready} of {all} expert workers have loaded their experts"))
    }

    /// Publishes the first placement once the expert workers are there.
    pub async fn place(self: Arc<Self>, registry: Arc<dyn Registry>) {
        let mut view = self.view.clone();
        loop {
            let now = view.borrow_and_update().clone();
            if now.placement.is_none() && !self.publish_first(&now, &*registry).await {
                tokio::time::sleep(PUBLISH_RETRY).await;
                continue;
            }
            if view.changed().await.is_err() {
                return;
            }
        }
    }

    /// False if it should be tried again.
    async fn publish_first(&self, view: &View, registry: &dyn Registry) -> bool {
        let matching: Vec<WorkerId> = {
            let mut state = self.lock();
            let experts = view.of_role(Role::ExpertWorker);
            experts.filter(|m| state.router.accept(&identity_of(m))).map(|m| m.id.clone()).collect()
        };
        let placement = match first_placement(&self.moe_layers, self.experts, &matching, self.expert_workers) {
            Ok(Some(placement)) => placement,
            Ok(None) => return true,
            Err(error) => {
                tracing::error!(%error, "the experts cannot be placed");
                return true;
            }
        };
        match registry.publish(placement).await {
            Ok(first) => {
                tracing::info!(epoch = %Epoch(1), workers = matching.len(), first, "the experts are placed");
                true
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the placement could not be published");
                false
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held; if it did, the state would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn warn_if_refused(&mut self, member: &Member) {
        let (theirs, key) = (identity_of(member), (member.hello.role(), member.id.clone(), member.hello.incarnation));
        if self.router.accept(&theirs) || self.refused.contains(&key) {
            return;
        }
        let ours = self.router.identity();
        tracing::warn!(worker = %member.id, ?theirs, ?ours, "a worker with another model or numerics is left out");
        self.refused.retain(|(role, id, _)| (*role, id) != (key.0, &key.1));
        self.refused.push(key);
    }
}

fn identity_of(member: &Member) -> Identity {
    Identity { fingerprint: member.hello.fingerprint.clone(), numerics: member.hello.numerics.clone() }
}

fn connect(address: &str) -> Option<Client> {
    let endpoint = match Endpoint::from_shared(format!("http://{address}")) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            tracing::warn!(address, %error, "an attention worker's address is no address");
            return None;
        }
    };
    let channel = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy();
    Some(AttentionWorkerClient::new(channel).max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX))
}

/// Asks for the load until the worker or the coordinator is gone.
async fn poll(workers: std::sync::Weak<Workers>, id: WorkerId, mut client: Client) {
    loop {
        let answer = tokio::time::timeout(LOAD_TIMEOUT, client.load(LoadRequest {})).await;
        let load = answer.ok().and_then(Result::ok).map(tonic::Response::into_inner);
        let joining = !load.is_some_and(|load| load.experts_reachable);
        match workers.upgrade() {
            Some(workers) => workers.set_load(&id, load),
            None => return,
        }
        tokio::time::sleep(if joining { LOAD_INTERVAL_JOINING } else { LOAD_INTERVAL }).await;
    }
}

/// A worker's status before the first token, as the client sees it.
fn refusal(status: &Status, request_id: &str, retry_after_s: u64) -> ApiError {
    let reason = status.message().to_owned();
    match status.code() {
        Code::ResourceExhausted => ApiError::Full { reason, retry_after_s },
        Code::Unavailable => ApiError::Unavailable { reason },
        Code::InvalidArgument | Code::OutOfRange => ApiError::invalid("request", reason),
        Code::AlreadyExists => ApiError::Exists { request_id: request_id.to_owned() },
        Code::FailedPrecondition => {
            ApiError::Unavailable { reason: format!("the attention worker refuses this coordinator: {reason}") }
        }
        code => ApiError::Failed { reason: format!("{code:?}: {reason}") },
    }
}
