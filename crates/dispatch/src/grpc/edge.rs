//! The attention worker's end: keeps one connection to one expert worker, again and again until it is dropped.

use std::future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures::{StreamExt, stream};
use moesaic_node::{Connector, Peer, handshake};
use moesaic_proto::limits::FRAME_BYTES_MAX;
use moesaic_proto::v1::exchange_message::Kind;
use moesaic_proto::v1::experts_client::ExpertsClient;
use moesaic_proto::{WorkerId, v1};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::{MissedTickBehavior, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Endpoint;
use tonic::{Status, Streaming};

use super::*;
use crate::error::Cause;
use crate::frame::{AheadFrame, AnswerFrame, Header, RequestFrame};
use crate::nccl::core::Claim;
use crate::nccl::{Fabric, Lanes, LanesOwner};
use crate::tracker::EdgeId;

/// Who hears from an edge. Called on the runtime: must not block.
pub trait EdgeOwner: Send + Sync + 'static {
    fn answer(&self, worker: &WorkerId, answer: AnswerFrame);
    /// The edge can be used from now on.
    fn edge_up(&self, edge: EdgeId);
    /// The worker has sent a ping back.
    fn heard(&self, edge: EdgeId);
    /// Whether somebody waits for the answer to that frame.
    fn awaits(&self, header: &Header) -> bool;
    /// The edge's connection is gone, and with it every answer that is not in.
    fn edge_down(&self, edge: EdgeId, reason: String);
}

/// What an edge is made of.
#[derive(Clone)]
pub struct EdgeConfig {
    pub id: EdgeId,
    pub worker: WorkerId,
    /// "host:port"
    pub address: String,
    /// This side's Hello.
    pub hello: v1::Hello,
    pub hidden: usize,
    pub connector: Connector,
    /// Where the worker has one of the same version, frames go over it.
    pub fabric: Option<Arc<dyn Fabric>>,
}

/// A connection to one expert worker, made in the background and made anew when it breaks. Clones share it; the last
/// one to go gives it up, after the answers on their way are in.
#[derive(Clone)]
pub struct Edge {
    state: Arc<State>,
    _given_up_on_drop: Arc<DropGuard>,
}

struct State {
    config: EdgeConfig,
    runtime: Handle,
    connection: Mutex<Connection>,
    lanes: Option<Arc<Lanes>>,
    traffic: Arc<Traffic>,
}

