//! The attention worker's side: sends a layer's rows to the holders of their experts, waits, adds up.
//!
//! Owns the edges to the expert workers and the clock of the tracker. Decides nothing about experts: the gate chose
//! them, the placement says who holds them, and the tracker which of them are asked. A new placement comes into use when
//! every expert has a holder under it that can be reached; until then the one before it is used.

mod ahead;
mod pending;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

use moesaic_kernels::cuda::{GpuBytes, GpuError, Split};
use moesaic_node::Connector;
use moesaic_proto::{Epoch, ExpertId, LayerId, Placement, WorkerId, v1};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::combine::CombineOps;
use crate::error::{Cause, DispatchError};
use crate::frame::{AnswerFrame, Header, RequestFrame, Rows};
use crate::grpc::{Edge, EdgeConfig, EdgeOwner};
use crate::local::{ExpertHost, Hub, ReplySender};
use crate::nccl::Fabric;
use crate::plan::{self, Layout, Plan};
use crate::tracker::{
    Action, Answer, CallId, Counts, Destination, EdgeId, Event, Figures, FrameKey, Rank, Tracker, Ways,
};

pub use ahead::Ahead;
pub use pending::{Addends, Pending};

/// One chosen expert of a row and its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    pub expert: ExpertId,
    pub weight: f32,
}

#[derive(Clone)]
pub struct DispatchConfig {
    pub hidden: usize,
    /// Routed experts of a layer.
    pub experts: usize,
    /// Logical groups of rule 1(c).
    pub groups: usize,
    /// This attention worker's number in frame headers; equal to `hello.source`.
    pub source: u16,
    /// How long a layer call may take, all holders of its experts tried and waited for.
    pub layer_deadline: Duration,
    /// Who this attention worker is, for the handshake with expert workers.
    pub hello: v1::Hello,
    /// How expert workers are reached.
    pub connector: Connector,
    /// From GPU to GPU, beside that: `hello` names its version.
    pub fabric: Option<Arc<dyn Fabric>>,
    pub ops: CombineOps,
}

impl DispatchConfig {
    /// Experts of a logical group.
    fn group_size(&self) -> usize {
        self.experts.div_ceil(self.groups)
    }
}

/// What is asked of experts: a layer of a micro-batch.
#[derive(Clone, Debug)]
pub struct LayerCall {
    pub layer: LayerId,
    pub micro_batch: u8,
    /// Choices of a row.
    pub top_k: usize,
    /// The span that it is part of, if it is traced.
    pub traceparent: Option<Arc<str>>,
}

/// An expert worker as the registry knows it.
#[derive(Clone, Debug)]
pub struct Holder {
    /// "host:port"
    pub address: String,
    /// The newest placement whose experts it has in memory.
    pub epoch_loaded: Epoch,
}

/// Clones share everything. Must be made inside a tokio runtime, which carries its background tasks until the last
/// clone is dropped; `dispatch` and `combine` work on any thread and any executor.
#[derive(Clone)]
pub struct Dispatcher {
    inner: Arc<Inner>,
}

struct Inner {
    /// For the replies and edges, which must not keep it alive.
    this: Weak<Inner>,
    config: DispatchConfig,
    hub: Hub,
    runtime: Handle,
    started: Instant,
    /// A newer placement than the one in use, as long as it has no way to every expert. Locked, before the others,
    /// while the placement in use changes, so that the tracker hears of the changes in their order.
    next: Mutex<Option<Arc<Ways>>>,
    views: RwLock<Views>,
    core: Mutex<Core>,
    /// Wakes the deadline task when it is parked.
    wake: Arc<Notify>,
    stop: CancellationToken,
    /// Ends the background tasks with the last clone.
    _stop_on_drop: DropGuard,
}

/// What a call comes to: its frames' answers, in order.
type Answers = Result<Vec<Answer>, DispatchError>;

