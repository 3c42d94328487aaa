//! An attention worker: `Batcher` and `dispatch` of the product, a cache of chain states in place of latents, and the
//! table of requests of `attention-worker/src/shell/requests.rs`.

use std::collections::BTreeMap;
use std::time::Duration;

use moesaic_attention_worker::core::batcher::{Batcher, Finish, Limits, Part, Request, SequenceId};
use moesaic_dispatch::DispatchError;
use moesaic_dispatch::tracker::CallId;
use moesaic_kernels::PAGE_TOKENS;
use moesaic_node::Member;
use moesaic_proto::WorkerId;
use moesaic_proto::v1::{ExpertLoadResponse, FinishReason, LayerLoad, LoadResponse, RunEvent, RunRequest, TokenInfo};
use tonic::Code;

use super::dispatch::{Dispatch, Landed};
use super::messages::Message;
use super::model::{self, EXPERTS, HIDDEN, LAYERS};
use super::net::{Context, Input, StreamId, Timer};
use super::registry::{News, Registry};

/// How long a sequence that nobody reads is kept.
pub const ORPHAN_MAX: Duration = Duration::from_secs(15);
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);
const MICRO_BATCHES: usize = 2;

/// See the module.
pub struct Attention {
    pub id: WorkerId,
    pub registry: Registry,
    pub dispatch: Dispatch,
    pub batcher: Batcher,
    limits: Limits,
    /// The chain's state after each token, by page and place.
    cache: Vec<[u64; PAGE_TOKENS]>,
    flights: BTreeMap<u8, Flight>,
    requests: BTreeMap<String, Entry>,
    by_sequence: BTreeMap<SequenceId, String>,
    expert_rows: Vec<Vec<u64>>,
    is_stopping: bool,
}

/// A micro-batch on its way through the layers.
struct Flight {
    parts: Vec<Part>,
    /// [rows, HIDDEN]
    rows: Vec<f32>,
    layer: usize,
    call: Option<CallId>,
}

struct Entry {
    run: RunRequest,
    /// The call that has read it last.
    call: u64,
    sequence: SequenceId,
    /// All of it from position 0 on: what came with the request first.
    events: Vec<RunEvent>,
    failed: Option<Code>,
    reader: Option<StreamId>,
    /// Since when nobody reads.
    since: Duration,
}

impl Entry {
    fn is_over(&self) -> bool {
        self.failed.is_some() || self.events.last().is_some_and(|event| event.finish.is_some())
    }
}

impl Attention {
    pub fn new(id: WorkerId, pages: u32, chunk: usize) -> Self {
        let limits = Limits {
            pages,
            chunk,
            token_budget: chunk * 2,
            micro_batches: MICRO_BATCHES,
            micro_batch_rows: 4,
            waiting_max: 16,
        };
        Self {
            id,
            registry: Registry::default(),
            dispatch: Dispatch::default(),
            batcher: Batcher::new(limits),
            limits,
            cache: vec![[0; PAGE_TOKENS]; pages as usize],
            flights: BTreeMap::new(),
            requests: BTreeMap::new(),
            by_sequence: BTreeMap::new(),
            expert_rows: vec![vec![0; EXPERTS]; LAYERS.len()],
            is_stopping: false,
        }
    }

    pub fn start(&mut self, context: &mut Context<'_>, member: Member) {
        self.registry.start(context, member);
        context.wake(SWEEP_INTERVAL, "sweep", 0);
    }

    /// It is told to end in good order: running sequences finish, new ones are refused.
    pub fn stop(&mut self, context: &mut Context<'_>) {
        if !self.is_stopping {
            self.is_stopping = true;
            self.registry.leave(context);
            context.wake(Duration::from_secs(10), "exit", 0);
            self.exit_if_idle(context);
        }
    }

    fn exit_if_idle(&mut self, context: &mut Context<'_>) {
        if self.is_stopping && self.batcher.is_empty() && self.requests.values().all(|entry| entry.reader.is_none()) {
            context.wake(Duration::from_millis(100), "exit", 0);
        }
    }

    /// Whether it holds nothing of any request that somebody could still want.
    pub fn is_idle(&self) -> bool {
        let counts = self.batcher.counts();
        self.batcher.is_empty() && counts.pages_free == counts.pages_total && self.flights.is_empty()
    }

