//! The attention worker's side: sends a layer's rows to the holders of their experts, waits, adds up.
//!
//! Owns the edges to the expert workers and the clock of the tracker. Decides nothing about experts: the gate chose
//! them, the placement says who holds them, and of several holders the first that can be reached gets the rows.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use moesaic_proto::{Epoch, ExpertId, LayerId, Placement, WorkerId, v1};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::combine::CombineOps;
use crate::error::{Cause, DispatchError};
use crate::frame::{Activations, AnswerFrame, Header, RequestFrame, Rows};
use crate::grpc::{Edge, EdgeConfig, EdgeOwner};
use crate::local::{Hub, ReplySender};
use crate::plan::{self, Layout, Plan, Recipe};
use crate::shared::Shared;
use crate::tracker::{Action, CallId, Counts, Destination, EdgeId, Event, FrameKey, Tracker};

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
    /// How long a layer call may take.
    pub layer_deadline: Duration,
    /// Who this attention worker is, for the handshake with expert workers.
    pub hello: v1::Hello,
    pub ops: CombineOps,
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
    view: RwLock<Option<Arc<View>>>,
    core: Mutex<Core>,
    /// Wakes the deadline task when it is parked.
    wake: Arc<Notify>,
    stop: CancellationToken,
    /// Ends the background tasks with the last clone.
    _stop_on_drop: DropGuard,
}

/// What a call comes to: its frames' answers, in order.
type Answers = Result<Vec<Shared<f32>>, DispatchError>;

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

/// A placement and the ways to its workers.
struct View {
    placement: Arc<Placement>,
    /// Workers that may be used; those of this process need no edge.
    edges: HashMap<WorkerId, Option<Edge>>,
}

impl View {
    fn edge(&self, to: &Destination) -> Option<&Edge> {
        let edge = self.edges.get(&to.worker)?.as_ref()?;
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
            view: RwLock::new(None),
            core: Mutex::new(core),
            wake: Arc::new(Notify::new()),
            stop: stop.clone(),
            _stop_on_drop: stop.clone().drop_guard(),
        });
        inner.runtime.spawn(watch_deadlines(Arc::downgrade(&inner), inner.wake.clone(), stop));
        Self { inner }
    }

    /// `addresses`: the expert workers that may be used, those that have the placement's epoch loaded. Workers in the
    /// hub are reached directly; to the others edges are kept, made or given up, in the background.
    pub fn set_view(&self, placement: Arc<Placement>, addresses: &BTreeMap<WorkerId, String>) {
        let mut old = self.inner.view.write().unwrap_or_else(PoisonError::into_inner);
        let keep = |worker: &WorkerId, address: &str| {
            let edge = old.as_ref()?.edges.get(worker)?.as_ref()?;
            (edge.address() == address).then(|| edge.clone())
        };
        let mut edges = HashMap::new();
        for worker in placement.workers() {
            let Some(address) = addresses.get(worker) else { continue };
            let edge = match self.inner.hub.get(worker) {
                Some(_) => None,
                None => Some(keep(worker, address).unwrap_or_else(|| self.inner.connect(worker, address))),
            };
            edges.insert(worker.clone(), edge);
        }
        *old = Some(Arc::new(View { placement, edges }));
    }

    /// Whether every expert of every layer has a holder with a live edge.
    pub fn reachable(&self) -> bool {
        let Some(view) = self.inner.view() else { return false };
        let live = self.inner.live(&view);
        let experts = (0..view.placement.experts()).map(|e| ExpertId(e as u16));
        let held = |layer, expert| view.placement.holders(layer, expert).iter().any(|&w| live[w as usize]);
        view.placement.layers().all(|layer| experts.clone().all(|expert| held(layer, expert)))
    }

    /// Whether no rows leave this process: then there is no hop to hide behind another micro-batch.
    pub fn is_local(&self) -> bool {
        self.inner.view().is_none_or(|view| view.edges.values().all(Option::is_none))
    }

    /// Sends a layer's rows to their holders at once and returns. `routes` is [rows * top_k], each row's experts
    /// ascending. Fails without sending anything if an expert has no live holder.
    pub fn dispatch(
        &self,
        layer: LayerId,
        micro_batch: u8,
        rows: Rows,
        top_k: usize,
        routes: &[Route],
    ) -> Result<Pending, DispatchError> {
        let activations = Activations::from(rows);
        let view = self.inner.view().ok_or(DispatchError::NoPlacement { layer })?;
        let DispatchConfig { hidden, experts, groups, .. } = self.inner.config;
        check_input(&activations, hidden, experts, top_k, routes)?;
        let holders = self.inner.holders(&view, layer, experts, routes)?;
        let layout = Layout::new(hidden, activations.value_bytes(), experts.div_ceil(groups), top_k);
        let Plan { parts, recipe } = plan::split(&layout, routes, |expert| holders[usize::from(expert.0)]);

        let header = self.inner.header(view.placement.epoch(), layer, micro_batch);
        let frames = parts.into_iter().map(|part| {
            let to = self.inner.destination(&view, part.worker);
            (to, RequestFrame::new(header, activations.clone(), hidden, part.content))
        });
        let (call, answers) = self.inner.call(&view, layer, frames.collect());
        Ok(Pending { inner: self.inner.clone(), call, answers, recipe })
    }

    /// Answers that changed nothing, since the start.
    pub fn counts(&self) -> Counts {
        self.inner.core().tracker.counts()
    }

    /// Frames that wait for their answers.
    pub fn outstanding(&self) -> usize {
        self.inner.core().tracker.outstanding()
    }
}