/// The tracker and who waits for its calls. One lock, held for some map operations and never across an `.await`: a
/// task of its own would cost two wake-ups for each layer of each token.
struct Core {
    tracker: Tracker,
    waiting: HashMap<CallId, oneshot::Sender<Answers>>,
    next_call: u64,
    next_edge: u64,
    /// The deadline task sleeps until it is woken.
    parked: bool,
}

/// A call, and who is asked in it.
struct Turn {
    call: CallId,
    ways: Arc<Ways>,
    /// How its workers stand.
    ranks: Vec<Rank>,
    /// By the expert's number.
    holders: Vec<u32>,
}

/// Who can be asked.
#[derive(Default)]
struct Views {
    /// Workers of the placement in use and of the next.
    workers: BTreeMap<WorkerId, Known>,
    /// The placement in use.
    current: Option<Arc<Ways>>,
}

struct Known {
    /// `None`: it is in this process.
    edge: Option<Edge>,
    loaded: Epoch,
}

impl Known {
    fn way(&self, worker: &WorkerId) -> Destination {
        Destination { worker: worker.clone(), edge: self.edge.as_ref().map(Edge::id) }
    }
}

impl Views {
    fn ways(&self, placement: Arc<Placement>) -> Arc<Ways> {
        let epoch = placement.epoch();
        Arc::new(Ways::new(placement, |worker| {
            let known = self.workers.get(worker).filter(|known| known.loaded >= epoch)?;
            Some(known.edge.as_ref().map(Edge::id))
        }))
    }

    fn edge(&self, to: &Destination) -> Option<&Edge> {
        let edge = self.workers.get(&to.worker)?.edge.as_ref()?;
        (to.edge == Some(edge.id())).then_some(edge)
    }
}

impl Dispatcher {
    /// Panics outside a tokio runtime.
    pub fn new(config: DispatchConfig, hub: Option<Hub>) -> Self {
        let stop = CancellationToken::new();
        let core = Core {
            tracker: Tracker::new(config.hidden, config.layer_deadline),
            waiting: HashMap::new(),
            next_call: 0,
            next_edge: 0,
            parked: false,
        };
        let inner = Arc::new_cyclic(|this: &Weak<Inner>| Inner {
            this: this.clone(),
            config,
            hub: hub.unwrap_or_default(),
            runtime: Handle::current(),
            started: Instant::now(),
            next: Mutex::default(),
            views: RwLock::default(),
            core: Mutex::new(core),
            wake: Arc::new(Notify::new()),
            stop: stop.clone(),
            _stop_on_drop: stop.clone().drop_guard(),
        });
        inner.runtime.spawn(watch_deadlines(Arc::downgrade(&inner), inner.wake.clone(), stop));
        Self { inner }
    }

    /// A placement and the expert workers that are registered. Those in the hub are reached directly; to the others
    /// edges are kept, made or given up, in the background. A worker that is not registered any more, but whose edge is
    /// live, stays in use: a silent registry takes nobody away.
    pub fn set_view(&self, placement: Arc<Placement>, members: &BTreeMap<WorkerId, Holder>) {
        let inner = &self.inner;
        let mut next = inner.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut views = inner.views.write().unwrap_or_else(PoisonError::into_inner);
        let older = views.current.as_ref().map(|ways| ways.placement().clone());
        let older = older.filter(|older| older.epoch() < placement.epoch());
        inner.set_workers(&mut views.workers, &[Some(&placement), older.as_ref()], members);

        let newest = views.ways(placement);
        let is_complete = newest.is_complete(&inner.ranks(&newest));
        let (current, later) = match older.filter(|_| !is_complete) {
            Some(older) => (views.ways(older), Some(newest)),
            None => (newest, None),
        };
        (views.current, *next) = (Some(current.clone()), later);
        drop(views);
        // An edge that comes up meanwhile waits for `next`, and looks again.
        inner.on(Event::Ways(current));
    }