    pub fn on(&mut self, context: &mut Context<'_>, input: Input) {
        let news = match input {
            Input::Started => None,
            Input::Broken { stream } => match self.dispatch.on_broken(context, stream) {
                Some(landed) => {
                    self.land(context, landed);
                    None
                }
                None => {
                    self.lose_reader(context, stream);
                    self.registry.on_broken(context, stream)
                }
            },
            Input::Timer(Timer(task, number)) => self.on_timer(context, task, number),
            Input::Message { stream, message } => self.on_message(context, stream, message),
        };
        if news == Some(News::View) {
            let landed = self.dispatch.set_view(context, &self.registry.view);
            self.land(context, landed);
        }
        self.step(context);
        self.exit_if_idle(context);
    }

    fn on_timer(&mut self, context: &mut Context<'_>, task: &str, number: u64) -> Option<News> {
        match task {
            "sweep" => {
                self.sweep(context.now);
                context.wake(SWEEP_INTERVAL, "sweep", 0);
            }
            "computed" => self.computed(context, number as u8),
            "exit" => context.exit(),
            _ => match self.dispatch.on_timer(context, task, number) {
                Some(landed) => self.land(context, landed),
                None => return self.registry.on_timer(context, task, number),
            },
        }
        None
    }

    fn on_message(&mut self, context: &mut Context<'_>, stream: StreamId, message: Message) -> Option<News> {
        match message {
            Message::Run(run) => self.run(context, stream, *run),
            Message::Abort { request_id, call } => {
                if self.requests.get(&request_id).is_some_and(|entry| entry.call == call)
                    && let Some(entry) = self.requests.remove(&request_id)
                {
                    self.forget(context, entry);
                }
                context.close(stream);
            }
            Message::Load => {
                context.send(stream, Message::LoadAnswer(Box::new(self.load(context.now))));
                context.close(stream);
            }
            Message::ExpertLoad => {
                let layer = |(layer, rows): (&moesaic_proto::LayerId, &Vec<u64>)| LayerLoad {
                    layer: u32::from(layer.0),
                    rows: rows.clone(),
                };
                let layers = LAYERS.iter().zip(&self.expert_rows).map(layer).collect();
                let incarnation = u64::from(context.incarnation);
                context.send(stream, Message::ExpertLoadAnswer(ExpertLoadResponse { layers, incarnation }));
                context.close(stream);
            }
            Message::Told(told) => return self.registry.on_told(context, stream, told),
            message => {
                let landed = self.dispatch.on_message(context, stream, message);
                self.land(context, landed);
            }
        }
        None
    }

    fn load(&self, now: Duration) -> LoadResponse {
        let counts = self.batcher.counts();
        LoadResponse {
            pages_total: counts.pages_total as u32,
            pages_free: counts.pages_free as u32,
            page_tokens: PAGE_TOKENS as u32,
            sequences_running: counts.running as u32,
            sequences_waiting: counts.waiting as u32,
            waiting_max: self.limits.waiting_max as u32,
            preemptions: counts.preemptions,
            experts_reachable: self.dispatch.is_reachable(now),
            draining: self.is_stopping,
            epoch: self.dispatch.epoch().map_or(0, |epoch| epoch.0),
            edges: self.dispatch.edges(now),
            ..Default::default()
        }
    }

    // === requests ===

    fn run(&mut self, context: &mut Context<'_>, stream: StreamId, run: RunRequest) {
        let taken = if run.resume { self.resume(&run, stream, context) } else { self.take(&run, stream) };
        match taken {
            Ok(next) => {
                context.send(stream, Message::Accepted);
                let entry = &self.requests[&run.request_id];
                entry.events[next..].iter().for_each(|event| context.send(stream, Message::Event(event.clone())));
                if let Some(code) = entry.failed {
                    context.send(stream, Message::Failed(code));
                }
            }
            Err(code) => {
                context.send(stream, Message::Failed(code));
                context.close(stream);
            }
        }
    }

    /// Takes over a sequence that is the same, from its first event on.
    fn resume(&mut self, run: &RunRequest, stream: StreamId, context: &mut Context<'_>) -> Result<usize, Code> {
        let entry = self.requests.get_mut(&run.request_id).ok_or(Code::NotFound)?;
        let wanted = RunRequest { emitted: entry.run.emitted.clone(), ..anonymous(run) };
        if entry.run != wanted {
            return Err(Code::NotFound);
        }
        entry.call = run.call;
        if let Some(before) = entry.reader.replace(stream) {
            context.send(before, Message::Failed(Code::Aborted));
            context.close(before);
        }
        Ok(0)
    }

