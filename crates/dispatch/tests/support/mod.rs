//! Expert workers that compute a simple function, clusters of them in this process or behind loopback sockets, and the
//! sum that must come out of it.

#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moesaic_dispatch::nccl::Fabric;
use moesaic_dispatch::{
    Activations, CombineOps, DispatchConfig, DispatchError, Dispatcher, ExpertHost, Holder, Hub, Pending, Refusal,
    ReplySender, RequestFrame, Route, Rows, Shape, grpc,
};
use moesaic_node::Connector;
use moesaic_proto::v1::{self, RefusalReason};
use moesaic_proto::{Epoch, ExpertId, LayerId, Placement, WorkerId};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};

pub const HIDDEN: usize = 24;
pub const EXPERTS: usize = 12;
pub const GROUPS: usize = 4;
pub const TOP_K: usize = 5;
pub const LAYER: LayerId = LayerId(3);
/// The attention worker's number.
pub const SOURCE: u16 = 7;
pub const SHAPE: Shape = Shape { hidden: HIDDEN, experts: EXPERTS };

fn first(y: &mut [f32], w: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = w * x);
}

fn next(y: &mut [f32], w: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = w.mul_add(*x, *y));
}

fn add(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

pub const OPS: CombineOps = CombineOps { first, next, add };

/// What the "expert" computes: any function with rounding in it will do.
pub fn expert_row(expert: ExpertId, x: &[f32]) -> Vec<f32> {
    let scale = 0.3 + f32::from(expert.0) * 0.7;
    (0..x.len()).map(|i| (x[i] * scale).sin() + x[(i + 1) % x.len()] * 1.1).collect()
}

/// Rule 1(c), read off the page.
pub fn expected(x: &[f32], routes: &[Route]) -> Vec<f32> {
    let mut y = Vec::new();
    for (row, routes) in x.chunks(HIDDEN).zip(routes.chunks(TOP_K)) {
        let mut sum: Option<Vec<f32>> = None;
        for group in 0..GROUPS {
            let mut group_sum: Option<Vec<f32>> = None;
            for route in routes.iter().filter(|r| usize::from(r.expert.0) / EXPERTS.div_ceil(GROUPS) == group) {
                let value = expert_row(route.expert, row);
                match &mut group_sum {
                    None => group_sum = Some(value.iter().map(|v| route.weight * v).collect()),
                    Some(sum) => next(sum, route.weight, &value),
                }
            }
            match (&mut sum, group_sum) {
                (_, None) => {}
                (None, group_sum) => sum = group_sum,
                (Some(sum), Some(group_sum)) => add(sum, &group_sum),
            }
        }
        y.extend(sum.unwrap());
    }
    y
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Rows and routes made from a seed: every row chooses TOP_K different experts.
pub fn micro_batch(rows: usize, seed: u64) -> (Vec<f32>, Vec<Route>) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as u32
    };
    let x = (0..rows * HIDDEN).map(|_| draw() as f32 / 1e9 - 1.0).collect();
    let mut routes = Vec::new();
    for _ in 0..rows {
        let mut chosen = BTreeSet::new();
        while chosen.len() < TOP_K {
            chosen.insert(draw() as usize % EXPERTS);
        }
        routes.extend(
            chosen.into_iter().map(|e| Route { expert: ExpertId(e as u16), weight: draw() as f32 / 2e9 + 0.01 }),
        );
    }
    (x, routes)
}

/// What a fake worker does with a frame.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    Answers,
    /// After so long.
    AnswersAfter(Duration),
    /// Keeps every frame and says nothing, until it is told to. Its server sends pings back.
    Keeps,
    /// The same with the frames of this attention worker only.
    KeepsOf(u16),
    Refuses(RefusalReason),
    /// Gives one row too few.
    Short,
    /// Drops it.
    Forgets,
    /// Now this and now that of the above, by this number and the frame's.
    Fickle(u64),
}

