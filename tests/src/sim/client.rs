//! A client: asks for one completion after the other, goes on with it on another coordinator when its stream ends early,
//! and holds every token against the model's own.

use std::time::Duration;

use moesaic_coordinator::core::ApiError;

use super::messages::{Generate, Message};
use super::model;
use super::net::{Context, Input, Node, StreamId};

const RETRY: Duration = Duration::from_millis(100);
/// A client that hears nothing for so long tries elsewhere.
const PATIENCE: Duration = Duration::from_secs(8);

/// See the module.
pub struct Client {
    /// Tells its requests from those of others, and of its own former lives.
    name: String,
    coordinators: u8,
    rng: fastrand::Rng,
    prompt_max: usize,
    tokens_max: usize,
    /// No new request is begun.
    pub is_ending: bool,
    request: Option<Wanted>,
    pub completed: usize,
    pub tokens: usize,
    pub resumed: usize,
}

struct Wanted {
    generate: Generate,
    golden: Vec<u32>,
    received: usize,
    stream: Option<StreamId>,
    coordinator: u8,
    heard: Duration,
}

impl Client {
    pub fn new(name: String, coordinators: u8, seed: u64, prompt_max: usize, tokens_max: usize) -> Self {
        Self {
            name,
            coordinators,
            rng: fastrand::Rng::with_seed(seed),
            prompt_max,
            tokens_max,
            is_ending: false,
            request: None,
            completed: 0,
            tokens: 0,
            resumed: 0,
        }
    }

    pub fn is_done(&self) -> bool {
        self.is_ending && self.request.is_none()
    }

    /// What it waits for, for people.
    pub fn waits_for(&self) -> Option<String> {
        let wanted = self.request.as_ref()?;
        let Wanted { generate, received, coordinator, .. } = wanted;
        Some(format!("{}: {received} of {} tokens, from c{coordinator}", generate.request_id, generate.tokens))
    }

    pub fn on(&mut self, context: &mut Context<'_>, input: Input) {
        match input {
            Input::Started => context.wake(Duration::from_millis(self.rng.u64(0..500)), "next", 0),
            Input::Timer(timer) if timer.0 == "next" => self.next(context),
            Input::Timer(timer) if timer.0 == "impatient" => self.look(context, StreamId(timer.1)),
            Input::Timer(_) => self.ask(context),
            Input::Broken { stream } => self.lose(context, stream),
            Input::Message { stream, message } => {
                if self.request.as_ref().is_some_and(|wanted| wanted.stream == Some(stream)) {
                    self.on_message(context, stream, message);
                }
            }
        }
    }

    fn next(&mut self, context: &mut Context<'_>) {
        if self.is_ending || self.request.is_some() {
            return;
        }
        let rng = &mut self.rng;
        let prompt: Vec<u32> = (0..rng.usize(1..=self.prompt_max)).map(|_| rng.u32(0..50_000)).collect();
        let (seed, tokens) = (rng.u64(..), rng.usize(1..=self.tokens_max));
        let golden = model::golden(&prompt, seed, tokens);
        let request_id = format!("{}-{}", self.name, self.completed);
        let generate = Generate { request_id, prompt, seed, tokens, known: None };
        let coordinator = rng.u8(0..self.coordinators);
        let heard = context.now;
        self.request = Some(Wanted { generate, golden, received: 0, stream: None, coordinator, heard });
        self.ask(context);
    }

    fn ask(&mut self, context: &mut Context<'_>) {
        let Some(wanted) = self.request.as_mut().filter(|wanted| wanted.stream.is_none()) else { return };
        let generate = Message::Generate(Box::new(wanted.generate.clone()));
        let stream = context.open(Node::Coordinator(wanted.coordinator), generate);
        (wanted.stream, wanted.heard) = (Some(stream), context.now);
        context.wake(PATIENCE, "impatient", stream.0);
    }

    /// Gives up a stream over which nothing comes.
    fn look(&mut self, context: &mut Context<'_>, stream: StreamId) {
        let Some(wanted) = self.request.as_ref().filter(|wanted| wanted.stream == Some(stream)) else { return };
        let rest = (wanted.heard + PATIENCE).saturating_sub(context.now);
        if !rest.is_zero() {
            return context.wake(rest, "impatient", stream.0);
        }
        context.close(stream);
        self.lose(context, stream);
    }

    /// The stream has ended early: another coordinator is asked for the rest.
    fn lose(&mut self, context: &mut Context<'_>, stream: StreamId) {
        let Some(wanted) = self.request.as_mut().filter(|wanted| wanted.stream == Some(stream)) else { return };
        wanted.stream = None;
        wanted.generate.known = Some(wanted.received);
        wanted.coordinator = self.rng.u8(0..self.coordinators);
        self.resumed += 1;
        context.wake(RETRY, "ask", 0);
    }

    fn on_message(&mut self, context: &mut Context<'_>, stream: StreamId, message: Message) {
        let Some(wanted) = &mut self.request else { return };
        wanted.heard = context.now;
        match message {
            Message::Token { position, token, is_last } => {
                let id = &wanted.generate.request_id;
                // The last word says so even if its token is known.
                let is_known = is_last && position + 1 == wanted.received;
                if position != wanted.received && !is_known {
                    context.violated(format!("{id}: position {position} after {} tokens", wanted.received));
                }
                if wanted.golden.get(position) != Some(&token) {
                    let expected = wanted.golden.get(position);
                    context.violated(format!("{id}: token {token} at {position}; expected {expected:?}"));
                }
                wanted.received = position + 1;
                if is_last {
                    if wanted.received != wanted.golden.len() {
                        context.violated(format!("{id}: ended after {} of {}", wanted.received, wanted.golden.len()));
                    }
                    self.completed += 1;
                    self.tokens += wanted.received;
                    self.request = None;
                    context.close(stream);
                    context.wake(Duration::from_millis(self.rng.u64(0..300)), "next", 0);
                }
            }
            // Reasons that pass.
            Message::Error(ApiError::Unavailable { .. } | ApiError::Full { .. } | ApiError::Exists { .. }) => {
                self.lose(context, stream);
            }
            Message::Error(error) => {
                context.violated(format!("{} was lost: {error}", wanted.generate.request_id));
                self.request = None;
            }
            other => context.violated(format!("a client was told {other:?}")),
        }
    }
}
