//! The cluster's attention workers as the coordinator sees them: a channel to each, its load, and the sequences there.
//! Follows the registry's view, and what the workers answer: one that has left the registry but answers is there. Which
//! one gets a sequence is decided in `core::routing`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use moesaic_node::{Connector, Member, Registry, View, handshake};
use moesaic_proto::limits::WORKER_MESSAGE_BYTES_MAX;
use moesaic_proto::v1::attention_worker_client::AttentionWorkerClient;
use moesaic_proto::v1::{AbortCallRequest, Hello, LoadRequest, LoadResponse, Role, RunEvent, RunRequest};
use moesaic_proto::{Epoch, WorkerId};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::core::routing::Identity;
use crate::core::{ApiError, Router};
use crate::model::Model;

/// How often a worker's load is asked for: soon after it has joined, then at leisure.
const LOAD_INTERVAL_JOINING: Duration = Duration::from_millis(50);
const LOAD_INTERVAL: Duration = Duration::from_millis(250);
/// A worker that does not answer for this long gets no new sequences; one that does so again loses those it has.
const LOAD_TIMEOUT: Duration = Duration::from_secs(1);
const LOAD_FAILURES_MAX: u32 = 2;
/// Answers in a row that say that not every expert is reached, before sequences go where they are.
const UNREACHABLE_MAX: u32 = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A call is refused or accepted within this time.
const RUN_TIMEOUT: Duration = Duration::from_secs(10);
/// A sequence to resume is found within this time, or made again.
const RESUME_TIMEOUT: Duration = Duration::from_secs(1);
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);
/// A peer that does not answer a ping for this long is gone, and its streams with it.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

pub type Client = AttentionWorkerClient<Channel>;

pub struct Workers {
    state: Mutex<State>,
    view: watch::Receiver<Arc<View>>,
    /// Why no token could be produced; None if one could.
    not_ready: watch::Sender<Option<String>>,
    /// What this coordinator says of itself; the model's fingerprint is added when it is known.
    hello: Hello,
    connector: Connector,
    has_experts: bool,
    expert_workers: usize,
}

#[derive(Default)]
struct State {
    router: Router,
    clients: BTreeMap<WorkerId, Connected>,
    /// Members with another model, so that each is warned of once.
    refused: Vec<(Role, WorkerId, u64)>,
}

struct Connected {
    member: Member,
    client: Client,
    polling: AbortHandle,
    /// It has left the registry; gone for good when it does not answer either.
    has_left: bool,
    /// Load calls that failed, and that told of experts out of reach, in a row.
    failures: u32,
    unreachable: u32,
    /// Cancelled when its sequences are better off elsewhere.
    lost: CancellationToken,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.polling.abort();
    }
}

/// A running sequence: its events, and its place on a worker.
pub struct Call {
    pub events: Streaming<RunEvent>,
    pub place: Place,
}

/// A sequence's place on a worker; given back when dropped.
pub struct Place {
    pub workers: Arc<Workers>,
    pub worker: WorkerId,
    client: Client,
    tokens: u64,
    /// Its call's number.
    call: u64,
    /// Cancelled when the sequence is better off elsewhere.
    pub lost: CancellationToken,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.workers.lock().router.release(&self.worker, self.tokens);
    }
}

impl Place {
    /// Has the worker forget the sequence, in the background: else it would keep it for a while. One that has been taken
    /// over from this call goes on, however late the worker hears of this.
    pub fn abort(&self, request_id: &str) {
        let request = AbortCallRequest { request_id: request_id.to_owned(), call: self.call };
        let mut client = self.client.clone();
        let abort = async move { drop(timeout(ABORT_TIMEOUT, client.abort(request)).await) };
        // Without a runtime the process is ending, and the worker will find out.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(abort);
        }
    }
}

