//! The dispatcher of an attention worker: `plan`, `Tracker` and `Ways` of the product, with edges over the simulated
//! network and the rules of `dispatcher.rs` for the placement in use.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use moesaic_dispatch::frame::Header;
use moesaic_dispatch::nccl::core::{Carrier, Claim, Kind};
use moesaic_dispatch::plan::{self, Layout, Plan, Recipe};
use moesaic_dispatch::tracker::{Action, Answer, CallId, Destination, EdgeId, Event, FrameKey, Rank, Tracker, Ways};
use moesaic_dispatch::{Activations, AnswerFrame, Cause, DispatchError, RequestFrame};
use moesaic_node::View;
use moesaic_proto::v1::{EdgeState, EdgeStatus, Role};
use moesaic_proto::{Epoch, LayerId, Placement, WorkerId};

use super::lane::{Lane, Load};
use super::messages::Message;
use super::model::{EXPERTS, GROUPS, HIDDEN, OPS, TOP_K, gate};
use super::net::{Context, StreamId};
use super::node_of;

const PING_INTERVAL: Duration = Duration::from_millis(100);
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Between two lanes of an edge.
const LANE_BACKOFF: Duration = Duration::from_millis(500);
pub const LAYER_DEADLINE: Duration = Duration::from_secs(30);

/// See the module.
pub struct Dispatch {
    pub tracker: Tracker,
    workers: BTreeMap<WorkerId, Known>,
    current: Option<Arc<Ways>>,
    /// A newer placement, as long as it has no way to every expert.
    next: Option<Arc<Ways>>,
    recipes: BTreeMap<CallId, Recipe>,
    next_call: u64,
    next_edge: u64,
    is_ticking: bool,
    layout: Layout,
    /// Drawn by the first edge that is up.
    uses_lanes: Option<bool>,
}

struct Known {
    edge: Edge,
    loaded: Epoch,
}

struct Edge {
    id: EdgeId,
    address: String,
    stream: Option<StreamId>,
    is_live: bool,
    backoff: Duration,
    lane: Option<Lane>,
    carrier: Carrier<RequestFrame>,
    /// Frames that left over a lane before it was known what they ask, until it is.
    ahead: Vec<RequestFrame>,
}

impl Edge {
    /// Frames go over it once a slot has come back.
    fn offer_lane(&mut self, context: &mut Context<'_>) {
        let Some(beside) = self.stream.filter(|_| self.is_live && self.lane.is_none()) else { return };
        let generation = self.carrier.offer();
        let (node, incarnation) = node_of(&self.address);
        let stream = context.open_to(node, incarnation, Message::LaneHello { generation, beside });
        let mut lane = Lane::new(context, generation, stream, beside);
        lane.send(context, Load::Nothing);
        self.lane = Some(lane);
        // Some are aborted for no reason that anybody else knows.
        let lasts = context.rng.u64(100..20_000);
        context.wake(Duration::from_millis(lasts), "lane abort", stream.0);
    }

    /// The lane is of no use any more: what it carried goes over the edge's stream.
    fn fail_lane(&mut self, context: &mut Context<'_>) {
        let Some(lane) = self.lane.take() else { return };
        context.close(lane.stream);
        let left = self.carrier.fail(lane.generation).unwrap_or_default();
        context.send(lane.beside, Message::LaneFailed { generation: lane.generation });
        left.into_iter().for_each(|frame| context.send(lane.beside, Message::Frame(frame)));
        context.wake(LANE_BACKOFF, "lane", self.id.0);
    }

    /// Sends a frame by the lane or the stream.
    fn send(&mut self, context: &mut Context<'_>, stream: StreamId, frame: RequestFrame) {
        match self.lane.as_mut().filter(|_| self.carrier.has_room()) {
            Some(lane) => {
                if context.rng.bool() {
                    self.carrier.carry_ahead(&frame.header);
                    self.ahead.push(frame.clone());
                    // The answer may be faster, or the lane fail before.
                    let known = context.rng.u64(10..3000);
                    context.wake(Duration::from_micros(known), "lane claim", self.id.0);
                } else {
                    self.carrier.carry(&frame.header, frame.clone());
                }
                lane.send(context, Load::Frame(frame));
            }
            None => context.send(stream, Message::Frame(frame)),
        }
    }

