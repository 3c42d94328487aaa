//! An expert worker: `Inbox`, `batch` and `Epochs` of the product, with the life of `expert-worker/src/shell.rs` around
//! them: load what the placement says, serve two epochs, hand over, stop.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use moesaic_dispatch::nccl::core::Kind;
use moesaic_dispatch::{Activations, AnswerFrame, Refusal, ReplySender, RequestFrame};
use moesaic_expert_worker::core::batch;
use moesaic_expert_worker::core::epochs::Epochs;
use moesaic_expert_worker::core::handover::{is_covered, may_leave};
use moesaic_expert_worker::core::inbox::{Inbox, Job};
use moesaic_node::Member;
use moesaic_proto::v1::RefusalReason;
use moesaic_proto::{Epoch, ExpertId, LayerId, Placement, WorkerId};

use super::lane::{Lane, Load};
use super::messages::Message;
use super::model::{self, HIDDEN, LAYERS};
use super::net::{Context, Input, StreamId, Timer};
use super::registry::{News, Registry};

const FRAMES_MAX: usize = 64;
/// Terms that are computed together.
const TERMS_MAX: usize = 64;
const RETIRE_INTERVAL: Duration = Duration::from_secs(2);
/// From a placement that this worker is not needed for to the last rows under the one before.
const MOVED_ON: Duration = Duration::from_millis(500);
/// What handing over may take.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// From the closing of the streams to the end of the process.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

type Held = BTreeMap<LayerId, BTreeSet<ExpertId>>;

/// Answers on their way out, by stream.
type Outbox = Arc<Mutex<Vec<(StreamId, AnswerFrame)>>>;

/// See the module.
pub struct Expert {
    pub id: WorkerId,
    pub registry: Registry,
    inbox: Inbox,
    epochs: Epochs<Held>,
    loading: Option<Arc<Placement>>,
    computing: Vec<Job>,
    outbox: Outbox,
    streams: BTreeSet<StreamId>,
    /// By their own streams.
    lanes: BTreeMap<StreamId, Lane>,
    /// How many times slower than usual it computes.
    pub slowness: u32,
    stop: Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    No,
    /// It is told to; whether others had everything already.
    HandingOver {
        was_covered: bool,
    },
    Leaving,
    Closing,
}

impl Expert {
    pub fn new(id: WorkerId) -> Self {
        Self {
            id,
            registry: Registry::default(),
            inbox: Inbox::new(FRAMES_MAX),
            epochs: Epochs::default(),
            loading: None,
            computing: Vec::new(),
            outbox: Outbox::default(),
            streams: BTreeSet::new(),
            lanes: BTreeMap::new(),
            slowness: 1,
            stop: Stop::No,
        }
    }

    pub fn epoch(&self) -> Epoch {
        self.epochs.newest().map_or(Epoch(0), |(epoch, _)| epoch)
    }

    /// What it has of the newest epoch.
    pub fn holds(&self, layer: LayerId, expert: ExpertId) -> bool {
        let newest = self.epochs.newest();
        newest.is_some_and(|(_, held)| held.get(&layer).is_some_and(|experts| experts.contains(&expert)))
    }

    pub fn start(&mut self, context: &mut Context<'_>, member: Member) {
        self.registry.start(context, member);
        context.wake(RETIRE_INTERVAL, "retire", 0);
    }

    /// It is told to end in good order.
    pub fn stop(&mut self, context: &mut Context<'_>) {
        if self.stop != Stop::No {
            return;
        }
        self.stop = Stop::HandingOver { was_covered: is_covered(&self.registry.view, &self.id) };
        self.loading = None;
        self.registry.update(context, |member| member.draining = true);
        context.wake(DRAIN_MAX, "moved on", 0);
        self.look(context);
    }

    pub fn on(&mut self, context: &mut Context<'_>, input: Input) {
        let news = match input {
            Input::Started => None,
            Input::Broken { stream } => {
                self.streams.remove(&stream);
                self.end_lane(context, stream);
                let beside: Vec<_> = self.lanes.values().filter(|l| l.beside == stream).map(|l| l.stream).collect();
                beside.into_iter().for_each(|lane| self.end_lane(context, lane));
                self.registry.on_broken(context, stream)
            }
            Input::Timer(Timer(task, number)) => self.on_timer(context, task, number),
            Input::Message { stream, message } => self.on_message(context, stream, message),
        };
        match news {
            Some(News::View) => self.look(context),
            Some(News::Left) => self.close(context),
            _ => {}
        }
        self.send_answers(context);
    }