impl Workers {
    pub fn new(
        cluster: &str,
        id: &WorkerId,
        model: &Model,
        expert_workers: usize,
        registry: &dyn Registry,
        connector: Connector,
    ) -> Self {
        Self {
            state: Mutex::default(),
            view: registry.view(),
            not_ready: watch::Sender::new(Some("starting".into())),
            hello: handshake::hello(cluster, Role::Coordinator, id, "", ""),
            connector,
            has_experts: !model.moe_layers.is_empty(),
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

    /// Starts a sequence on the least loaded worker, or on the next one if that cannot take it; on one of `last` only if
    /// there is no other.
    pub async fn start(
        self: &Arc<Self>,
        mut run: RunRequest,
        retry_after_s: u64,
        last: &[WorkerId],
    ) -> Result<Call, ApiError> {
        let tokens = run.prompt.len() as u64 + u64::from(run.max_tokens);
        run.hello = Some(self.own_hello());
        let mut tried: Vec<WorkerId> = Vec::new();
        let mut refused = None;
        let next = |tried: &[WorkerId]| {
            let preferred = self.take(tokens, &[tried, last].concat());
            preferred.or_else(|| self.take(tokens, tried))
        };
        while let Some(mut place) = next(&tried) {
            let lost = place.lost.clone();
            run.call = place.call;
            let call = lost.run_until_cancelled(timeout(RUN_TIMEOUT, place.client.run(run.clone())));
            let status = match call.await {
                Some(Ok(Ok(events))) => return Ok(Call { events: events.into_inner(), place }),
                Some(Ok(Err(status))) => status,
                _ => Status::unavailable(format!("attention worker {} does not answer", place.worker)),
            };
            let is_passing = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted | Code::AlreadyExists);
            if !is_passing && !is_transport(&status) {
                return Err(refusal(&status, &run.request_id, retry_after_s));
            }
            tracing::debug!(worker = %place.worker, code = ?status.code(), "a worker takes no sequence");
            if is_transport(&status) {
                self.set_load(&place.worker, None);
            }
            tried.push(place.worker.clone());
            refused = Some(status);
        }
        match refused {
            Some(status) => Err(refusal(&status, &run.request_id, retry_after_s)),
            None => Err(ApiError::Unavailable { reason: self.reason().unwrap_or_else(|| "no worker is free".into()) }),
        }
    }

    /// Takes over a sequence that a worker still has, from its first event on.
    pub async fn resume(self: &Arc<Self>, mut run: RunRequest) -> Option<Call> {
        (run.hello, run.resume) = (Some(self.own_hello()), true);
        let tokens = run.prompt.len() as u64 + u64::from(run.max_tokens);
        let ids: Vec<WorkerId> = self.lock().clients.keys().cloned().collect();
        let asked = ids.into_iter().filter_map(|id| {
            let mut place = self.place(id, tokens)?;
            let run = RunRequest { call: place.call, ..run.clone() };
            Some(async move {
                let events = timeout(RESUME_TIMEOUT, place.client.run(run)).await.ok()?.ok()?.into_inner();
                Some(Call { events, place })
            })
        });
        let mut found = asked.collect::<FuturesUnordered<_>>().filter_map(std::future::ready).boxed();
        found.next().await
    }

    fn take(self: &Arc<Self>, tokens: u64, tried: &[WorkerId]) -> Option<Place> {
        let worker = self.lock().router.pick(tried)?;
        self.place(worker, tokens)
    }

    fn place(self: &Arc<Self>, worker: WorkerId, tokens: u64) -> Option<Place> {
        let mut state = self.lock();
        let connected = state.clients.get(&worker)?;
        let (client, lost) = (connected.client.clone(), connected.lost.clone());
        state.router.hold(&worker, tokens);
        drop(state);
        let call = uuid::Uuid::new_v4().as_u64_pair().0;
        Some(Place { workers: self.clone(), worker, client, tokens, call, lost })
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
        let known: BTreeMap<_, _> = view.of_role(Role::AttentionWorker).map(|m| (m.id.clone(), m)).collect();
        let mut gone = Vec::new();
        for (id, connected) in &mut state.clients {
            match known.get(id) {
                Some(m) if m.address == connected.member.address && m.hello == connected.member.hello => {
                    connected.has_left = false;
                }
                // Another process has taken its place.
                Some(_) => gone.push(id.clone()),
                None => connected.has_left = true,
            }
        }
        gone.iter().for_each(|id| state.forget(id));
        for (id, member) in known {
            if state.clients.contains_key(&id) || !state.router.accept(&Identity::of(&member.hello)) {
                continue;
            }
            let Some(client) = connect(&self.connector, member) else { continue };
            tracing::info!(worker = %id, address = member.address, "an attention worker has joined");
            state.router.add(id.clone());
            let polling = tokio::spawn(poll(Arc::downgrade(self), id.clone(), client.clone())).abort_handle();
            let (member, lost) = (member.clone(), CancellationToken::new());
            let connected = Connected { member, client, polling, has_left: false, failures: 0, unreachable: 0, lost };
            state.clients.insert(id, connected);
        }
        state.router.set_cordoned(|id| view.cordons.contains_key(&(Role::AttentionWorker, id.clone())));
        drop(state);
        self.update_readiness();
    }

    /// What a worker has answered; None: nothing. Its sequences go elsewhere if it is silent or does not reach every
    /// expert for long.
    fn answered(&self, id: &WorkerId, load: Option<LoadResponse>) {
        let mut state = self.lock();
        let another_is_ready = state.router.is_ready_without(id);
        let Some(connected) = state.clients.get_mut(id) else { return };
        let (fails, is_unreachable) = (load.is_none(), load.as_ref().is_some_and(|load| !load.experts_reachable));
        connected.failures = if fails { connected.failures + 1 } else { 0 };
        connected.unreachable = if is_unreachable && another_is_ready { connected.unreachable + 1 } else { 0 };
        if fails && connected.has_left {
            tracing::info!(worker = %id, "an attention worker has left");
            state.forget(id);
        } else if connected.failures >= LOAD_FAILURES_MAX || connected.unreachable >= UNREACHABLE_MAX {
            if connected.failures == LOAD_FAILURES_MAX || connected.unreachable == UNREACHABLE_MAX {
                tracing::warn!(worker = %id, silent = fails, "sequences leave an attention worker");
            }
            std::mem::take(&mut connected.lost).cancel();
        }
        drop(state);
        self.set_load(id, load);
    }

    fn set_load(&self, worker: &WorkerId, load: Option<LoadResponse>) {
        self.lock().router.set_load(worker, load);
        self.update_readiness();
    }

    /// Each attention worker that is known, and its last answer.
    pub fn loads(&self) -> Vec<(Member, Option<LoadResponse>)> {
        let state = self.lock();
        let load = |connected: &Connected| state.router.load(&connected.member.id).cloned();
        let mut loads: Vec<_> = state.clients.values().map(|c| (c.member.clone(), load(c))).collect();
        loads.sort_unstable_by(|(a, _), (b, _)| a.id.cmp(&b.id));
        loads
    }

    /// Whether an attention worker sends its rows under the placement of this epoch.
    pub fn is_used(&self, epoch: Epoch) -> bool {
        let state = self.lock();
        state.clients.keys().filter_map(|id| state.router.load(id)).any(|load| load.epoch == epoch.0)
    }

    pub fn clients(&self) -> Vec<(WorkerId, Client)> {
        self.lock().clients.iter().map(|(id, connected)| (id.clone(), connected.client.clone())).collect()
    }

    /// Whether a member computes what the others do; the first one that was seen says what that is.
    pub fn accepts(&self, member: &Member) -> bool {
        self.lock().router.accept(&Identity::of(&member.hello))
    }

    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
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
        if !self.has_experts {
            return None;
        }
        let Some(placement) = &view.placement else {
            let (there, expected) = (view.of_role(Role::ExpertWorker).count(), self.expert_workers);
            return Some(format!("{there} of {expected} expert workers are registered"));
        };
        let (all, loaded) = (placement.workers(), |id: &&WorkerId| view.has_loaded(id, placement));
        let (all, ready) = (all.len(), all.iter().filter(loaded).count());
        (ready < all).then(|| format!("{ready} of {all} expert workers have loaded their experts"))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held; if it did, the state would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget(&mut self, id: &WorkerId) {
        self.clients.remove(id);
        self.router.remove(id);
    }

    fn warn_if_refused(&mut self, member: &Member) {
        let (theirs, key) =
            (Identity::of(&member.hello), (member.hello.role(), member.id.clone(), member.hello.incarnation));
        if self.router.accept(&theirs) || self.refused.contains(&key) {
            return;
        }
        let ours = self.router.identity();
        tracing::warn!(worker = %member.id, ?theirs, ?ours, "a worker with another model or numerics is left out");
        self.refused.retain(|(role, id, _)| (*role, id) != (key.0, &key.1));
        self.refused.push(key);
    }
}

fn connect(connector: &Connector, member: &Member) -> Option<Client> {
    let peer = member.peer();
    let endpoint = match peer.endpoint() {
        Ok(endpoint) => endpoint,
        Err(error) => {
            tracing::warn!(address = peer.address, %error, "an attention worker's address is no address");
            return None;
        }
    };
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let channel = connector.connect_lazy(&peer, &endpoint);
    Some(AttentionWorkerClient::new(channel).max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX))
}