    /// It is known what frames ask that have left ahead: answers that came before. What has not left after all goes by the stream.
    fn claim(&mut self, context: &mut Context<'_>) -> Vec<AnswerFrame> {
        let mut answers = Vec::new();
        for frame in std::mem::take(&mut self.ahead) {
            match (self.carrier.claim(&frame.header, || frame.clone()), self.stream) {
                (Claim::Answered(answer), _) => answers.push(answer),
                (Claim::None, Some(stream)) => context.send(stream, Message::Frame(frame)),
                (Claim::Carried | Claim::None, _) => {}
            }
        }
        answers
    }

    /// What its lane has received.
    fn answers(&mut self, context: &mut Context<'_>) -> Vec<AnswerFrame> {
        let mut answers = Vec::new();
        while let Some(lane) = &mut self.lane {
            match lane.receive() {
                Ok(Some((Kind::Warm, _))) => self.carrier.up(lane.generation),
                Ok(Some((_, Load::Answer(answer)))) => {
                    answers.extend(self.carrier.answered(answer));
                }
                Ok(None) => break,
                other => context.violated(format!("a lane brings {other:?}")),
            }
        }
        answers
    }
}

/// A call that is over: its rows' sums, or why there are none.
pub type Landed = (CallId, Result<Vec<f32>, DispatchError>);

impl Default for Dispatch {
    fn default() -> Self {
        let group_size = EXPERTS.div_ceil(GROUPS);
        Self {
            tracker: Tracker::new(HIDDEN, LAYER_DEADLINE),
            workers: BTreeMap::new(),
            current: None,
            next: None,
            recipes: BTreeMap::new(),
            next_call: 0,
            next_edge: 0,
            is_ticking: false,
            layout: Layout::new(HIDDEN, size_of::<f32>(), group_size, TOP_K),
            uses_lanes: None,
        }
    }
}

impl Dispatch {
    pub fn epoch(&self) -> Option<Epoch> {
        self.current.as_ref().map(|ways| ways.epoch())
    }

    pub fn is_reachable(&self, now: Duration) -> bool {
        self.current.as_ref().is_some_and(|ways| ways.is_complete(&self.tracker.ranks(now, ways)))
    }

    pub fn edges(&self, now: Duration) -> Vec<EdgeStatus> {
        let Some(ways) = &self.current else { return Vec::new() };
        let ranks = self.tracker.ranks(now, ways);
        let status = |(worker, rank): (&WorkerId, &Rank)| {
            let state = match rank {
                Rank::Good => EdgeState::Live,
                Rank::Slow => EdgeState::Slow,
                Rank::Silent => EdgeState::Silent,
                Rank::Avoided | Rank::Down => EdgeState::Down,
            };
            EdgeStatus { worker: worker.as_str().to_owned(), state: state.into(), ..Default::default() }
        };
        ways.placement().workers().iter().zip(&ranks).map(status).collect()
    }

    /// A placement and the expert workers that are registered.
    pub fn set_view(&mut self, context: &mut Context<'_>, view: &View) -> Vec<Landed> {
        let Some(placement) = view.placement.clone() else { return Vec::new() };
        let older = self.current.as_ref().map(|ways| ways.placement().clone());
        let older = older.filter(|older| older.epoch() < placement.epoch());
        self.set_workers(context, &[Some(&placement), older.as_ref()], view);
        let newest = self.ways(placement);
        let is_complete = newest.is_complete(&self.tracker.ranks(context.now, &newest));
        let (current, later) = match older.filter(|_| !is_complete) {
            Some(older) => (self.ways(older), Some(newest)),
            None => (newest, None),
        };
        if self.epoch().is_some_and(|before| before > current.epoch()) {
            context.violated(format!("the placement in use goes back from {:?} to {}", self.epoch(), current.epoch()));
        }
        (self.current, self.next) = (Some(current.clone()), later);
        self.on(context, Event::Ways(current))
    }

