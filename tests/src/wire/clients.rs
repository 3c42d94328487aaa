//! Clients of the public API under load: each asks again and again, takes its request to another coordinator when the
//! connection breaks, and compares every token as it comes.

use std::rc::Rc;
use std::time::Duration;

use moesaic_node::{Connector, Peer};
use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::inference_client::InferenceClient;
use moesaic_proto::v1::{FinishReason, GenerateRequest, GenerateResponse, Role, SamplingParams, TokenIds};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status};

use super::arithmetic::{answer, mix};
use super::net;
use super::site::Site;
use super::sse;

/// Requests of a host in flight at a time.
const STREAMS: u64 = 3;
/// Each asks so many more when all is calm: there is progress after the last fault.
const CALM_REQUESTS: u64 = 2;
const TOKENS_MIN: u64 = 20;
const TOKENS_MORE: u64 = 60;
const PROMPT_MAX: u64 = 40;
const CONNECT_MAX: Duration = Duration::from_secs(1);
const KEEPALIVE: Duration = Duration::from_secs(1);
/// Longer than the product may take to find another way for a sequence. A stream that is silent for so long hangs.
pub const SILENCE_MAX: Duration = Duration::from_secs(40);
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Clone)]
pub struct Load {
    /// Coordinators, in the order in which they are tried.
    pub doors: Vec<String>,
    pub seed: u64,
    /// Whether UNAVAILABLE is tried again and not a failure.
    pub is_patient: bool,
}

/// A request and the one answer that it may have.
struct Asked {
    id: String,
    prompt: Vec<u32>,
    seed: u64,
    expected: Vec<u32>,
}

impl Asked {
    fn new(id: String, number: u64) -> Self {
        let prompt: Vec<u32> = (0..1 + number % PROMPT_MAX).map(|i| 3 + (mix(number, i) % 280) as u32).collect();
        let tokens = TOKENS_MIN + mix(number, 1) % TOKENS_MORE;
        let expected = answer(&prompt, number, tokens as usize);
        Self { id, prompt, seed: number, expected }
    }

    fn message(&self, resume_position: Option<u32>) -> GenerateRequest {
        GenerateRequest {
            request_id: self.id.clone(),
            prompt: Some(Prompt::Tokens(TokenIds { ids: self.prompt.clone() })),
            sampling: Some(SamplingParams { temperature: Some(0.0), seed: Some(self.seed), ..Default::default() }),
            max_tokens: Some(self.expected.len() as u32),
            ignore_eos: true,
            resume_position,
            ..Default::default()
        }
    }
}

/// Asks until all is calm, and then some more.
pub async fn run(site: Site, id: String, load: Load) -> turmoil::Result {
    let id: Rc<str> = id.into();
    let warm_up = Asked::new(format!("{id}-warm-up"), mix(load.seed, 0));
    while site.journal.fault().is_none() && stream(&site, &load, &warm_up, 0, &mut Progress::default()).await.is_err() {
        sleep(PAUSE).await;
    }
    let text = sse::first(&site, &load).await;
    site.journal.count("ready", 1);
    let mut streams = JoinSet::new();
    streams.spawn_local(sse::run(site.clone(), load.clone(), text));
    for number in 0..STREAMS {
        streams.spawn_local(one(site.clone(), id.clone(), number, load.clone()));
    }
    streams.join_all().await;
    Ok(())
}

async fn one(site: Site, id: Rc<str>, stream: u64, load: Load) {
    let mut left = CALM_REQUESTS;
    let whose = id.bytes().fold(load.seed, |hash, byte| mix(hash, u64::from(byte)));
    for number in 0.. {
        if site.is_calm.get() {
            if left == 0 {
                return;
            }
            left -= 1;
        }
        let asked = Asked::new(format!("{id}-{stream}-{number}"), mix(whose, mix(stream, number)));
        match ask(&site, &load, &asked, whose.wrapping_add(stream) as usize).await {
            Ok(()) => site.journal.count("done", 1),
            Err(error) => return site.journal.fail(format!("{}: {error}", asked.id)),
        }
    }
}

/// How an attempt ended before the answer did.
pub enum Break {
    /// The connection was refused or broke: the request goes on at another coordinator.
    Gone(String),
    /// The coordinator said so.
    Unavailable(String),
    Failed(String),
}

