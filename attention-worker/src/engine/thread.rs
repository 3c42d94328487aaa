//! The engine's thread: takes commands, keeps micro-batches in flight, draws tokens, sends events.
//!
//! One thread with a runtime of its own. A micro-batch computes while it is polled and gives way where it awaits its
//! experts: then the next one computes. Kernels spread over their own pool.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use moesaic_dispatch::Dispatcher;
use moesaic_kernels::draw;
use moesaic_node::trace::{self, Kind, Span};
use tokio::runtime;
use tokio::sync::{mpsc, oneshot, watch};

use super::arithmetic::{Arithmetic, Asked, Reading};
use super::decoder::{Buffers, Decoder, StepError};
use super::events::{Event, Events, Speaker};
use super::expert_counts::ExpertCounts;
use super::handle::{self, Command, EngineHandle, Inbox, Running, Submit, Token};
use super::profile::{Part as Time, Profile};
use crate::core::batcher::{Batcher, Counts, Finish, Limits, Part, Refused, SequenceId};
use crate::core::sampler::{Sampling, logprobs};

/// Logits in memory at a time, at most: the head's weights are read once for so many.
pub const LOGITS_MAX: usize = 16 << 20;

/// Of the micro-batches with traced sequences those that are traced layer by layer: one in so many, and each that has a
/// sequence's first tokens.
const TRACED_STEPS: u64 = 16;

/// Resolves when the thread has ended, which while there are handles means that it panicked or that its device failed.
pub type Ended = oneshot::Receiver<()>;

/// Starts an engine.
pub fn start<A: Arithmetic + Send + 'static>(
    arithmetic: A,
    dispatcher: Dispatcher,
    limits: Limits,
    profile: Arc<Profile>,
) -> std::io::Result<(EngineHandle, Ended)> {
    let (alive, ended) = oneshot::channel();
    let batcher = Batcher::new(limits);
    let experts = Arc::new(ExpertCounts::new(arithmetic.config()));
    let (handle, Inbox { commands, counts }) = handle::channel(batcher.counts(), experts.clone());
    let runtime = runtime::Builder::new_current_thread().enable_time().build()?;
    thread::Builder::new().name("engine".into()).spawn(move || {
        let decoder = Decoder::new(arithmetic, dispatcher, profile, experts);
        decoder.pin_caller();
        let engine = Engine { decoder: &decoder, batcher, streams: BTreeMap::new(), counts, formed: 0 };
        if let Err(error) = runtime.block_on(engine.run(commands, limits.micro_batches)) {
            tracing::error!(%error, "the device has failed: this worker ends");
        }
        drop(alive);
    })?;
    Ok((handle, ended))
}

struct Engine<'a, A> {
    decoder: &'a Decoder<A>,
    batcher: Batcher,
    streams: BTreeMap<SequenceId, Stream>,
    counts: watch::Sender<Counts>,
    /// Micro-batches so far.
    formed: u64,
}

/// What the engine knows of a sequence beyond its tokens.
struct Stream {
    events: Speaker,
    sampling: Sampling,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    /// Of the prompt's tokens after the first, as far as they have been computed. Empty again once sent.
    prompt: Vec<Token>,
    /// Tokens said, here and elsewhere before.
    said: usize,
    /// The span that it is part of, if it is traced.
    traceparent: Option<Arc<str>>,
}

/// A micro-batch that is back.
struct Landed<A: Arithmetic> {
    slot: Slot<A>,
    parts: Vec<Part>,
    result: Result<(), StepError<A::Failure>>,
}

/// A micro-batch's number and what it is computed in.
struct Slot<A: Arithmetic> {
    number: u8,
    buffers: Buffers<A::Buffers>,
}