    /// Whether every expert of every layer has a holder with a live edge.
    pub fn reachable(&self) -> bool {
        let ways = self.inner.ways();
        ways.is_some_and(|ways| ways.is_complete(&self.inner.ranks(&ways)))
    }

    /// The placement that rows are sent under.
    pub fn epoch(&self) -> Option<Epoch> {
        self.inner.ways().map(|ways| ways.epoch())
    }

    /// Whether no rows leave this process: then there is no hop to hide behind another micro-batch.
    pub fn is_local(&self) -> bool {
        self.inner.ways().is_none_or(|ways| ways.destinations().all(|to| to.edge.is_none()))
    }

    /// Whether rows leave this process over lanes, to some workers at least: they may stay on the GPU then.
    pub fn has_lanes(&self) -> bool {
        self.inner.views().workers.values().any(|known| known.edge.as_ref().is_some_and(Edge::has_lane))
    }

    /// The ways to all workers of the placement in use, by id.
    pub fn edges(&self) -> Vec<v1::EdgeStatus> {
        let Some(ways) = self.inner.ways() else { return Vec::new() };
        let ranks = self.inner.ranks(&ways);
        let views = self.inner.views();
        let status = |(worker, rank): (&WorkerId, &Rank)| {
            let known = views.workers.get(worker);
            let edge = known.and_then(|known| known.edge.as_ref());
            let (sent_bytes, received_bytes) = edge.map_or((0, 0), Edge::traffic);
            let Figures { terms, answer, detours, recent } = self.inner.core().tracker.health().figures(worker);
            let quantile = |share: f64| recent.get((recent.len() as f64 * share) as usize).copied().unwrap_or_default();
            let state = match rank {
                Rank::Good => v1::EdgeState::Live,
                Rank::Slow => v1::EdgeState::Slow,
                Rank::Silent => v1::EdgeState::Silent,
                Rank::Avoided | Rank::Down => v1::EdgeState::Down,
            };
            v1::EdgeStatus {
                worker: worker.as_str().to_owned(),
                state: state.into(),
                detail: self.inner.describe(ways.epoch(), worker, known),
                transport: known.map_or("grpc", |known| known.edge.as_ref().map_or("local", Edge::transport)).into(),
                terms,
                answer_us: answer.as_micros() as u32,
                hedged: detours.hedged,
                resent: detours.resent,
                steered: detours.steered,
                sent_bytes,
                received_bytes,
                lane_failures: edge.map_or(0, Edge::lane_failures),
                answer_p50_us: quantile(0.5).as_micros() as u32,
                answer_p99_us: quantile(0.99).as_micros() as u32,
            }
        };
        let mut edges: Vec<_> = ways.placement().workers().iter().zip(&ranks).map(status).collect();
        edges.sort_unstable_by(|a, b| a.worker.cmp(&b.worker));
        edges
    }

    /// Sends a layer's rows to their holders at once and returns. `routes` is [rows * top_k], each row's experts
    /// ascending. Rows whose experts have no holder at present wait for one.
    pub fn dispatch(
        &self,
        layer: LayerId,
        micro_batch: u8,
        rows: Rows<'_>,
        top_k: usize,
        routes: &[Route],
    ) -> Result<Pending, DispatchError> {
        let call = LayerCall { layer, micro_batch, top_k, traceparent: None };
        self.dispatch_layer(&call, rows, routes, None)
    }