/// What a client has of an answer.
#[derive(Default)]
struct Progress {
    /// It was sent, and a coordinator may have taken it: from now on it is resumed, not asked anew.
    has_begun: bool,
    tokens: usize,
    last: Option<Instant>,
}

/// One request, to its end.
async fn ask(site: &Site, load: &Load, asked: &Asked, first: usize) -> Result<(), String> {
    let mut progress = Progress::default();
    let mut stuck: Option<Instant> = None;
    for door in first.. {
        let before = progress.tokens;
        let ended = stream(site, load, asked, door, &mut progress).await;
        if progress.tokens > before {
            stuck = None;
        }
        let reason = match ended {
            Ok(()) => return Ok(()),
            Err(Break::Gone(reason)) => reason,
            Err(Break::Unavailable(reason)) if load.is_patient => reason,
            Err(Break::Unavailable(reason) | Break::Failed(reason)) => return Err(reason),
        };
        site.journal.say(format!("{} at {}: {reason}", asked.id, progress.tokens));
        if stuck.get_or_insert_with(Instant::now).elapsed() > SILENCE_MAX {
            return Err(format!("nobody went on with it: {reason}"));
        }
        if progress.has_begun {
            site.journal.count("resumed", 1);
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// One attempt, at one coordinator.
async fn stream(site: &Site, load: &Load, asked: &Asked, door: usize, progress: &mut Progress) -> Result<(), Break> {
    let door = &load.doors[door % load.doors.len()];
    let mut client = InferenceClient::new(connect(&net::connector(), door).await?);
    let message = asked.message(progress.has_begun.then_some(progress.tokens as u32));
    progress.has_begun = true;
    let called = timeout(SILENCE_MAX, client.generate(message)).await.map_err(|_| silent())?;
    let mut parts = called.map_err(|status| broken(&status))?.into_inner();
    loop {
        let part = timeout(SILENCE_MAX, parts.message()).await.map_err(|_| silent())?;
        let Some(part) = part.map_err(|status| broken(&status))? else {
            return Err(Break::Failed("the stream ended without a finish".into()));
        };
        if let Some(last) = progress.last.replace(Instant::now()) {
            site.journal.most("stall_ms", last.elapsed().as_millis() as u64);
        }
        if take(site, asked, &part, progress)? {
            return Ok(());
        }
    }
}

async fn connect(connector: &Connector, door: &str) -> Result<tonic::transport::Channel, Break> {
    let peer = Peer { role: Role::Coordinator, id: None, address: net::address(door) };
    let endpoint = peer
        .endpoint()
        .map_err(|error| Break::Failed(error.to_string()))?
        .connect_timeout(CONNECT_MAX)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE);
    connector.connect(&peer, &endpoint).await.map_err(|error| Break::Gone(error.to_string()))
}

/// True at the end of the answer.
fn take(site: &Site, asked: &Asked, part: &GenerateResponse, progress: &mut Progress) -> Result<bool, Break> {
    for (position, token) in (part.position as usize..).zip(&part.tokens) {
        if position != progress.tokens {
            return Err(Break::Failed(format!("position {position} where {} is next", progress.tokens)));
        }
        let expected = asked.expected.get(position).copied();
        if Some(token.token) != expected {
            return Err(Break::Failed(format!("token {} at {position}; expected {expected:?}", token.token)));
        }
        progress.tokens += 1;
        site.journal.say(format!("{} {position} {}", asked.id, token.token));
    }
    let Some(finish) = &part.finish else { return Ok(false) };
    let is_whole = finish.reason() == FinishReason::Length && progress.tokens == asked.expected.len();
    if is_whole { Ok(true) } else { Err(Break::Failed(format!("{finish:?} after {} tokens", progress.tokens))) }
}

fn silent() -> Break {
    Break::Failed(format!("nothing came for {SILENCE_MAX:?}"))
}

/// A status without a source is the coordinator's own word.
fn broken(status: &Status) -> Break {
    let is_transport = std::error::Error::source(status).is_some() || status.message().contains("h2 protocol error");
    let text = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        _ if is_transport => Break::Gone(text),
        Code::Unavailable => Break::Unavailable(text),
        _ => Break::Failed(text),
    }
}