/// A layer call on its way. Dropping it gives the call up.
pub struct Pending {
    inner: Arc<Inner>,
    call: CallId,
    answers: oneshot::Receiver<Answers>,
    recipe: Recipe,
}

impl Pending {
    /// Waits for all answers, at most until the layer's deadline, and adds them up into `y` [rows, hidden],
    /// overwriting it. The additions run on the caller's thread.
    pub async fn combine(mut self, y: &mut [f32]) -> Result<(), DispatchError> {
        let DispatchConfig { hidden, ops, .. } = self.inner.config;
        let expected = self.recipe.rows() * hidden;
        if y.len() != expected {
            let detail = format!("y has {} values; expected {expected}", y.len());
            return Err(DispatchError::Input { detail });
        }
        let answers = (&mut self.answers).await.unwrap_or(Err(DispatchError::Stopped))?;
        self.recipe.combine(&ops, &answers, hidden, y);
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.inner.core().waiting.remove(&self.call);
        self.inner.on(Event::Abandoned { call: self.call }, None);
    }
}

impl Inner {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn view(&self) -> Option<Arc<View>> {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
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
        let (hello, hidden) = (self.config.hello.clone(), self.config.hidden);
        let config = EdgeConfig { id, worker: worker.clone(), address: address.to_owned(), hello, hidden };
        Edge::connect(&self.runtime, config, self.this.clone(), self.stop.clone())
    }

    /// Which of the placement's workers can be reached now.
    fn live(&self, view: &View) -> Vec<bool> {
        let live = |worker| match view.edges.get(worker) {
            None => false,
            Some(edge) => edge.as_ref().is_some_and(Edge::is_live) || self.hub.get(worker).is_some(),
        };
        view.placement.workers().iter().map(live).collect()
    }

    /// For each expert that the routes name, the first of its holders that is live, as an index.
    fn holders(
        &self,
        view: &View,
        layer: LayerId,
        experts: usize,
        routes: &[Route],
    ) -> Result<Vec<u32>, DispatchError> {
        const UNKNOWN: u32 = u32::MAX;
        let live = self.live(view);
        let mut chosen = vec![UNKNOWN; experts];
        for route in routes {
            let holder = &mut chosen[usize::from(route.expert.0)];
            if *holder == UNKNOWN {
                let holders = view.placement.holders(layer, route.expert);
                let first = holders.iter().copied().find(|&w| live[w as usize]);
                *holder = first.ok_or_else(|| unreachable_expert(view, layer, route.expert))?;
            }
        }
        Ok(chosen)
    }

    /// The way to a worker of the placement: directly if it is in this process.
    fn destination(&self, view: &View, worker: u32) -> Destination {
        let worker = view.placement.workers()[worker as usize].clone();
        let edge = match self.hub.get(&worker) {
            Some(_) => None,
            None => view.edges.get(&worker).and_then(Option::as_ref).map(Edge::id),
        };
        Destination { worker, edge }
    }

    fn call(
        &self,
        view: &View,
        layer: LayerId,
        frames: Vec<(Destination, RequestFrame)>,
    ) -> (CallId, oneshot::Receiver<Answers>) {
        let (sender, answers) = oneshot::channel();
        let call = {
            let mut core = self.core();
            let call = CallId(core.next_call);
            core.next_call += 1;
            core.waiting.insert(call, sender);
            call
        };
        self.on(Event::Call { call, layer, frames }, Some(view));
        let mut core = self.core();
        // Workers of this process may have answered already.
        if core.parked && core.tracker.next_deadline().is_some() {
            core.parked = false;
            self.wake.notify_one();
        }
        drop(core);
        (call, answers)
    }