pub struct FakeHost {
    mood: Mutex<Mood>,
    held: Mutex<Vec<(RequestFrame, ReplySender)>>,
    /// All that it was given, in order.
    pub frames: Mutex<Vec<RequestFrame>>,
    /// How many of them the caller may have computed itself.
    pub answered_by_caller: AtomicUsize,
}

impl FakeHost {
    pub fn new(mood: Mood) -> Arc<Self> {
        let (held, frames, answered_by_caller) = Default::default();
        Arc::new(Self { mood: Mutex::new(mood), held, frames, answered_by_caller })
    }

    pub fn frame_count(&self) -> usize {
        self.frames.lock().unwrap().len()
    }

    /// The epochs of all frames that it was given.
    pub fn epochs(&self) -> Vec<u32> {
        self.frames.lock().unwrap().iter().map(|frame| frame.header.epoch.0).collect()
    }

    /// What it does from now on.
    pub fn set_mood(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// Answers what it keeps.
    pub fn answer_held(&self) {
        for (frame, reply) in std::mem::take(&mut *self.held.lock().unwrap()) {
            reply.send(Ok(answer(&frame).into()));
        }
    }

    /// Drops what it keeps.
    pub fn forget_held(&self) {
        let forgotten = std::mem::take(&mut *self.held.lock().unwrap());
        drop(forgotten);
    }

    fn react(&self, mood: Mood, frame: RequestFrame, reply: ReplySender) {
        match mood {
            Mood::Keeps => self.held.lock().unwrap().push((frame, reply)),
            Mood::KeepsOf(source) if frame.header.source == source => self.react(Mood::Keeps, frame, reply),
            Mood::Answers | Mood::KeepsOf(_) => reply.send(Ok(answer(&frame).into())),
            Mood::AnswersAfter(time) => drop(std::thread::spawn(move || {
                std::thread::sleep(time);
                reply.send(Ok(answer(&frame).into()));
            })),
            Mood::Refuses(reason) => reply.send(Err(Refusal::new(reason, "as told"))),
            Mood::Short => reply.send(Ok(answer(&frame)[HIDDEN..].to_vec().into())),
            Mood::Forgets => drop(reply),
            Mood::Fickle(seed) => {
                use RefusalReason::*;
                let number = seed.wrapping_add(u64::from(frame.header.sequence)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let moods = [
                    Mood::Answers,
                    Mood::Short,
                    Mood::Forgets,
                    Mood::Refuses(Busy),
                    Mood::Refuses(NotHeld),
                    Mood::Refuses(Epoch),
                ];
                self.react(moods[(number >> 32) as usize % moods.len()], frame, reply);
            }
        }
    }
}

impl ExpertHost for FakeHost {
    fn shape(&self) -> Shape {
        SHAPE
    }

    fn submit(&self, frame: RequestFrame, reply: ReplySender) {
        let mood = *self.mood.lock().unwrap();
        if mood == Mood::Keeps || mood == Mood::KeepsOf(frame.header.source) {
            // Locked to the end, so that a test which sees the frame finds it kept.
            let mut frames = self.frames.lock().unwrap();
            frames.push(frame.clone());
            return self.react(mood, frame, reply);
        }
        // Not locked: an answer to a caller of this process may bring the next frame.
        self.frames.lock().unwrap().push(frame.clone());
        self.react(mood, frame, reply);
    }

    fn answer(&self, frame: RequestFrame, reply: ReplySender) {
        self.answered_by_caller.fetch_add(1, Ordering::SeqCst);
        self.submit(frame, reply);
    }
}

fn answer(frame: &RequestFrame) -> Vec<f32> {
    let Activations::F32(values) = frame.activations() else { panic!("the tests send f32") };
    let mut y = Vec::new();
    for (output, terms) in frame.outputs() {
        let x = &values[frame.position(output.row()) as usize * HIDDEN..][..HIDDEN];
        let mut sum = expert_row(terms[0].expert(), x);
        if output.is_weighted() {
            sum.iter_mut().for_each(|v| *v *= terms[0].weight());
            terms[1..].iter().for_each(|t| next(&mut sum, t.weight(), &expert_row(t.expert(), x)));
        }
        y.extend(sum);
    }
    y
}

pub fn worker(number: usize) -> WorkerId {
    WorkerId::new(&format!("w{number}")).unwrap()
}

/// `holders[expert]` are numbers of workers.
pub fn placement(workers: usize, holders: &[Vec<u32>]) -> Arc<Placement> {
    placement_at(1, workers, holders)
}

pub fn placement_at(epoch: u32, workers: usize, holders: &[Vec<u32>]) -> Arc<Placement> {
    let layers = BTreeMap::from([(LAYER, holders.to_vec())]);
    Arc::new(Placement::new(Epoch(epoch), (0..workers).map(worker).collect(), layers).unwrap())
}

/// Every worker holds everything.
pub fn replicas(workers: usize) -> Vec<Vec<u32>> {
    vec![(0..workers as u32).collect(); EXPERTS]
}

/// Experts in contiguous blocks.
pub fn blocks(workers: usize) -> Vec<Vec<u32>> {
    (0..EXPERTS).map(|e| vec![(e * workers / EXPERTS) as u32]).collect()
}

pub fn hello(role: v1::Role, id: &str) -> v1::Hello {
    v1::Hello {
        protocol_version: moesaic_proto::PROTOCOL_VERSION,
        cluster: "test".into(),
        role: role.into(),
        id: id.into(),
        incarnation: 1,
        fingerprint: "0123456789abcdef0123456789abcdef".into(),
        numerics: "f32".into(),
        source: if role == v1::Role::AttentionWorker { SOURCE.into() } else { 0 },
        expert_numerics: String::new(),
        nccl: String::new(),
    }
}

pub fn config(layer_deadline: Duration) -> DispatchConfig {
    DispatchConfig {
        hidden: HIDDEN,
        experts: EXPERTS,
        groups: GROUPS,
        source: SOURCE,
        layer_deadline,
        hello: hello(v1::Role::AttentionWorker, "a0"),
        connector: Connector::default(),
        fabric: None,
        ops: OPS,
    }
}

/// Longer than any test should take.
pub const PATIENT: Duration = Duration::from_secs(20);
/// For calls that fail.
pub const SHORT: Duration = Duration::from_millis(300);
/// Between two looks at a condition.
pub const POLL: Duration = Duration::from_millis(2);

/// A member that has loaded the experts of every epoch that there is.
pub fn member(address: impl ToString) -> Holder {
    Holder { address: address.to_string(), epoch_loaded: Epoch(9) }
}

/// A dispatcher over workers of this process.
pub fn local(hosts: &[Arc<FakeHost>], holders: &[Vec<u32>], deadline: Duration) -> Dispatcher {
    let hub = Hub::default();
    let mut members = BTreeMap::new();
    for (number, host) in hosts.iter().enumerate() {
        hub.insert(worker(number), host.clone());
        members.insert(worker(number), member("in this process"));
    }
    let dispatcher = Dispatcher::new(config(deadline), Some(hub));
    dispatcher.set_view(placement(hosts.len(), holders), &members);
    dispatcher
}

/// An expert worker's server on a loopback port; dropping it cuts its connections.
pub struct RemoteWorker {
    pub address: SocketAddr,
    pub closing: CancellationToken,
    /// Its own: when it ends, so do the tasks of its connections, as if the process had been killed.
    runtime: Option<Runtime>,
}

impl RemoteWorker {
    pub async fn start(host: Arc<dyn ExpertHost>, hello: v1::Hello) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), host, hello).await
    }

    pub async fn start_at(address: SocketAddr, host: Arc<dyn ExpertHost>, hello: v1::Hello) -> Self {
        Self::start_with(address, host, None, hello).await
    }

    pub async fn start_with(
        address: SocketAddr,
        host: Arc<dyn ExpertHost>,
        fabric: Option<Arc<dyn Fabric>>,
        hello: v1::Hello,
    ) -> Self {
        let closing = CancellationToken::new();
        let service = grpc::service(host, fabric, hello, closing.clone());
        let (address, runtime) = serve(address, Server::builder().add_service(service)).await;
        Self { address, closing, runtime: Some(runtime) }
    }

    /// Nothing in it moves until what this returns is dropped: its connections stay open and say nothing.
    pub async fn freeze(&self) -> Frozen {
        let (thaw, thawed) = std::sync::mpsc::sync_channel(0);
        let (frozen, is_frozen) = oneshot::channel();
        // It has one thread.
        self.runtime.as_ref().unwrap().spawn(async move {
            frozen.send(()).unwrap();
            thawed.recv().unwrap_err()
        });
        is_frozen.await.unwrap();
        thaw
    }
}