    /// Begins a call, and sends its rows off before it is known what they chose, to workers that are reached by lanes: `split` has the
    /// GPU split them. [`Dispatcher::dispatch_layer`] follows.
    pub fn send_ahead<E>(
        &self,
        call: &LayerCall,
        rows: usize,
        split: impl FnOnce(&Split<'_>) -> Result<Option<GpuBytes>, E>,
    ) -> Result<Option<Ahead>, E> {
        Ahead::send(&self.inner, call, rows, split)
    }

    /// The same as [`Dispatcher::dispatch`], of rows that may have left ahead.
    pub fn dispatch_layer(
        &self,
        &LayerCall { layer, micro_batch, top_k, ref traceparent }: &LayerCall,
        rows: Rows<'_>,
        routes: &[Route],
        mut ahead: Option<Ahead>,
    ) -> Result<Pending, DispatchError> {
        let DispatchConfig { hidden, experts, .. } = self.inner.config;
        plan::check(&rows, hidden, experts, top_k, routes)?;
        let chosen = || routes.iter().map(|route| route.expert);
        let mut layout = Layout::new(hidden, rows.value_bytes(), self.inner.config.group_size(), top_k);
        if let Some(room) = ahead.as_ref().and_then(Ahead::room) {
            // What has left are the first rows of each worker.
            layout.rows_max = room;
        }
        let begun = ahead.as_mut().and_then(|ahead| ahead.turn.take());
        let turn = begun.or_else(|| self.inner.begin(layer, chosen()));
        let Turn { call, ways, ranks, holders } = turn.ok_or(DispatchError::NoPlacement { layer })?;
        if ranks.iter().any(|rank| *rank > Rank::Good) {
            self.inner.core().tracker.count_steered(&ways, layer, chosen(), &holders, call.0);
        }
        let Plan { parts, recipe } = plan::split(&layout, routes, |expert| holders[usize::from(expert.0)]);
        let header = self.inner.header(ways.epoch(), layer, micro_batch);
        let of_gpu = |error: GpuError| DispatchError::Gpu { layer, error: error.to_string() };
        let frames = ahead::frames(parts, rows, header, hidden, ahead.as_mut()).map_err(of_gpu)?;
        let to = |(worker, frame): (u32, RequestFrame)| {
            (ways.destination(worker).cloned(), frame.within(traceparent.clone()))
        };
        let frames = frames.into_iter().map(to).collect();
        let answers = self.inner.call(call, Event::Call { call, layer, layout, frames });
        Ok(Pending::new(self.inner.clone(), call, answers, recipe))
    }

    /// What became of frames, since the start.
    pub fn counts(&self) -> Counts {
        self.inner.core().tracker.counts()
    }

    /// Frames that wait for their answers.
    pub fn outstanding(&self) -> usize {
        self.inner.core().tracker.outstanding()
    }
}

impl Inner {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn views(&self) -> RwLockReadGuard<'_, Views> {
        self.views.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The placement in use.
    fn ways(&self) -> Option<Arc<Ways>> {
        self.views().current.clone()
    }

    fn ranks(&self, ways: &Ways) -> Vec<Rank> {
        self.core().tracker.ranks(self.started.elapsed(), ways)
    }

    /// Makes `known` the workers of these placements that are registered, or still there.
    fn set_workers(
        &self,
        known: &mut BTreeMap<WorkerId, Known>,
        placements: &[Option<&Arc<Placement>>],
        members: &BTreeMap<WorkerId, Holder>,
    ) {
        let is_of_use = |worker: &WorkerId| placements.iter().flatten().any(|p| p.workers().contains(worker));
        for (worker, Holder { address, epoch_loaded }) in members.iter().filter(|(worker, _)| is_of_use(worker)) {
            let is_here = self.hub.get(worker).is_some();
            let edge = match known.remove(worker) {
                _ if is_here => None,
                Some(Known { edge: Some(edge), .. }) if edge.address() == address => Some(edge),
                _ => Some(self.connect(worker, address)),
            };
            known.insert(worker.clone(), Known { edge, loaded: *epoch_loaded });
        }
        known.retain(|worker, known| {
            let is_there = known.edge.as_ref().map_or_else(|| self.hub.get(worker).is_some(), Edge::is_live);
            let is_kept = is_of_use(worker) && (members.contains_key(worker) || is_there);
            let way = known.way(worker);
            match is_kept {
                true => self.core().tracker.set_way(&way),
                false => self.core().tracker.forget(&way),
            }
            is_kept
        });
    }