impl<A: Arithmetic> Engine<'_, A> {
    /// Until nobody commands any more, or the device fails.
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, micro_batches: usize) -> Result<(), A::Failure> {
        let decoder = self.decoder;
        let slot = |number| -> Result<_, A::Failure> { Ok(Slot::<A> { number, buffers: decoder.buffers()? }) };
        let mut slots: Vec<Slot<A>> = (0..micro_batches as u8).rev().map(slot).collect::<Result<_, _>>()?;
        let mut flights = FuturesUnordered::new();
        loop {
            while let Some(command) = commands.recv().now_or_never() {
                match command {
                    Some(command) => self.on_command(command),
                    None => return Ok(()),
                }
            }
            self.abort_unheard();
            loop {
                // Where nothing is waited for, another micro-batch would only read the weights once more.
                let wanted = if decoder.is_local() { 1 } else { self.batcher.micro_batches() };
                let parts = if flights.len() < wanted { self.batcher.form(wanted) } else { Vec::new() };
                if parts.is_empty() {
                    break;
                }
                let mut slot = slots.pop().expect("as many slots as micro-batches in flight at most");
                let span = self.span(&parts);
                flights.push(async move {
                    let result = decoder.forward(slot.number, &parts, &mut slot.buffers, &span).await;
                    Landed { slot, parts, result }
                });
            }
            self.counts.send_replace(self.batcher.counts());
            tokio::select! {
                Some(landed) = flights.next() => {
                    slots.push(self.land(landed)?);
                }
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => return Ok(()),
                },
            }
        }
    }

    /// A micro-batch's span: part of that of a sequence in it, if any is traced.
    fn span(&mut self, parts: &[Part]) -> Span {
        self.formed += 1;
        let is_due = self.formed.is_multiple_of(TRACED_STEPS);
        let mut due = parts.iter().filter(|part| is_due || part.start == 0);
        let Some(parent) = due.find_map(|part| self.streams.get(&part.sequence)?.traceparent.as_deref()) else {
            return Span::default();
        };
        let mut span = trace::part(Kind::Internal, "step", parent);
        span.set("moesaic.sequences", parts.len() as i64);
        span.set("moesaic.rows", parts.iter().map(|part| part.tokens.len() as i64).sum::<i64>());
        span
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Submit(submit, reply) => {
                // Who does not wait for the answer has dropped the sequence too: noticed at the next step.
                let _ = reply.send(self.submit(*submit));
            }
            Command::Abort(id) => self.abort(id),
        }
    }

    fn submit(&mut self, submit: Submit) -> Result<Running, Refused> {
        let Submit { request, emitted, sampling, logprobs, prompt_logprobs, traceparent } = submit;
        let id = self.batcher.submit(request)?;
        let (events, said) = (Arc::new(Events::default()), emitted.len());
        for (index, token) in emitted.into_iter().enumerate() {
            events.push(Event::Token { index, token, prompt: Vec::new(), finish: None });
        }
        let reader = events.reader(said);
        let (events, prompt) = (Speaker(events), Vec::new());
        let stream = Stream { events, sampling, logprobs, prompt_logprobs, prompt, said, traceparent };
        self.streams.insert(id, stream);
        Ok(Running { id, events: reader })
    }

    fn abort(&mut self, id: SequenceId) {
        if self.batcher.abort(id) {
            self.end(id, Event::Aborted);
        }
    }

    /// Nobody reads these any more.
    fn abort_unheard(&mut self) {
        let is_unheard = |(id, stream): (&SequenceId, &Stream)| stream.events.is_unheard().then_some(*id);
        let unheard: Vec<SequenceId> = self.streams.iter().filter_map(is_unheard).collect();
        for id in unheard {
            self.abort(id);
        }
    }

    /// Says the last word of a sequence, whose pages the batcher has taken back: who hears it sees them free.
    fn end(&mut self, id: SequenceId, last: Event) {
        self.counts.send_replace(self.batcher.counts());
        if let Some(stream) = self.streams.remove(&id) {
            stream.events.0.push(last);
        }
    }

    fn land(&mut self, landed: Landed<A>) -> Result<Slot<A>, A::Failure> {
        let Landed { mut slot, parts, result } = landed;
        match result {
            Ok(()) => {
                let drawn = self.read(&parts, &mut slot.buffers)?;
                for (part, token) in parts.iter().zip(drawn) {
                    self.advance(part.sequence, token);
                }
            }
            Err(StepError::Device(failure)) => return Err(failure),
            Err(StepError::Experts(error)) => {
                tracing::warn!(%error, sequences = parts.len(), "a micro-batch failed");
                for part in &parts {
                    self.batcher.remove(part.sequence);
                    self.end(part.sequence, Event::Failed(error.clone()));
                }
            }
        }
        Ok(slot)
    }

    /// Reads the rows that somebody needs, a few at a time, and says which token each part draws.
    fn read(&mut self, parts: &[Part], b: &mut Buffers<A::Buffers>) -> Result<Vec<Option<Token>>, A::Failure> {
        let mut drawn: Vec<Option<Token>> = vec![None; parts.len()];
        let wanted = self.wanted(parts);
        let vocab = self.decoder.config().vocab_size;
        for block in wanted.chunks((LOGITS_MAX / vocab).max(1)) {
            let asked: Vec<Asked> = block.iter().map(|want| self.asked(parts[want.part].sequence, want)).collect();
            let Reading { tokens, logits } = self.decoder.read(&asked, b)?;
            let (profile, mut logits) = (self.decoder.profile(), logits.chunks_exact(vocab));
            for ((want, asked), read) in block.iter().zip(&asked).zip(tokens) {
                if let Some(token) = read {
                    drawn[want.part] = Some(Token { token, logprobs: None });
                    continue;
                }
                let id = parts[want.part].sequence;
                let (prompt, _) = self.batcher.tokens(id).expect("a sequence in flight is not removed");
                let stream = self.streams.get_mut(&id).expect("a sequence has a stream until it ends");
                let logits = logits.next().expect("a row without a token has logits");
                if let Some(index) = want.prompt {
                    stream.prompt.push(token(logits, prompt[index], stream.prompt_logprobs));
                }
                if let Some(how) = &asked.draw {
                    let draw = || token(logits, draw(logits, how), stream.logprobs);
                    drawn[want.part] = Some(profile.time(Time::Sampling, draw));
                }
            }
        }
        Ok(drawn)
    }

    fn asked(&self, id: SequenceId, want: &Want) -> Asked {
        let (prompt, generated) = self.batcher.tokens(id).expect("a sequence in flight is not removed");
        let stream = self.streams.get(&id).expect("a sequence has a stream until it ends");
        let draw = want.prompt.is_none().then(|| stream.sampling.draw(prompt, generated));
        Asked { row: want.row, logits: draw.is_none() || stream.logprobs.is_some(), draw }
    }

    /// Rows whose logits are needed: where a token is drawn, and prompt rows whose log-probabilities were asked for and
    /// have not been computed (before a preemption, that is).
    fn wanted(&self, parts: &[Part]) -> Vec<Want> {
        let mut wanted = Vec::new();
        let mut first = 0;
        for (index, part) in parts.iter().enumerate() {
            let end = part.start + part.tokens.len();
            if let Some(stream) = self.streams.get(&part.sequence).filter(|_| !self.batcher.is_aborted(part.sequence)) {
                let (prompt, _) = self.batcher.tokens(part.sequence).expect("a sequence in flight is not removed");
                if stream.prompt_logprobs.is_some() && stream.said == 0 {
                    for position in part.start.max(stream.prompt.len())..end.min(prompt.len() - 1) {
                        let row = first + position - part.start;
                        wanted.push(Want { part: index, row, prompt: Some(position + 1) });
                    }
                }
                if part.draws {
                    wanted.push(Want { part: index, row: first + part.tokens.len() - 1, prompt: None });
                }
            }
            first += part.tokens.len();
        }
        wanted
    }

    fn advance(&mut self, id: SequenceId, token: Option<Token>) {
        let finish = self.batcher.complete(id, token.as_ref().map(|token| token.token));
        if finish == Some(Finish::Aborted) {
            return self.end(id, Event::Aborted);
        }
        let Some(token) = token else { return };
        self.decoder.profile().count_token();
        let stream = self.streams.get_mut(&id).expect("a sequence has a stream until it ends");
        let (index, prompt) = (stream.said, std::mem::take(&mut stream.prompt));
        stream.said += 1;
        let event = Event::Token { index, token, prompt, finish };
        match finish {
            None => stream.events.0.push(event),
            Some(_) => self.end(id, event),
        }
    }
}

/// A row of a micro-batch whose logits are needed.
struct Want {
    part: usize,
    row: usize,
    /// For this token of the prompt; `None`: to draw the next one.
    prompt: Option<usize>,
}

fn token(logits: &[f32], token: u32, alternatives: Option<usize>) -> Token {
    Token { token, logprobs: alternatives.map(|count| logprobs(logits, token, count)) }
}