    /// Tells the tracker, and does what it says. `view` has the edges to send over: a call's own, which last until its
    /// frames are queued, whatever view comes meanwhile.
    fn on(&self, event: Event, view: Option<&View>) {
        let mut events = VecDeque::from([event]);
        let mut actions = Vec::new();
        while let Some(event) = events.pop_front() {
            self.core().tracker.on_event(self.started.elapsed(), event, &mut actions);
            for action in actions.drain(..) {
                match action {
                    Action::Send { to, frame } => events.extend(self.send(view, to, frame)),
                    Action::Done { call, answers } => self.finish(call, Ok(answers)),
                    Action::Failed { call, error } => self.finish(call, Err(error)),
                }
            }
        }
    }

    fn finish(&self, call: CallId, result: Answers) {
        let waiting = self.core().waiting.remove(&call);
        if let Some(waiting) = waiting {
            // Nobody listens if the call was given up a moment ago.
            let _ = waiting.send(result);
        }
    }

    /// Hands a frame over; an event if that failed.
    fn send(&self, view: Option<&View>, to: Destination, frame: RequestFrame) -> Option<Event> {
        let key = FrameKey::of(&frame.header);
        let sent = match view.and_then(|view| view.edge(&to)) {
            Some(edge) => edge.send(frame),
            None => self.submit(to.worker, frame),
        };
        sent.err().map(|cause| Event::NotSent { key, cause })
    }

    /// Hands a frame to a worker of this process.
    fn submit(&self, worker: WorkerId, frame: RequestFrame) -> Result<(), Cause> {
        let gone = || Cause::EdgeDown { reason: "it has left this process".into() };
        let host = self.hub.get(&worker).ok_or_else(gone)?;
        let (owner, asked) = (self.this.clone(), frame.header);
        let to = move |answer| {
            if let Some(owner) = owner.upgrade() {
                owner.answer(&worker, answer);
            }
        };
        host.answer(frame, ReplySender::new(asked, to));
        Ok(())
    }
}

impl EdgeOwner for Inner {
    fn answer(&self, worker: &WorkerId, answer: AnswerFrame) {
        self.on(Event::Answer { worker: worker.clone(), answer }, None);
    }

    fn edge_down(&self, edge: EdgeId, reason: String) {
        self.on(Event::EdgeDown { edge, reason }, None);
    }
}

/// Tells the tracker the time, when it is time. Parks while nothing is outstanding.
async fn watch_deadlines(inner: Weak<Inner>, wake: Arc<Notify>, stop: CancellationToken) {
    loop {
        let next = match inner.upgrade() {
            None => return,
            Some(inner) => {
                inner.on(Event::Tick, None);
                let mut core = inner.core();
                core.parked = core.tracker.next_deadline().is_none();
                core.tracker.next_deadline().map(|deadline| inner.started + deadline)
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

fn check_input(
    activations: &Activations,
    hidden: usize,
    experts: usize,
    top_k: usize,
    routes: &[Route],
) -> Result<(), DispatchError> {
    let rows = activations.len() / hidden;
    if top_k == 0 || !activations.len().is_multiple_of(hidden) || rows * top_k != routes.len() {
        let (values, routes) = (activations.len(), routes.len());
        let detail = format!("{values} values of rows of {hidden}, and {routes} routes of {top_k} a row");
        return Err(DispatchError::Input { detail });
    }
    for (row, routes) in routes.chunks_exact(top_k).enumerate() {
        let ascend = routes.windows(2).all(|pair| pair[0].expert < pair[1].expert);
        let valid = |route: &Route| usize::from(route.expert.0) < experts && route.weight.is_finite();
        if !ascend || !routes.iter().all(valid) {
            let detail = format!("row {row}: experts must ascend below {experts}, weights be finite: {routes:?}");
            return Err(DispatchError::Input { detail });
        }
    }
    Ok(())
}

fn unreachable_expert(view: &View, layer: LayerId, expert: ExpertId) -> DispatchError {
    let mut holders = String::new();
    for &index in view.placement.holders(layer, expert) {
        let worker = &view.placement.workers()[index as usize];
        let state = match view.edges.get(worker) {
            None => "not available".into(),
            Some(None) => "left this process".into(),
            Some(Some(edge)) => edge.describe(),
        };
        let separator = if holders.is_empty() { "" } else { "; " };
        // Writing to a String cannot fail.
        let _ = write!(holders, "{separator}{worker}: {state}");
    }
    DispatchError::Unreachable { layer, expert, epoch: view.placement.epoch(), holders }
}