    fn take(&mut self, run: &RunRequest, stream: StreamId) -> Result<usize, Code> {
        if self.is_stopping || self.dispatch.epoch().is_none() {
            return Err(Code::Unavailable);
        }
        let before = self.requests.get(&run.request_id);
        if before.is_some_and(|entry| entry.reader.is_some()) {
            return Err(Code::AlreadyExists);
        }
        let emitted: Vec<u32> = run.emitted.iter().map(|info| info.token).collect();
        let events = emitted.iter().enumerate().map(|(position, token)| event(position, *token, None));
        let events: Vec<RunEvent> = events.collect();
        let (prompt, max_tokens) = (run.prompt.clone(), run.max_tokens as usize);
        let request = Request { prompt, emitted, max_tokens, stop_tokens: Vec::new() };
        let sequence = self.batcher.submit(request).map_err(|_| Code::ResourceExhausted)?;
        if let Some(before) = self.requests.remove(&run.request_id) {
            self.by_sequence.remove(&before.sequence);
            self.batcher.abort(before.sequence);
        }
        self.by_sequence.insert(sequence, run.request_id.clone());
        let next = events.len();
        let (failed, reader, since) = (None, Some(stream), Duration::ZERO);
        let entry = Entry { run: anonymous(run), call: run.call, sequence, events, failed, reader, since };
        self.requests.insert(run.request_id.clone(), entry);
        Ok(next)
    }

    fn lose_reader(&mut self, context: &Context<'_>, stream: StreamId) {
        if let Some(entry) = self.requests.values_mut().find(|entry| entry.reader == Some(stream)) {
            (entry.reader, entry.since) = (None, context.now);
        }
    }

    fn forget(&mut self, context: &mut Context<'_>, entry: Entry) {
        self.by_sequence.remove(&entry.sequence);
        self.batcher.abort(entry.sequence);
        if let Some(reader) = entry.reader {
            let finish = Some(FinishReason::Aborted.into());
            context.send(reader, Message::Event(RunEvent { finish, ..Default::default() }));
            context.close(reader);
        }
    }

    fn sweep(&mut self, now: Duration) {
        let is_over = |entry: &Entry| entry.reader.is_none() && now >= entry.since + ORPHAN_MAX;
        let over: Vec<String> =
            self.requests.iter().filter(|(_, entry)| is_over(entry)).map(|(id, _)| id.clone()).collect();
        for id in over {
            if let Some(entry) = self.requests.remove(&id) {
                self.by_sequence.remove(&entry.sequence);
                self.batcher.abort(entry.sequence);
            }
        }
    }

    // === the engine ===

    /// Forms micro-batches as long as there is something to compute.
    fn step(&mut self, context: &mut Context<'_>) {
        while let Some(slot) = (0..MICRO_BATCHES as u8).find(|slot| !self.flights.contains_key(slot)) {
            let wanted = self.batcher.micro_batches();
            let parts = if self.flights.len() < wanted { self.batcher.form(wanted) } else { Vec::new() };
            if parts.is_empty() {
                return;
            }
            let rows = parts.iter().flat_map(|part| self.append(context, part)).collect();
            self.flights.insert(slot, Flight { parts, rows, layer: 0, call: None });
            self.compute(context, slot);
        }
    }

    /// Writes a part's states into the cache; its rows.
    fn append(&mut self, context: &mut Context<'_>, part: &Part) -> Vec<f32> {
        let mut rows = Vec::new();
        for (i, token) in part.tokens.iter().enumerate() {
            let position = part.start + i;
            let place = |position: usize| (part.pages[position / PAGE_TOKENS] as usize, position % PAGE_TOKENS);
            let before = match position.checked_sub(1).map(place) {
                None => model::START,
                Some((page, place)) => self.cache[page][place],
            };
            let state = model::chain(before, *token);
            let (page, at) = place(position);
            self.cache[page][at] = state;
            rows.extend(model::embed(state));
        }
        if rows.is_empty() {
            context.violated("a part without rows".into());
        }
        rows
    }

    fn compute(&self, context: &mut Context<'_>, slot: u8) {
        let rows = self.flights[&slot].rows.len() / HIDDEN;
        context.wake(Duration::from_micros(5_000 + 50 * rows as u64), "computed", u64::from(slot));
    }