    fn ways(&self, placement: Arc<Placement>) -> Arc<Ways> {
        let epoch = placement.epoch();
        let edge = |worker: &WorkerId| {
            let known = self.workers.get(worker).filter(|known| known.loaded >= epoch)?;
            Some(Some(known.edge.id))
        };
        Arc::new(Ways::new(placement, edge))
    }

    fn set_workers(&mut self, context: &mut Context<'_>, placements: &[Option<&Arc<Placement>>], view: &View) {
        let is_of_use = |worker: &WorkerId| placements.iter().flatten().any(|p| p.workers().contains(worker));
        for member in view.of_role(Role::ExpertWorker).filter(|member| is_of_use(&member.id)) {
            let kept = self.workers.remove(&member.id).filter(|known| known.edge.address == member.address);
            let edge = match kept {
                Some(known) => known.edge,
                None => self.connect(context, &member.id, &member.address),
            };
            self.workers.insert(member.id.clone(), Known { edge, loaded: member.epoch_loaded });
        }
        let tracker = &mut self.tracker;
        self.workers.retain(|worker, known| {
            let is_registered = view.members.contains_key(&(Role::ExpertWorker, worker.clone()));
            let is_kept = is_of_use(worker) && (is_registered || known.edge.is_live);
            let way = Destination { worker: worker.clone(), edge: Some(known.edge.id) };
            if is_kept {
                tracker.set_way(&way)
            } else {
                tracker.forget(&way)
            }
            if !is_kept {
                known.edge.stream.into_iter().for_each(|stream| context.close(stream));
                known.edge.lane.iter().for_each(|lane| context.close(lane.stream));
            }
            is_kept
        });
    }

    fn connect(&mut self, context: &mut Context<'_>, worker: &WorkerId, to: &str) -> Edge {
        self.next_edge += 1;
        let id = EdgeId(self.next_edge);
        self.tracker.set_way(&Destination { worker: worker.clone(), edge: Some(id) });
        let stream = Some(open(context, to));
        let (address, lane, carrier) = (to.to_owned(), None, Carrier::default());
        Edge { id, address, stream, is_live: false, backoff: BACKOFF_MIN, lane, carrier, ahead: Vec::new() }
    }

    fn edge(&mut self, which: impl Fn(&Edge) -> bool) -> Option<(&WorkerId, &mut Edge)> {
        self.workers.iter_mut().map(|(id, known)| (id, &mut known.edge)).find(|(_, edge)| which(edge))
    }

    pub fn on_message(&mut self, context: &mut Context<'_>, stream: StreamId, message: Message) -> Vec<Landed> {
        let is_of = |edge: &Edge| edge.stream == Some(stream) || edge.lane.as_ref().is_some_and(|l| l.stream == stream);
        let uses_lanes = *self.uses_lanes.get_or_insert_with(|| context.rng.bool());
        let Some((worker, edge)) = self.edge(is_of) else { return Vec::new() };
        let (worker, id) = (worker.clone(), edge.id);
        match message {
            Message::Slot(slot) => {
                edge.lane.iter_mut().for_each(|lane| lane.arrive((*slot).clone()));
                self.land_lane(context, id, Edge::answers)
            }
            Message::LaneWake { generation, sequence } => {
                let lane = edge.lane.iter_mut().filter(|lane| lane.generation == generation);
                lane.for_each(|lane| lane.wake(sequence));
                self.land_lane(context, id, Edge::answers)
            }
            Message::LaneFailed { generation } => {
                if edge.lane.as_ref().is_some_and(|lane| lane.generation == generation) {
                    edge.fail_lane(context);
                }
                Vec::new()
            }
            Message::Hello => {
                (edge.is_live, edge.backoff) = (true, BACKOFF_MIN);
                if uses_lanes {
                    edge.offer_lane(context);
                }
                context.wake(PING_INTERVAL, "ping", stream.0);
                let mut landed = self.on(context, Event::Heard { edge: id });
                let is_complete = |next: &Arc<Ways>| next.is_complete(&self.tracker.ranks(context.now, next));
                if self.next.as_ref().is_some_and(is_complete)
                    && let Some(ways) = self.next.take()
                {
                    self.current = Some(ways.clone());
                    landed.extend(self.on(context, Event::Ways(ways)));
                }
                landed
            }
            Message::Ping => self.on(context, Event::Heard { edge: id }),
            Message::Answer(answer) => self.on(context, Event::Answer { worker, answer: through_the_wire(answer) }),
            other => {
                context.violated(format!("an edge was told {other:?}"));
                Vec::new()
            }
        }
    }