    fn on_message(&mut self, context: &mut Context<'_>, stream: StreamId, message: Message) -> Option<News> {
        match message {
            Message::Hello if self.stop == Stop::Closing => context.close(stream),
            Message::Hello => {
                self.streams.insert(stream);
                context.send(stream, Message::Hello);
            }
            Message::Ping => context.send(stream, Message::Ping),
            Message::Frame(frame) => self.take(context, stream, frame),
            // Its edge was up when it was offered, and may be gone by now.
            Message::LaneHello { beside, .. } if !self.streams.contains(&beside) => context.close(stream),
            Message::LaneHello { generation, beside } => {
                let lane = Lane::new(context, generation, stream, beside);
                self.lanes.insert(stream, lane);
            }
            Message::Slot(slot) => {
                self.lanes.get_mut(&stream).into_iter().for_each(|lane| lane.arrive((*slot).clone()));
                self.receive(context, stream);
            }
            Message::LaneWake { generation, sequence } => {
                if let Some(lane) = self.lane_beside(stream, generation) {
                    lane.wake(sequence);
                    let lane = lane.stream;
                    self.receive(context, lane);
                }
            }
            Message::LaneFailed { generation } => {
                let lane = self.lane_beside(stream, generation).map(|lane| lane.stream);
                lane.into_iter().for_each(|lane| self.end_lane(context, lane));
            }
            Message::Told(told) => return self.registry.on_told(context, stream, told),
            other => context.violated(format!("an expert worker was told {other:?}")),
        }
        None
    }

    fn on_timer(&mut self, context: &mut Context<'_>, task: &str, number: u64) -> Option<News> {
        match task {
            "retire" => {
                if self.loading.is_none() {
                    self.epochs.retire(context.now);
                }
                context.wake(RETIRE_INTERVAL, "retire", 0);
            }
            "loaded" => self.install(context),
            "computed" => self.answer(context),
            "moved on" if matches!(self.stop, Stop::HandingOver { .. }) => {
                self.stop = Stop::Leaving;
                self.registry.leave(context);
            }
            "moved on" => {}
            "exit" => context.exit(),
            "lane idle" => {
                self.lanes.get_mut(&StreamId(number)).into_iter().for_each(|lane| lane.look(context));
            }
            _ => return self.registry.on_timer(context, task, number),
        }
        None
    }

    fn lane_beside(&mut self, beside: StreamId, generation: u32) -> Option<&mut Lane> {
        self.lanes.values_mut().find(|lane| lane.beside == beside && lane.generation == generation)
    }

    fn end_lane(&mut self, context: &mut Context<'_>, stream: StreamId) {
        if let Some(lane) = self.lanes.remove(&stream) {
            context.close(stream);
            context.send(lane.beside, Message::LaneFailed { generation: lane.generation });
        }
    }

    /// What a lane has received.
    fn receive(&mut self, context: &mut Context<'_>, stream: StreamId) {
        while let Some(lane) = self.lanes.get_mut(&stream) {
            match lane.receive() {
                Ok(Some((Kind::Warm, _))) => lane.send(context, Load::Nothing),
                Ok(Some((_, Load::Frame(frame)))) => self.take(context, stream, frame),
                Ok(None) => break,
                other => context.violated(format!("a lane brings {other:?}")),
            }
        }
    }

    /// What the view asks of it.
    fn look(&mut self, context: &mut Context<'_>) {
        if let Stop::HandingOver { was_covered } = self.stop
            && may_leave(&self.registry.view, &self.id)
        {
            context.wake(if was_covered { Duration::ZERO } else { MOVED_ON }, "moved on", 0);
        }
        let Some(placement) = self.registry.view.placement.clone() else { return };
        if self.stop != Stop::No || self.loading.is_some() || placement.epoch() <= self.epoch() {
            return;
        }
        let missing =
            placement.shard(&self.id).into_iter().flat_map(|(l, experts)| experts.into_iter().map(move |e| (l, e)));
        let missing = missing.filter(|(layer, expert)| !self.holds(*layer, *expert)).count() as u64;
        let each = if placement.is_urgent() { 10 } else { context.rng.u64(20..150) };
        self.loading = Some(placement);
        context.wake(Duration::from_millis(5 + each * missing), "loaded", 0);
    }

    fn install(&mut self, context: &mut Context<'_>) {
        let Some(placement) = self.loading.take() else { return };
        let shard = placement.shard(&self.id);
        let held = LAYERS.iter().map(|layer| (*layer, shard.get(layer).into_iter().flatten().copied().collect()));
        self.epochs.install(context.now, placement.epoch(), held.collect());
        self.registry.update(context, |member| member.epoch_loaded = placement.epoch());
        self.look(context);
    }

    /// It is not registered any more: nobody new is served.
    fn close(&mut self, context: &mut Context<'_>) {
        self.stop = Stop::Closing;
        self.inbox.stop();
        for stream in std::mem::take(&mut self.streams) {
            // What is in hand is answered first.
            if self.computing.is_empty() {
                context.close(stream);
            }
        }
        context.wake(LAST_ANSWERS, "exit", 0);
    }