    /// The part of a layer before its experts is done.
    fn computed(&mut self, context: &mut Context<'_>, slot: u8) {
        let Some(flight) = self.flights.get_mut(&slot) else { return };
        if flight.layer == LAYERS.len() {
            return self.finish(context, slot);
        }
        let layer = LAYERS[flight.layer];
        for row in flight.rows.chunks_exact(HIDDEN) {
            for route in model::gate(layer, row) {
                self.expert_rows[flight.layer][usize::from(route.expert.0)] += 1;
            }
        }
        let (call, landed) = self.dispatch.dispatch(context, layer, slot, &flight.rows);
        flight.call = call;
        match call {
            Some(_) => self.land(context, landed),
            None => self.fail(context, slot, &DispatchError::NoPlacement { layer }),
        }
    }

    fn land(&mut self, context: &mut Context<'_>, landed: Vec<Landed>) {
        for (call, result) in landed {
            let Some((&slot, flight)) = self.flights.iter_mut().find(|(_, flight)| flight.call == Some(call)) else {
                context.violated(format!("{call:?} has come back, and nobody waits for it"));
                continue;
            };
            flight.call = None;
            match result {
                Ok(sums) => {
                    let layer = LAYERS[flight.layer];
                    for (row, sum) in flight.rows.chunks_exact_mut(HIDDEN).zip(sums.chunks_exact(HIDDEN)) {
                        if model::sum(layer, row) != sum {
                            context.violated(format!("{call:?}: a row's experts add up to something else"));
                        }
                        model::residual(row, sum);
                    }
                    flight.layer += 1;
                    self.compute(context, slot);
                }
                Err(error) => self.fail(context, slot, &error),
            }
        }
    }

    fn fail(&mut self, context: &mut Context<'_>, slot: u8, error: &DispatchError) {
        let Some(flight) = self.flights.remove(&slot) else { return };
        let code = match error {
            DispatchError::NoPlacement { .. } | DispatchError::Unreachable { .. } | DispatchError::Lost { .. } => {
                Code::DeadlineExceeded
            }
            other => return context.violated(format!("dispatch failed: {other}")),
        };
        for part in &flight.parts {
            self.batcher.remove(part.sequence);
            let entry = self.by_sequence.remove(&part.sequence).and_then(|id| self.requests.get_mut(&id));
            let Some(entry) = entry else { continue };
            entry.failed = Some(code);
            if let Some(reader) = entry.reader {
                context.send(reader, Message::Failed(code));
            }
        }
    }

    /// Draws the tokens of a micro-batch that is through all layers.
    fn finish(&mut self, context: &mut Context<'_>, slot: u8) {
        let Some(flight) = self.flights.remove(&slot) else { return };
        let mut rows = flight.rows.chunks_exact(HIDDEN);
        for part in &flight.parts {
            let last = rows.by_ref().take(part.tokens.len()).last().unwrap_or_default();
            let entry = self.by_sequence.get(&part.sequence).and_then(|id| self.requests.get_mut(id));
            let (position, seed) = match &entry {
                Some(entry) => (entry.events.len(), entry.run.sampling.as_ref().and_then(|s| s.seed).unwrap_or(0)),
                None => (0, 0),
            };
            let token = part.draws.then(|| model::draw(last, seed, position));
            let finish = self.batcher.complete(part.sequence, token);
            match (entry, token, finish) {
                (_, _, Some(Finish::Aborted)) | (None, _, _) => {}
                (Some(entry), Some(token), finish) => {
                    let event = event(position, token, finish);
                    entry.events.push(event.clone());
                    if let Some(reader) = entry.reader {
                        context.send(reader, Message::Event(event));
                    }
                    if entry.is_over() {
                        self.by_sequence.remove(&part.sequence);
                    }
                }
                (Some(_), None, _) => {}
            }
        }
    }
}

/// A request without its caller, as those of several coordinators are compared.
fn anonymous(run: &RunRequest) -> RunRequest {
    RunRequest { resume: false, call: 0, ..run.clone() }
}

fn event(position: usize, token: u32, finish: Option<Finish>) -> RunEvent {
    let token = Some(TokenInfo { token, ..Default::default() });
    let finish = finish.map(|_| FinishReason::Length.into());
    RunEvent { position: position as u32, token, prompt: Vec::new(), finish }
}
