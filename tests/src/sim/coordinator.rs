//! A coordinator: `Admission`, `Router`, `Journal` and `Leader` of the product, with the rules of
//! `coordinator/src/shell` around them: poll the attention workers, start and resume sequences, recover those that have
//! lost their worker, publish placements while it leads.

use std::collections::BTreeMap;
use std::time::Duration;

use moesaic_coordinator::core::expert_load::ExpertLoad;
use moesaic_coordinator::core::journal::{Journal, Place};
use moesaic_coordinator::core::leader::{Leader, Policy, Seen, Sight, seen};
use moesaic_coordinator::core::routing::Identity;
use moesaic_coordinator::core::{Admission, ApiError, Router};
use moesaic_node::Member;
use moesaic_proto::WorkerId;
use moesaic_proto::v1::{Hello, LoadResponse, Role, RunEvent, RunRequest, SamplingParams};
use tonic::Code;

use super::messages::{Generate, Message};
use super::model::{EXPERTS, GROUPS, LAYERS};
use super::net::{Context, Input, StreamId, Timer};
use super::node_of;
use super::registry::{News, Registry};

pub const SEQUENCES_MAX: usize = 6;
const LOAD_INTERVAL: Duration = Duration::from_millis(250);
const LOAD_TIMEOUT: Duration = Duration::from_secs(1);
const LOAD_FAILURES_MAX: u32 = 2;
const UNREACHABLE_MAX: u32 = 4;
const RUN_TIMEOUT: Duration = Duration::from_secs(10);
const RESUME_TIMEOUT: Duration = Duration::from_secs(1);
const RECOVERY_MAX: Duration = Duration::from_secs(30);
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);
const LEADER_TICK: Duration = Duration::from_millis(100);
const EXPERT_LOAD_INTERVAL: Duration = Duration::from_secs(5);
const PUBLISH_RETRY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Coordinator {
    pub id: WorkerId,
    pub registry: Registry,
    pub admission: Admission,
    router: Router,
    workers: BTreeMap<WorkerId, Connected>,
    generations: BTreeMap<u64, Generation>,
    next_generation: u64,
    policy: Policy,
    leading: Option<(u64, Leader)>,
    /// Nothing is published before then.
    publish_after: Duration,
    expert_load: ExpertLoad,
    expert_load_asked: BTreeMap<StreamId, WorkerId>,
}

struct Connected {
    member: Member,
    poll: Option<StreamId>,
    has_left: bool,
    failures: u32,
    unreachable: u32,
}

struct Generation {
    client: StreamId,
    request_id: String,
    journal: Journal,
    known: usize,
    state: State,
    /// Since when no token has come, after a worker was lost, and how long the next try waits.
    stalled: Option<(Duration, Duration)>,
}

enum State {
    /// Workers are asked whether they have it.
    Resuming(Vec<Call>),
    /// A worker is asked to take it.
    Starting {
        call: Call,
        tried: Vec<WorkerId>,
        last: Vec<WorkerId>,
    },
    Running(Call),
    /// It waits for the next try.
    Waiting {
        last: Vec<WorkerId>,
    },
}

/// A call of a worker for a sequence.
#[derive(Clone)]
struct Call {
    stream: StreamId,
    worker: WorkerId,
    /// By which it is aborted.
    number: u64,
}

impl Coordinator {
    pub fn new(id: WorkerId, expert_workers: usize, replicas: usize) -> Self {
        let layers = LAYERS.to_vec();
        let policy = Policy { layers, experts: EXPERTS, groups: GROUPS, replicas, workers: expert_workers };
        Self {
            id,
            registry: Registry::default(),
            admission: Admission::new(SEQUENCES_MAX),
            router: Router::default(),
            workers: BTreeMap::new(),
            generations: BTreeMap::new(),
            next_generation: 0,
            policy,
            leading: None,
            publish_after: Duration::ZERO,
            expert_load: ExpertLoad::default(),
            expert_load_asked: BTreeMap::new(),
        }
    }

    pub fn start(&mut self, context: &mut Context<'_>, member: Member) {
        let id = self.id.clone();
        self.registry.start(context, member);
        self.registry.campaign(context, id);
        context.wake(LEADER_TICK, "lead", 0);
        context.wake(EXPERT_LOAD_INTERVAL, "expert load", 0);
    }

    /// An operator wants a new placement.
    pub fn rebalance(&mut self) {
        if let Some((_, leader)) = &mut self.leading {
            leader.ask();
        }
    }