/// Asks for the load until the worker or the coordinator is gone.
async fn poll(workers: Weak<Workers>, id: WorkerId, mut client: Client) {
    let mut joining = true;
    loop {
        let answer = timeout(LOAD_TIMEOUT, client.load(LoadRequest {})).await;
        let load = answer.ok().and_then(Result::ok).map(tonic::Response::into_inner);
        joining &= !load.as_ref().is_some_and(|load| load.experts_reachable);
        match workers.upgrade() {
            Some(workers) => workers.answered(&id, load),
            None => return,
        }
        tokio::time::sleep(if joining { LOAD_INTERVAL_JOINING } else { LOAD_INTERVAL }).await;
    }
}

/// Whether a status tells of a broken connection, and not of the request.
pub fn is_transport(status: &Status) -> bool {
    let has_source = std::error::Error::source(status).is_some();
    let is_broken = matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled) && has_source;
    status.code() == Code::Unavailable || is_broken || status.message().contains("h2 protocol error")
}

/// A worker's status before the first token, as the client sees it.
fn refusal(status: &Status, request_id: &str, retry_after_s: u64) -> ApiError {
    let reason = status.message().to_owned();
    match status.code() {
        // Whatever its code: another worker may take it, a moment later.
        _ if is_transport(status) => ApiError::Unavailable { reason },
        Code::ResourceExhausted => ApiError::Full { reason, retry_after_s },
        Code::InvalidArgument | Code::OutOfRange => ApiError::invalid("request", reason),
        Code::AlreadyExists => ApiError::Exists { request_id: request_id.to_owned() },
        Code::FailedPrecondition => {
            ApiError::Unavailable { reason: format!("the attention worker refuses this coordinator: {reason}") }
        }
        code => ApiError::Failed { reason: format!("{code:?}: {reason}") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// tonic calls it Unknown; a sequence that looks for a worker would end with it.
    #[test]
    fn a_broken_connection_is_no_failure_of_the_request() {
        let broken = Status::from_error(Box::new(std::io::Error::other("transport error")));
        let own = Status::unknown("transport error");
        assert_eq!((broken.code(), is_transport(&broken)), (Code::Unknown, true));
        assert!(refusal(&broken, "r", 1).is_passing() && !refusal(&own, "r", 1).is_passing());
    }
}