    /// Takes the next placement into use if every expert can be reached under it.
    fn advance(&self, next: &mut Option<Arc<Ways>>) {
        let Some(ways) = next.take_if(|next| next.is_complete(&self.ranks(next))) else { return };
        tracing::info!(epoch = %ways.epoch(), "a placement is in use");
        self.views.write().unwrap_or_else(PoisonError::into_inner).current = Some(ways.clone());
        self.on(Event::Ways(ways));
    }

    fn header(&self, epoch: Epoch, layer: LayerId, micro_batch: u8) -> Header {
        Header { epoch, layer, micro_batch, flags: 0, source: self.config.source, slot: 0, sequence: 0 }
    }

    fn connect(&self, worker: &WorkerId, address: &str) -> Edge {
        let id = {
            let mut core = self.core();
            core.next_edge += 1;
            EdgeId(core.next_edge)
        };
        let DispatchConfig { hello, hidden, connector, fabric, .. } = self.config.clone();
        let (worker, address) = (worker.clone(), address.to_owned());
        let config = EdgeConfig { id, worker: worker.clone(), address, hello, hidden, connector, fabric };
        // Before anything can be heard over it.
        self.core().tracker.set_way(&Destination { worker, edge: Some(id) });
        Edge::connect(&self.runtime, config, self.this.clone(), self.stop.clone())
    }

    /// A new call of these experts; none without a placement.
    fn begin(&self, layer: LayerId, experts: impl Iterator<Item = ExpertId>) -> Option<Turn> {
        let ways = self.ways()?;
        let (call, ranks) = {
            let mut core = self.core();
            core.next_call += 1;
            (CallId(core.next_call), core.tracker.ranks(self.started.elapsed(), &ways))
        };
        let holders = ways.holders(&ranks, layer, experts, call.0, Rank::Silent);
        Some(Turn { call, ways, ranks, holders })
    }

    fn call(&self, call: CallId, event: Event) -> oneshot::Receiver<Answers> {
        let (sender, answers) = oneshot::channel();
        self.core().waiting.insert(call, sender);
        self.handle(event, |host, frame, reply| host.answer(frame, reply));
        let mut core = self.core();
        // Workers of this process may have answered already.
        if core.parked && core.tracker.next_tick(Duration::ZERO).is_some() {
            core.parked = false;
            self.wake.notify_one();
        }
        drop(core);
        answers
    }

    /// Tells the tracker, and does what it says.
    fn on(&self, event: Event) {
        self.handle(event, |host, frame, reply| host.submit(frame, reply));
    }

    /// The same; `ask` is how workers of this process are asked. No lock is held meanwhile, except `next`.
    fn handle(&self, event: Event, ask: AskHost) {
        let mut events = VecDeque::from([event]);
        let mut actions = Vec::new();
        while let Some(event) = events.pop_front() {
            self.core().tracker.on_event(self.started.elapsed(), event, &mut actions);
            for action in actions.drain(..) {
                match action {
                    Action::Send { to, frame } => events.extend(self.send(to, frame, ask)),
                    Action::Done { call, answers } => self.finish(call, Ok(answers)),
                    Action::Failed { call, error } => self.finish(call, Err(self.explained(error))),
                }
            }
        }
    }

    /// Says what became of the holders of an expert that could not be reached.
    fn explained(&self, error: DispatchError) -> DispatchError {
        let DispatchError::Unreachable { layer, experts, after, .. } = error else { return error };
        let mut holders = Vec::new();
        if let (Some(ways), Some(expert)) = (self.ways(), experts.as_slice().first()) {
            let views = self.views();
            for &index in ways.placement().holders(layer, *expert) {
                let worker = &ways.placement().workers()[index as usize];
                let state = self.describe(ways.epoch(), worker, views.workers.get(worker));
                holders.push(format!("{worker}: {state}"));
            }
        }
        DispatchError::Unreachable { layer, experts, after, holders: holders.join("; ") }
    }