    pub fn on(&mut self, context: &mut Context<'_>, input: Input) {
        let news = match input {
            Input::Started => None,
            Input::Broken { stream } => self.on_broken(context, stream),
            Input::Timer(Timer(task, number)) => self.on_timer(context, task, number),
            Input::Message { stream, message } => self.on_message(context, stream, message),
        };
        match news {
            Some(News::View) => self.apply(context),
            Some(News::Published(false)) => self.publish_after = context.now + PUBLISH_RETRY,
            _ => {}
        }
    }

    fn on_message(&mut self, context: &mut Context<'_>, stream: StreamId, message: Message) -> Option<News> {
        match message {
            Message::Generate(generate) => self.generate(context, stream, *generate),
            Message::LoadAnswer(load) => {
                if let Some(id) = self.polled(stream) {
                    self.answered(context, &id, Some(*load));
                    context.wake(LOAD_INTERVAL, "poll", number_of(&id));
                }
            }
            Message::ExpertLoadAnswer(counted) => {
                if let Some(id) = self.expert_load_asked.remove(&stream) {
                    self.expert_load.take(&id, counted);
                }
            }
            Message::Accepted | Message::Event(_) | Message::Failed(_) => self.on_call(context, stream, message),
            Message::Told(told) => return self.registry.on_told(context, stream, told),
            other => context.violated(format!("a coordinator was told {other:?}")),
        }
        None
    }

    fn on_broken(&mut self, context: &mut Context<'_>, stream: StreamId) -> Option<News> {
        if let Some(id) = self.polled(stream) {
            self.answered(context, &id, None);
            context.wake(LOAD_INTERVAL, "poll", number_of(&id));
        } else if let Some(number) = self.generation(|generation| generation.client == stream) {
            // The client is gone, and nobody goes on with it here.
            self.end(context, number, true);
        } else if self.generation(|generation| generation.has(stream)).is_some() {
            self.on_call(context, stream, Message::Failed(Code::Unavailable));
        } else if self.expert_load_asked.remove(&stream).is_none() {
            return self.registry.on_broken(context, stream);
        }
        None
    }

    fn on_timer(&mut self, context: &mut Context<'_>, task: &str, number: u64) -> Option<News> {
        match task {
            "poll" => self.poll(context, number),
            "poll timeout" => {
                if let Some(id) = self.polled(StreamId(number)) {
                    context.close(StreamId(number));
                    self.answered(context, &id, None);
                    context.wake(LOAD_INTERVAL, "poll", number_of(&id));
                }
            }
            "lead" => {
                self.lead(context);
                context.wake(LEADER_TICK, "lead", 0);
            }
            "expert load" => {
                self.expert_load.end_interval();
                for (id, connected) in &self.workers {
                    let (node, incarnation) = node_of(&connected.member.address);
                    let stream = context.open_to(node, incarnation, Message::ExpertLoad);
                    self.expert_load_asked.insert(stream, id.clone());
                }
                context.wake(EXPERT_LOAD_INTERVAL, "expert load", 0);
            }
            "retry" => self.retry(context, number),
            "call timeout" => {
                let is_waited_for = |generation: &Generation| match &generation.state {
                    State::Starting { call, .. } => call.stream.0 == number,
                    State::Resuming(asked) => asked.iter().any(|call| call.stream.0 == number),
                    _ => false,
                };
                if self.generation(is_waited_for).is_some() {
                    context.close(StreamId(number));
                    self.on_call(context, StreamId(number), Message::Failed(Code::Unavailable));
                }
            }
            _ => return self.registry.on_timer(context, task, number),
        }
        None
    }

    // === attention workers ===

    fn apply(&mut self, context: &mut Context<'_>) {
        let view = &self.registry.view;
        let known: BTreeMap<_, _> = view.of_role(Role::AttentionWorker).map(|m| (m.id.clone(), m.clone())).collect();
        let mut gone = Vec::new();
        for (id, connected) in &mut self.workers {
            match known.get(id) {
                Some(m) if m.address == connected.member.address && m.hello == connected.member.hello => {
                    connected.has_left = false;
                }
                Some(_) => gone.push(id.clone()),
                None => connected.has_left = true,
            }
        }
        gone.iter().for_each(|id| self.forget(id));
        for (id, member) in known {
            let identity = Identity::of(&Hello::default());
            if self.workers.contains_key(&id) || !self.router.accept(&identity) {
                continue;
            }
            self.router.add(id.clone());
            let connected = Connected { member, poll: None, has_left: false, failures: 0, unreachable: 0 };
            self.workers.insert(id.clone(), connected);
            context.wake(Duration::ZERO, "poll", number_of(&id));
        }
        let view = &self.registry.view;
        self.router.set_cordoned(|id| view.cordons.contains_key(&(Role::AttentionWorker, id.clone())));
    }