    /// Hands on what an edge's lane has received, as far as it is known what for.
    fn land_lane(
        &mut self,
        context: &mut Context<'_>,
        id: EdgeId,
        take: impl FnOnce(&mut Edge, &mut Context<'_>) -> Vec<AnswerFrame>,
    ) -> Vec<Landed> {
        let Some((worker, edge)) = self.edge(|edge| edge.id == id) else { return Vec::new() };
        let (worker, answers) = (worker.clone(), take(edge, context));
        let event = |answer| Event::Answer { worker: worker.clone(), answer: through_the_wire(answer) };
        let mut landed = Vec::new();
        for event in answers.into_iter().map(event) {
            landed.extend(self.on(context, event));
        }
        landed
    }

    /// `None`: the stream is no edge's.
    pub fn on_broken(&mut self, context: &mut Context<'_>, stream: StreamId) -> Option<Vec<Landed>> {
        if let Some((_, edge)) = self.edge(|edge| edge.lane.as_ref().is_some_and(|lane| lane.stream == stream)) {
            edge.fail_lane(context);
            return Some(Vec::new());
        }
        let (_, edge) = self.edge(|edge| edge.stream == Some(stream))?;
        (edge.stream, edge.is_live) = (None, false);
        // What it carried is the tracker's to ask again.
        edge.ahead.clear();
        if let Some(lane) = edge.lane.take() {
            context.close(lane.stream);
            edge.carrier.fail(lane.generation);
        }
        let (id, backoff) = (edge.id, edge.backoff);
        edge.backoff = (backoff * 2).min(BACKOFF_MAX);
        context.wake(backoff, "reconnect", id.0);
        Some(self.on(context, Event::EdgeDown { edge: id, reason: "it broke".into() }))
    }

    /// `None`: the task is none of its own.
    pub fn on_timer(&mut self, context: &mut Context<'_>, task: &str, number: u64) -> Option<Vec<Landed>> {
        match task {
            "ping" => {
                if self.edge(|edge| edge.stream == Some(StreamId(number))).is_some() {
                    context.send(StreamId(number), Message::Ping);
                    context.wake(PING_INTERVAL, "ping", number);
                }
                Some(Vec::new())
            }
            "reconnect" => {
                if let Some((_, edge)) = self.edge(|edge| edge.id == EdgeId(number) && edge.stream.is_none()) {
                    edge.stream = Some(open(context, &edge.address));
                }
                Some(Vec::new())
            }
            "lane claim" => Some(self.land_lane(context, EdgeId(number), Edge::claim)),
            "lane" => {
                self.edge(|edge| edge.id == EdgeId(number)).into_iter().for_each(|(_, edge)| edge.offer_lane(context));
                Some(Vec::new())
            }
            "lane idle" | "lane abort" => {
                let has_it = |edge: &Edge| edge.lane.as_ref().is_some_and(|lane| lane.stream == StreamId(number));
                if let Some((_, edge)) = self.edge(has_it) {
                    match task {
                        "lane abort" => edge.fail_lane(context),
                        _ => edge.lane.iter_mut().for_each(|lane| lane.look(context)),
                    }
                }
                Some(Vec::new())
            }
            "tick" => {
                self.is_ticking = false;
                Some(self.on(context, Event::Tick))
            }
            _ => None,
        }
    }

    /// Sends a layer's rows; the number of the call.
    pub fn dispatch(
        &mut self,
        context: &mut Context<'_>,
        layer: LayerId,
        micro_batch: u8,
        rows: &[f32],
    ) -> (Option<CallId>, Vec<Landed>) {
        let Some(ways) = self.current.clone() else { return (None, Vec::new()) };
        self.next_call += 1;
        let call = CallId(self.next_call);
        let routes: Vec<_> = rows.chunks_exact(HIDDEN).flat_map(|row| gate(layer, row)).collect();
        let ranks = self.tracker.ranks(context.now, &ways);
        let holders = ways.holders(&ranks, layer, routes.iter().map(|r| r.expert), call.0, Rank::Silent);
        let Plan { parts, recipe } = plan::split(&self.layout, &routes, |expert| holders[usize::from(expert.0)]);
        let epoch = ways.epoch();
        let source = context.incarnation as u16;
        let header = Header { epoch, layer, micro_batch, flags: 0, source, slot: 0, sequence: 0 };
        let activations = Activations::from(rows.to_vec());
        let frames = parts.into_iter().map(|part| {
            let frame = RequestFrame::new(header, activations.clone(), HIDDEN, part.content);
            (ways.destination(part.worker).cloned(), frame)
        });
        self.recipes.insert(call, recipe);
        let event = Event::Call { call, layer, layout: self.layout, frames: frames.collect() };
        (Some(call), self.on(context, event))
    }

    fn on(&mut self, context: &mut Context<'_>, event: Event) -> Vec<Landed> {
        let (mut events, mut actions, mut landed) = (vec![event], Vec::new(), Vec::new());
        while let Some(event) = events.pop() {
            self.tracker.on_event(context.now, event, &mut actions);
            for action in actions.drain(..) {
                match action {
                    Action::Send { to, frame } => {
                        let key = FrameKey::of(&frame.header);
                        let edge = self.workers.get_mut(&to.worker).map(|known| &mut known.edge);
                        let live = edge.filter(|edge| to.edge == Some(edge.id) && edge.is_live);
                        match live.and_then(|edge| Some((edge.stream?, edge))) {
                            Some((stream, edge)) => edge.send(context, stream, frame),
                            None => {
                                let cause = Cause::EdgeDown { reason: "it is down".into() };
                                events.push(Event::NotSent { key, cause });
                            }
                        }
                    }
                    Action::Done { call, answers } => {
                        landed.extend(self.recipes.remove(&call).map(|recipe| (call, Ok(combine(&recipe, answers)))));
                    }
                    Action::Failed { call, error } => {
                        self.recipes.remove(&call);
                        landed.push((call, Err(error)));
                    }
                }
            }
        }
        if !self.is_ticking
            && let Some(next) = self.tracker.next_tick(context.now)
        {
            self.is_ticking = true;
            context.wake(next.saturating_sub(context.now), "tick", 0);
        }
        landed
    }
}

fn open(context: &mut Context<'_>, to: &str) -> StreamId {
    let (node, incarnation) = node_of(to);
    context.open_to(node, incarnation, Message::Hello)
}

fn combine(recipe: &Recipe, answers: Vec<Answer>) -> Vec<f32> {
    let answers: Vec<_> = answers.into_iter().map(|answer| answer.into_values(&OPS, HIDDEN).brought()).collect();
    let mut y = vec![0.0; recipe.rows() * HIDDEN];
    recipe.combine(&OPS, &answers, HIDDEN, &mut y);
    y
}

/// The answer as it is read from its bytes.
fn through_the_wire(answer: AnswerFrame) -> AnswerFrame {
    AnswerFrame::decode(answer.encode()).expect("what was encoded is read back")
}