/// Bytes of requests, with their tables, and of answers.
#[derive(Debug, Default)]
struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Traffic {
    fn count_answer(&self, answer: &AnswerFrame) {
        let bytes = answer.result.as_ref().map_or(0, |values| values.len() * size_of::<f32>());
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

enum Connection {
    /// And why.
    Down(String),
    Live(mpsc::Sender<Outbound>),
}

/// What an edge sends over its stream.
pub(crate) enum Outbound {
    /// Its rows are in the processor's memory.
    Frame(RequestFrame),
    /// The same, ready to be sent.
    Encoded(v1::Frame),
    Ping(u64),
    Lane(v1::Lane),
}

impl Edge {
    /// `stop` ends it at once, dropping it in good order.
    pub fn connect(runtime: &Handle, config: EdgeConfig, owner: Weak<impl EdgeOwner>, stop: CancellationToken) -> Self {
        let given_up = CancellationToken::new();
        let connection = Mutex::new(Connection::Down("connecting".into()));
        let lanes = config.fabric.clone().map(|fabric| Lanes::new(fabric, config.hidden));
        let state = Arc::new(State { config, runtime: runtime.clone(), connection, lanes, traffic: Arc::default() });
        let keep = Box::pin(keep_connected(state.clone(), owner, given_up.clone()));
        runtime.spawn(async move { stop.run_until_cancelled(keep).await });
        Self { state, _given_up_on_drop: Arc::new(given_up.drop_guard()) }
    }

    pub fn id(&self) -> EdgeId {
        self.state.config.id
    }

    pub fn address(&self) -> &str {
        &self.state.config.address
    }

    pub fn is_live(&self) -> bool {
        matches!(*self.state.connection(), Connection::Live(_))
    }

    /// For people.
    pub fn describe(&self) -> String {
        match &*self.state.connection() {
            Connection::Down(reason) => reason.clone(),
            Connection::Live(_) => match &self.state.lanes {
                Some(lanes) => format!("connected; lane {}", lanes.describe()),
                None => "connected".into(),
            },
        }
    }

    /// What frames go over at present.
    pub fn transport(&self) -> &'static str {
        if self.has_lane() { "nccl" } else { "grpc" }
    }

    pub fn has_lane(&self) -> bool {
        self.state.lanes.as_ref().is_some_and(|lanes| lanes.is_up())
    }

    /// Bytes that were sent and that came back.
    pub fn traffic(&self) -> (u64, u64) {
        let Traffic { sent, received } = &*self.state.traffic;
        (sent.load(Ordering::Relaxed), received.load(Ordering::Relaxed))
    }

    pub fn lane_failures(&self) -> u64 {
        self.state.lanes.as_ref().map_or(0, |lanes| lanes.failures())
    }

    /// Queues a frame for the lane, or else for the connection, unless it has left ahead; never waits. Its answer, if that has come
    /// already.
    pub fn send(&self, frame: RequestFrame) -> Result<Option<AnswerFrame>, Cause> {
        let bytes = frame.encoded_len(self.state.config.hidden) as u64;
        self.state.traffic.sent.fetch_add(bytes, Ordering::Relaxed);
        match self.state.lanes.as_ref().map_or(Claim::None, |lanes| lanes.carry(&frame)) {
            Claim::None => {}
            Claim::Carried => return Ok(None),
            Claim::Answered(answer) => {
                self.state.traffic.count_answer(&answer);
                return Ok(Some(answer));
            }
        }
        match &*self.state.connection() {
            Connection::Down(reason) => Err(Cause::EdgeDown { reason: reason.clone() }),
            Connection::Live(frames) => {
                let place = frames.clone().try_reserve_owned().map_err(|error| match error {
                    TrySendError::Full(_) => Cause::QueueFull { limit: EDGE_FRAMES_MAX },
                    TrySendError::Closed(_) => Cause::EdgeDown { reason: "its connection is closing".into() },
                })?;
                if frame.activations().are_there() {
                    // They are waited for and read where nobody else waits: pings go on.
                    let hidden = self.state.config.hidden;
                    self.state.runtime.spawn_blocking(move || place.send(Outbound::Encoded(frame.encode(hidden))));
                } else {
                    place.send(Outbound::Frame(frame));
                }
                Ok(None)
            }
        }
    }

    /// Gives the lane a frame before it is known what it asks: [`Edge::send`] follows, or [`Edge::forget`]. False if there is no lane
    /// that takes it.
    pub fn send_ahead(&self, frame: AheadFrame) -> bool {
        self.state.lanes.as_ref().is_some_and(|lanes| lanes.carry_ahead(frame))
    }

    pub fn forget(&self, header: &Header) {
        if let Some(lanes) = &self.state.lanes {
            lanes.forget(header);
        }
    }
}

impl State {
    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reason before this one; `None` if the edge was live.
    fn set_down(&self, reason: &str) -> Option<String> {
        match std::mem::replace(&mut *self.connection(), Connection::Down(reason.to_owned())) {
            Connection::Down(before) => Some(before),
            Connection::Live(_) => None,
        }
    }
}

async fn keep_connected(state: Arc<State>, owner: Weak<impl EdgeOwner>, given_up: CancellationToken) {
    let EdgeConfig { id, worker, address, .. } = &state.config;
    let mut backoff = BACKOFF_MIN;
    loop {
        let reason = run_connection(&state, &owner, &given_up).await;
        match state.set_down(&reason) {
            None => {
                tracing::warn!(%worker, address, reason, "edge to expert worker broke");
                backoff = BACKOFF_MIN;
            }
            Some(before) if before != reason => tracing::info!(%worker, address, reason, "no edge to expert worker"),
            Some(_) => {}
        }
        // Also where it was given up with answers missing. Does nothing if nothing was sent.
        let Some(owner) = owner.upgrade() else { return };
        owner.edge_down(*id, reason);
        drop(owner);
        if given_up.run_until_cancelled(tokio::time::sleep(backoff)).await.is_none() {
            return;
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// One connection from beginning to end, and why it ended.
async fn run_connection(state: &State, owner: &Weak<impl EdgeOwner>, given_up: &CancellationToken) -> String {
    let (sender, outbound) = mpsc::channel(EDGE_FRAMES_MAX);
    let hears: Arc<dyn LanesOwner> =
        Arc::new(Hears { owner: owner.clone(), worker: state.config.worker.clone(), traffic: state.traffic.clone() });
    // A connection before this one has said that it is gone.
    state.lanes.iter().for_each(|lanes| lanes.forget_left());
    let opened = given_up.run_until_cancelled(open(&state.config, outbound)).await;
    let (mut answers, peer) = match opened {
        None => return GIVEN_UP.into(),
        Some(Err(reason)) => return reason,
        Some(Ok(opened)) => opened,
    };
    *state.connection() = Connection::Live(sender.clone());
    tracing::info!(worker = %state.config.worker, address = state.config.address, "edge to expert worker is up");
    match owner.upgrade() {
        Some(owner) => owner.edge_up(state.config.id),
        None => return GIVEN_UP.into(),
    }
    let receive = receive(state, &mut answers, owner);
    let ended = async {
        tokio::select! {
            reason = receive => reason,
            () = keep_lanes(state, &peer, sender.clone(), hears.clone()) => "its lanes have ended".into(),
            () = ping(sender.clone()) => "its connection stands still".into(),
        }
    };
    if let Some(reason) = given_up.run_until_cancelled(ended).await {
        return reason;
    }
    state.set_down(GIVEN_UP);
    let finish = async {
        if let Some(lanes) = &state.lanes {
            lanes.ask_again(&sender, &hears).await;
        }
        // Ends the request stream; the worker answers what it has and ends its own.
        drop(sender);
        future::pending().await
    };
    let rest = async {
        tokio::select! {
            reason = self::receive(state, &mut answers, owner) => reason,
            never = finish => never,
        }
    };
    timeout(LINGER, rest).await.unwrap_or_else(|_| GIVEN_UP.into())
}

const GIVEN_UP: &str = "the edge was given up";

/// Offers lanes for as long as it is polled, if the worker has what this side has.
async fn keep_lanes(state: &State, peer: &v1::Hello, sender: mpsc::Sender<Outbound>, hears: Arc<dyn LanesOwner>) {
    let Some(lanes) = &state.lanes else { return future::pending().await };
    let own = &state.config.hello.nccl;
    if peer.nccl != *own {
        lanes.cannot(match peer.nccl.as_str() {
            "" => "none: the worker has no NCCL".into(),
            theirs => format!("none: NCCL is {own} here and {theirs} there"),
        });
        return future::pending().await;
    }
    lanes.keep(sender, hears).await;
}

/// Hears from an edge's lanes.
struct Hears<O> {
    owner: Weak<O>,
    worker: WorkerId,
    traffic: Arc<Traffic>,
}

impl<O: EdgeOwner> LanesOwner for Hears<O> {
    fn answer(&self, answer: AnswerFrame) {
        if let Some(owner) = self.owner.upgrade() {
            self.traffic.count_answer(&answer);
            owner.answer(&self.worker, answer);
        }
    }

    fn awaits(&self, header: &Header) -> bool {
        self.owner.upgrade().is_some_and(|owner| owner.awaits(header))
    }
}

/// Sends pings for as long as the connection takes anything.
async fn ping(outbound: mpsc::Sender<Outbound>) {
    let mut every = tokio::time::interval(PING_INTERVAL);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0.. {
        every.tick().await;
        // Where the queue is full there is something to answer anyhow.
        if let Err(TrySendError::Closed(_)) = outbound.try_send(Outbound::Ping(number)) {
            return;
        }
    }
}

/// Connects and exchanges Hellos.
async fn open(
    config: &EdgeConfig,
    outbound: mpsc::Receiver<Outbound>,
) -> Result<(Streaming<v1::ExchangeMessage>, v1::Hello), String> {
    let peer = Peer { role: v1::Role::ExpertWorker, id: Some(config.worker.clone()), address: config.address.clone() };
    let channel = config.connector.connect(&peer, &endpoint(&peer)?).await.map_err(|error| chain(&error))?;
    let mut client = ExpertsClient::new(channel)
        .max_decoding_message_size(FRAME_BYTES_MAX)
        .max_encoding_message_size(FRAME_BYTES_MAX);
    let hidden = config.hidden;
    let hello = v1::ExchangeMessage { kind: Some(Kind::Hello(config.hello.clone())) };
    let message = move |outbound| match outbound {
        Outbound::Frame(frame) => v1::ExchangeMessage { kind: Some(Kind::Frame(frame.encode(hidden))) },
        Outbound::Encoded(frame) => v1::ExchangeMessage { kind: Some(Kind::Frame(frame)) },
        Outbound::Ping(number) => v1::ExchangeMessage { kind: Some(Kind::Ping(v1::Ping { number })) },
        Outbound::Lane(lane) => v1::ExchangeMessage { kind: Some(Kind::Lane(lane)) },
    };
    let outbound = stream::iter([hello]).chain(ReceiverStream::new(outbound).map(message));
    let greeting = async {
        let mut inbound = client.exchange(outbound).await?.into_inner();
        let first = inbound.message().await?;
        Ok::<_, Status>((inbound, first))
    };
    let greeted = timeout(HELLO_TIMEOUT, greeting).await;
    let (inbound, first) = match greeted {
        Err(_) => return Err(format!("no Hello within {} s", HELLO_TIMEOUT.as_secs())),
        Ok(Err(status)) => return Err(words(&status)),
        Ok(Ok(greeted)) => greeted,
    };
    let Some(v1::ExchangeMessage { kind: Some(Kind::Hello(peer)) }) = first else {
        return Err("its first message is no Hello".into());
    };
    handshake::check(&config.hello, &peer, v1::Role::ExpertWorker).map_err(|mismatch| mismatch.to_string())?;
    if peer.id != config.worker.as_str() {
        return Err(format!("id: at {} is {:?}; expected {:?}", config.address, peer.id, config.worker.as_str()));
    }
    Ok((inbound, peer))
}

fn endpoint(peer: &Peer) -> Result<Endpoint, String> {
    let endpoint = peer.endpoint().map_err(|error| chain(&error))?;
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// Passes answers on until the stream ends, and says why it did.
async fn receive(state: &State, answers: &mut Streaming<v1::ExchangeMessage>, owner: &Weak<impl EdgeOwner>) -> String {
    let config = &state.config;
    loop {
        let message = answers.message().await;
        let Some(owner) = owner.upgrade() else { return GIVEN_UP.into() };
        let frame = match message {
            Ok(Some(v1::ExchangeMessage { kind: Some(Kind::Frame(frame)) })) => frame,
            Ok(Some(v1::ExchangeMessage { kind: Some(Kind::Ping(_)) })) => {
                owner.heard(config.id);
                continue;
            }
            Ok(Some(v1::ExchangeMessage { kind: Some(Kind::Lane(said)) })) => {
                if let Some(lanes) = &state.lanes {
                    lanes.hear(said);
                }
                continue;
            }
            Ok(Some(_)) => return "it sent a message that is no frame".into(),
            Ok(None) => return "it closed the connection".into(),
            Err(status) => return words(&status),
        };
        match AnswerFrame::decode(frame) {
            Ok(answer) => {
                state.traffic.count_answer(&answer);
                owner.answer(&config.worker, answer);
            }
            Err(error) => return format!("it sent a frame that is wrong: {error}"),
        }
    }
}

/// What a status says, or at least its code.
fn words(status: &Status) -> String {
    if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() }
}

/// An error and its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