    fn forget(&mut self, id: &WorkerId) {
        self.workers.remove(id);
        self.router.remove(id);
    }

    /// Whose answer to Load comes over this stream: it is not waited for any more.
    fn polled(&mut self, stream: StreamId) -> Option<WorkerId> {
        let (id, connected) = self.workers.iter_mut().find(|(_, connected)| connected.poll == Some(stream))?;
        connected.poll = None;
        Some(id.clone())
    }

    fn poll(&mut self, context: &mut Context<'_>, number: u64) {
        let worker = self.workers.iter_mut().find(|(id, _)| number_of(id) == number);
        let Some((_, connected)) = worker.filter(|(_, connected)| connected.poll.is_none()) else { return };
        let (node, incarnation) = node_of(&connected.member.address);
        let stream = context.open_to(node, incarnation, Message::Load);
        connected.poll = Some(stream);
        context.wake(LOAD_TIMEOUT, "poll timeout", stream.0);
    }

    fn answered(&mut self, context: &mut Context<'_>, id: &WorkerId, load: Option<LoadResponse>) {
        let another_is_ready = self.router.is_ready_without(id);
        let Some(connected) = self.workers.get_mut(id) else { return };
        let (fails, is_unreachable) = (load.is_none(), load.as_ref().is_some_and(|load| !load.experts_reachable));
        connected.failures = if fails { connected.failures + 1 } else { 0 };
        connected.unreachable = if is_unreachable && another_is_ready { connected.unreachable + 1 } else { 0 };
        let is_lost = connected.failures >= LOAD_FAILURES_MAX || connected.unreachable >= UNREACHABLE_MAX;
        if fails && connected.has_left {
            self.forget(id);
        } else if is_lost {
            let there =
                |generation: &Generation| matches!(&generation.state, State::Running(call) if call.worker == *id);
            let lost: Vec<u64> = self.generations.iter().filter(|(_, g)| there(g)).map(|(&number, _)| number).collect();
            lost.into_iter().for_each(|number| self.recover(context, number));
        }
        self.router.set_load(id, load);
    }

    // === sequences ===

    fn generation(&self, which: impl Fn(&Generation) -> bool) -> Option<u64> {
        self.generations.iter().find(|(_, generation)| which(generation)).map(|(&number, _)| number)
    }

    fn generate(&mut self, context: &mut Context<'_>, client: StreamId, generate: Generate) {
        let Generate { request_id, prompt, seed, tokens, known } = generate;
        if known.is_some()
            && let Some(before) = self.generation(|generation| generation.request_id == request_id)
        {
            // The client goes on here: its earlier stream ends and leaves what it runs.
            let earlier = self.generations[&before].client;
            context.close(earlier);
            self.end(context, before, false);
        }
        let unready = self.router.not_ready().map(|reason| ApiError::Unavailable { reason });
        let admitted = unready.map_or(Ok(()), Err).and_then(|()| self.admission.admit(&request_id, 1));
        if let Err(error) = admitted {
            context.send(client, Message::Error(error));
            return context.close(client);
        }
        let run = RunRequest {
            request_id: request_id.clone(),
            prompt,
            sampling: Some(SamplingParams { seed: Some(seed), ..Default::default() }),
            max_tokens: tokens as u32,
            ..Default::default()
        };
        let mut asked = Vec::new();
        if known.is_some() {
            let run = RunRequest { resume: true, ..run.clone() };
            asked.extend(self.workers.values().map(|worker| call(context, worker, run.clone(), RESUME_TIMEOUT)));
        }
        let is_resuming = !asked.is_empty();
        let (journal, known) = (Journal::new(run), known.unwrap_or(0));
        let state = State::Resuming(asked);
        self.next_generation += 1;
        let number = self.next_generation;
        self.generations.insert(number, Generation { client, request_id, journal, known, state, stalled: None });
        if !is_resuming {
            self.begin(context, number, Vec::new(), Vec::new());
        }
    }