    fn take(&mut self, context: &mut Context<'_>, stream: StreamId, frame: RequestFrame) {
        let outbox = self.outbox.clone();
        let reply = ReplySender::new(frame.header, move |answer| {
            outbox.lock().unwrap_or_else(PoisonError::into_inner).push((stream, answer));
        });
        let checked = self.epochs.get(context.now, frame.header.epoch).and_then(|held| check(&held, &frame));
        let offered = match checked {
            Ok(()) => self.inbox.offer(Job::new(frame, reply)),
            Err(refusal) => Err(Box::new((Job::new(frame, reply), refusal))),
        };
        if let Err((job, refusal)) = offered.map_err(|given_back| *given_back) {
            job.reply.send(Err(refusal));
        }
        self.compute(context);
    }

    fn compute(&mut self, context: &mut Context<'_>) {
        if !self.computing.is_empty() {
            return;
        }
        self.computing = self.inbox.take(TERMS_MAX);
        let terms: usize = self.computing.iter().map(|job| job.frame.terms().len()).sum();
        if terms > 0 {
            let time = Duration::from_micros(1000 + 100 * terms as u64) * self.slowness;
            context.wake(time, "computed", 0);
        }
    }

    fn answer(&mut self, context: &mut Context<'_>) {
        let jobs = std::mem::take(&mut self.computing);
        let Some(first) = jobs.first() else { return };
        match self.epochs.get(context.now, first.frame.header.epoch) {
            Ok(held) => self.answer_from(context, jobs, &held),
            // Retired while they waited.
            Err(refusal) => jobs.into_iter().for_each(|job| job.reply.send(Err(refusal.clone()))),
        }
        self.compute(context);
    }

    fn answer_from(&mut self, context: &mut Context<'_>, jobs: Vec<Job>, held: &Held) {
        let frames: Vec<&RequestFrame> = jobs.iter().map(|job| &job.frame).collect();
        let layer = frames[0].header.layer;
        let x = rows(&frames);
        let mut answers: Vec<Vec<f32>> = frames.iter().map(|f| vec![0.0; f.output_count() * HIDDEN]).collect();
        for chunk in batch::chunks(&frames, TERMS_MAX) {
            let mut results = Vec::new();
            for (expert, of) in &chunk.experts {
                if !held[&layer].contains(expert) {
                    context.violated(format!("computes layer {layer}, expert {expert}, which it does not hold"));
                }
                results.extend(of.iter().map(|row| model::expert(layer, *expert, &x[*row as usize])));
            }
            for target in &chunk.outputs {
                let y = &mut answers[target.frame][target.output * HIDDEN..][..HIDDEN];
                for (i, term) in chunk.terms[target.terms.clone()].iter().enumerate() {
                    let value = &results[term.row as usize];
                    match (target.is_weighted, i) {
                        (false, _) => y.copy_from_slice(value),
                        (true, 0) => (model::OPS.first)(y, term.weight, value),
                        (true, _) => (model::OPS.next)(y, term.weight, value),
                    }
                }
            }
        }
        for (job, answer) in jobs.into_iter().zip(answers) {
            job.reply.send(Ok(answer.into()));
        }
    }

    fn send_answers(&mut self, context: &mut Context<'_>) {
        let answers = std::mem::take(&mut *self.outbox.lock().unwrap_or_else(PoisonError::into_inner));
        for (stream, answer) in answers {
            match self.lanes.get_mut(&stream) {
                Some(lane) => lane.send(context, Load::Answer(answer)),
                // Where the lane is gone, it is asked again over the edge's stream.
                None => context.send(stream, Message::Answer(answer)),
            }
        }
    }
}

fn check(held: &Held, frame: &RequestFrame) -> Result<(), Refusal> {
    let Some(experts) = held.get(&frame.header.layer) else {
        return Err(Refusal::new(RefusalReason::Malformed, "no such layer"));
    };
    match frame.terms().iter().find(|term| !experts.contains(&term.expert())) {
        None => Ok(()),
        Some(term) => Err(Refusal::new(RefusalReason::NotHeld, format!("expert {}", term.expert()))),
    }
}

/// The rows of several frames one after the other; of a single one, its activations as they are.
fn rows(frames: &[&RequestFrame]) -> Vec<Vec<f32>> {
    let mut x = Vec::new();
    for frame in frames {
        let Activations::F32(values) = frame.activations() else { continue };
        match frames.len() {
            1 => x.extend(values.chunks_exact(HIDDEN).map(<[f32]>::to_vec)),
            _ => x.extend(
                (0..frame.row_count())
                    .map(|row| values[frame.position(row as u16) as usize * HIDDEN..][..HIDDEN].to_vec()),
            ),
        }
    }
    x
}