pub type Frozen = std::sync::mpsc::SyncSender<()>;

impl Drop for RemoteWorker {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// Serves on a runtime of its own.
pub async fn serve(address: SocketAddr, routes: Router) -> (SocketAddr, Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (bound, address_bound) = oneshot::channel();
    runtime.spawn(async move {
        let listener = bind(address).await;
        bound.send(listener.local_addr().unwrap()).unwrap();
        routes.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))).await.unwrap();
    });
    (address_bound.await.unwrap(), runtime)
}

/// The port of a worker that was dropped is free a moment later.
async fn bind(address: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => tokio::time::sleep(POLL).await,
            bound => return bound.unwrap(),
        }
    }
}

/// Worker `number`, behind a socket.
pub async fn start(number: usize, host: &Arc<FakeHost>) -> RemoteWorker {
    RemoteWorker::start(host.clone(), hello(v1::Role::ExpertWorker, worker(number).as_str())).await
}

/// A dispatcher over workers behind sockets, connected.
pub async fn remote(
    hosts: &[Arc<FakeHost>],
    holders: &[Vec<u32>],
    deadline: Duration,
) -> (Dispatcher, Vec<RemoteWorker>) {
    let mut workers = Vec::new();
    for (number, host) in hosts.iter().enumerate() {
        workers.push(start(number, host).await);
    }
    let dispatcher = Dispatcher::new(config(deadline), None);
    dispatcher.set_view(placement(hosts.len(), holders), &members(workers.iter().enumerate()));
    until(|| dispatcher.edges().iter().all(|edge| edge.state() == v1::EdgeState::Live)).await;
    (dispatcher, workers)
}