    /// Asks the next worker to take a sequence.
    fn begin(&mut self, context: &mut Context<'_>, number: u64, tried: Vec<WorkerId>, last: Vec<WorkerId>) {
        let Some(generation) = self.generations.get_mut(&number) else { return };
        let preferred = self.router.pick(&[tried.clone(), last.clone()].concat());
        let picked = preferred.or_else(|| self.router.pick(&tried));
        let Some(worker) = picked.and_then(|id| self.workers.get(&id)) else {
            return self.none_takes_it(context, number);
        };
        let call = call(context, worker, generation.journal.run().clone(), RUN_TIMEOUT);
        self.router.hold(&call.worker, generation.tokens());
        generation.state = State::Starting { call, tried, last };
    }

    fn none_takes_it(&mut self, context: &mut Context<'_>, number: u64) {
        let Some(generation) = self.generations.get_mut(&number) else { return };
        match generation.stalled {
            Some((begun, wait)) if context.now < begun + RECOVERY_MAX => {
                generation.state = State::Waiting { last: Vec::new() };
                let wait = (wait * 2).clamp(RETRY_MIN, RETRY_MAX);
                generation.stalled = Some((begun, wait));
                context.wake(wait, "retry", number);
            }
            _ => {
                let reason = "no attention worker takes it".to_owned();
                context.send(generation.client, Message::Error(ApiError::Unavailable { reason }));
                context.close(generation.client);
                self.end(context, number, true);
            }
        }
    }

    fn retry(&mut self, context: &mut Context<'_>, number: u64) {
        if let Some(State::Waiting { last }) = self.generations.get(&number).map(|generation| &generation.state) {
            let last = last.clone();
            self.begin(context, number, Vec::new(), last);
        }
    }

    /// Something from a worker for one of the sequences.
    fn on_call(&mut self, context: &mut Context<'_>, stream: StreamId, message: Message) {
        let Some(number) = self.generation(|generation| generation.has(stream)) else { return };
        let Some(generation) = self.generations.get_mut(&number) else { return };
        match (&mut generation.state, message) {
            (State::Resuming(asked), Message::Accepted) => {
                let (taken, others): (Vec<Call>, Vec<Call>) =
                    std::mem::take(asked).into_iter().partition(|call| call.stream == stream);
                others.iter().for_each(|other| context.close(other.stream));
                for call in taken {
                    self.router.hold(&call.worker, generation.tokens());
                    generation.state = State::Running(call);
                }
            }
            (State::Resuming(asked), Message::Failed(_)) => {
                asked.retain(|call| call.stream != stream);
                context.close(stream);
                if asked.is_empty() {
                    self.begin(context, number, Vec::new(), Vec::new());
                }
            }
            (State::Starting { call, .. }, Message::Accepted) => generation.state = State::Running(call.clone()),
            (State::Starting { call, tried, last }, Message::Failed(code)) => {
                let (worker, mut tried, last) = (call.worker.clone(), tried.clone(), last.clone());
                self.router.release(&worker, generation.tokens());
                if code == Code::Unavailable {
                    self.router.set_load(&worker, None);
                }
                tried.push(worker);
                context.close(stream);
                self.begin(context, number, tried, last);
            }
            (State::Running(_), Message::Event(event)) if event.token.is_none() => {
                let reason = "somebody has aborted it".to_owned();
                context.send(generation.client, Message::Error(ApiError::Failed { reason }));
                context.close(generation.client);
                self.end(context, number, false);
            }
            (State::Running(_), Message::Event(event)) => self.on_event(context, number, &event),
            (State::Running(_), Message::Failed(Code::Unavailable)) => self.recover(context, number),
            (State::Running(_), Message::Failed(code)) => {
                let reason = format!("{code:?}");
                let error = match code {
                    // Its client may be gone, and this one's may not.
                    Code::Aborted => ApiError::Unavailable { reason },
                    _ => ApiError::Failed { reason },
                };
                context.send(generation.client, Message::Error(error));
                context.close(generation.client);
                self.end(context, number, false);
            }
            (_, message) => context.violated(format!("{message:?} where it does not fit")),
        }
    }

    fn on_event(&mut self, context: &mut Context<'_>, number: u64, event: &RunEvent) {
        let Some(generation) = self.generations.get_mut(&number) else { return };
        match generation.journal.accept(event) {
            Place::Next => {
                generation.stalled = None;
                let is_last = event.finish.is_some();
                let position = event.position as usize;
                if position >= generation.known || is_last {
                    let token = event.token.as_ref().map_or(0, |info| info.token);
                    context.send(generation.client, Message::Token { position, token, is_last });
                }
                if is_last {
                    context.close(generation.client);
                    self.end(context, number, false);
                }
            }
            Place::Known => {}
            Place::Gap => {
                context.violated(format!("{}: a token is left out before {}", generation.request_id, event.position));
                self.recover(context, number);
            }
        }
    }