    fn finish(&self, call: CallId, result: Answers) {
        let waiting = self.core().waiting.remove(&call);
        if let Some(waiting) = waiting {
            // Nobody listens if the call was given up a moment ago.
            let _ = waiting.send(result);
        }
    }

    /// What is to be said of a worker under the placement of this epoch, for people.
    fn describe(&self, epoch: Epoch, worker: &WorkerId, known: Option<&Known>) -> String {
        match known {
            None => "not available".into(),
            Some(Known { loaded, .. }) if *loaded < epoch => format!("has not loaded epoch {epoch}, but {loaded}"),
            Some(Known { edge: Some(edge), .. }) => edge.describe(),
            Some(_) if self.hub.get(worker).is_some() => "in this process".into(),
            Some(_) => GONE.into(),
        }
    }

    /// Hands a frame over; an event if that failed, or if it has been answered.
    fn send(&self, to: Destination, frame: RequestFrame, ask: AskHost) -> Option<Event> {
        let key = FrameKey::of(&frame.header);
        let given_up = || Cause::EdgeDown { reason: "its edge was given up".into() };
        let sent = match to.edge {
            Some(_) => self.views().edge(&to).ok_or_else(given_up).and_then(|edge| edge.send(frame)),
            None => self.hand_over(to.worker.clone(), frame, ask).map(|()| None),
        };
        match sent {
            Ok(answer) => answer.map(|answer| Event::Answer { worker: to.worker, answer }),
            Err(cause) => Some(Event::NotSent { key, cause }),
        }
    }

    /// Hands a frame to a worker of this process.
    fn hand_over(&self, worker: WorkerId, frame: RequestFrame, ask: AskHost) -> Result<(), Cause> {
        let Some(host) = self.hub.get(&worker) else {
            // It is not asked again until a view says so.
            self.core().tracker.forget(&Destination { worker, edge: None });
            return Err(Cause::EdgeDown { reason: GONE.into() });
        };
        let (owner, asked) = (self.this.clone(), frame.header);
        let to = move |answer| {
            if let Some(owner) = owner.upgrade() {
                owner.answer(&worker, answer);
            }
        };
        ask(&*host, frame, ReplySender::new(asked, to));
        Ok(())
    }
}

impl EdgeOwner for Inner {
    fn answer(&self, worker: &WorkerId, answer: AnswerFrame) {
        self.on(Event::Answer { worker: worker.clone(), answer });
    }

    fn edge_up(&self, edge: EdgeId) {
        self.on(Event::Heard { edge });
        self.advance(&mut self.next.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn heard(&self, edge: EdgeId) {
        self.on(Event::Heard { edge });
    }

    fn awaits(&self, header: &Header) -> bool {
        self.core().tracker.awaits(&FrameKey::of(header))
    }

    fn edge_down(&self, edge: EdgeId, reason: String) {
        self.on(Event::EdgeDown { edge, reason });
    }
}

/// Tells the tracker the time, when it is time. Parks while nothing is outstanding.
async fn watch_deadlines(inner: Weak<Inner>, wake: Arc<Notify>, stop: CancellationToken) {
    loop {
        let next = match inner.upgrade() {
            None => return,
            Some(inner) => {
                inner.on(Event::Tick);
                let mut core = inner.core();
                let next = core.tracker.next_tick(inner.started.elapsed());
                core.parked = next.is_none();
                next.map(|next| inner.started + next)
            }
        };
        let wait = async {
            match next {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => wake.notified().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = wait => {}
        }
    }
}

const GONE: &str = "it has left this process";

/// How a worker of this process is asked: a caller of `dispatch` may compute the answer itself, a background task has
/// other things to do.
type AskHost = fn(&dyn ExpertHost, RequestFrame, ReplySender);