pub fn members<'a>(workers: impl IntoIterator<Item = (usize, &'a RemoteWorker)>) -> BTreeMap<WorkerId, Holder> {
    workers.into_iter().map(|(number, remote)| (worker(number), member(remote.address))).collect()
}

/// One row for the experts first..first + TOP_K.
pub fn row_for(first: u16) -> (Vec<f32>, Vec<Route>) {
    let (x, _) = micro_batch(1, u64::from(first));
    let routes = (first..).take(TOP_K).map(|e| Route { expert: ExpertId(e), weight: 0.2 });
    (x, routes.collect())
}

pub fn send(dispatcher: &Dispatcher, x: &[f32], routes: &[Route]) -> Result<Pending, DispatchError> {
    dispatcher.dispatch(LAYER, 0, Rows::F32(x.to_vec()), TOP_K, routes)
}

/// The sum that a call comes to.
pub async fn combined(pending: Pending, rows: usize) -> Result<Vec<f32>, DispatchError> {
    let mut y = vec![f32::NAN; rows * HIDDEN];
    pending.combine(&mut y).await.map(|()| y)
}

pub async fn call(dispatcher: &Dispatcher, x: &[f32], routes: &[Route]) -> Result<Vec<f32>, DispatchError> {
    combined(send(dispatcher, x, routes)?, x.len() / HIDDEN).await
}

/// How the dispatcher sees the way to a worker.
pub fn edge(dispatcher: &Dispatcher, number: usize) -> v1::EdgeStatus {
    dispatcher.edges().into_iter().find(|edge| edge.worker == worker(number).as_str()).unwrap()
}

/// Waits for a condition, and fails the test if it never comes true.
pub async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(PATIENT, wait).await.expect("the condition never came true");
}