    /// A sequence has lost its worker: it goes on on another one.
    fn recover(&mut self, context: &mut Context<'_>, number: u64) {
        let Some(generation) = self.generations.get_mut(&number) else { return };
        if let State::Running(call) = &generation.state {
            let call = call.clone();
            self.router.release(&call.worker, generation.tokens());
            if let Some(connected) = self.workers.get(&call.worker) {
                call.abort(context, connected, &generation.request_id);
            }
            context.close(call.stream);
            let (begun, wait) = generation.stalled.unwrap_or((context.now, Duration::ZERO));
            generation.stalled = Some((begun, wait));
            generation.state = State::Waiting { last: vec![call.worker] };
            context.wake(wait, "retry", number);
        }
    }

    /// A sequence is over here; `is_aborted`: also on its worker.
    fn end(&mut self, context: &mut Context<'_>, number: u64, is_aborted: bool) {
        let Some(generation) = self.generations.remove(&number) else { return };
        self.admission.release(&generation.request_id, context.now.as_millis() as u64);
        for call in generation.calls() {
            if !matches!(generation.state, State::Resuming(_)) {
                self.router.release(&call.worker, generation.tokens());
            }
            if let Some(connected) = self.workers.get(&call.worker).filter(|_| is_aborted) {
                call.abort(context, connected, &generation.request_id);
            }
            context.close(call.stream);
        }
    }

    // === the leader ===

    fn lead(&mut self, context: &mut Context<'_>) {
        let Some(term) = self.registry.term() else { return self.leading = None };
        if self.leading.as_ref().is_none_or(|(of, _)| *of != term) {
            self.leading = Some((term, Leader::new(self.policy.clone(), context.now)));
        }
        if self.registry.is_publishing() || context.now < self.publish_after {
            return;
        }
        let seen = self.seen();
        let view = &self.registry.view;
        let load = self.expert_load.smoothed();
        let sight = Sight { workers: &seen, placement: view.placement.as_deref(), load };
        let Some((_, leader)) = &mut self.leading else { return };
        // Where they cannot be placed, as nobody is there, it is tried again.
        if let Ok(Some((plan, _))) = leader.decide(context.now, &sight) {
            self.registry.publish(context, plan.placement.with_term(term));
        }
    }

    fn seen(&self) -> Vec<Seen> {
        let edges = self.workers.keys().filter_map(|id| self.router.load(id)).flat_map(|load| &load.edges);
        let view = &self.registry.view;
        seen(view.of_role(Role::ExpertWorker), view, edges, LAYERS.len() * EXPERTS)
    }
}

impl Generation {
    fn tokens(&self) -> u64 {
        let run = self.journal.run();
        run.prompt.len() as u64 + u64::from(run.max_tokens)
    }

    fn calls(&self) -> &[Call] {
        match &self.state {
            State::Resuming(asked) => asked,
            State::Starting { call, .. } | State::Running(call) => std::slice::from_ref(call),
            State::Waiting { .. } => &[],
        }
    }

    fn has(&self, stream: StreamId) -> bool {
        self.calls().iter().any(|call| call.stream == stream)
    }
}

/// Calls a worker for a sequence.
fn call(context: &mut Context<'_>, worker: &Connected, run: RunRequest, timeout: Duration) -> Call {
    let number = context.rng.u64(..);
    let (node, incarnation) = node_of(&worker.member.address);
    let stream = context.open_to(node, incarnation, Message::Run(Box::new(RunRequest { call: number, ..run })));
    context.wake(timeout, "call timeout", stream.0);
    Call { stream, worker: worker.member.id.clone(), number }
}

impl Call {
    fn abort(&self, context: &mut Context<'_>, worker: &Connected, request_id: &str) {
        let (node, incarnation) = node_of(&worker.member.address);
        let abort = Message::Abort { request_id: request_id.to_owned(), call: self.number };
        context.open_to(node, incarnation, abort);
    }
}

/// A worker's number, which timers name it by.
fn number_of(id: &WorkerId) -> u64 {
    id.as_str()[1..].parse().unwrap_or(0)
}
