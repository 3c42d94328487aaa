//! One request's way, the same for both front doors: admit, tokenise, check, run. Owns what is shared by all requests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use moesaic_node::trace;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::figures::Figures;
use super::generation::{Generation, Watched, attempt};
use super::seats::Seats;
use super::workers::Workers;
use crate::core::error::shortened;
use crate::core::journal::Journal;
use crate::core::keys::{Account, Place};
use crate::core::request::{check_request_id, choice_seed};
use crate::core::{Admission, ApiError, Output, Params, Request};
use crate::model::Model;
use crate::text::template::Message;
use crate::text::{ChatTemplate, ReasoningSplitter, Tokenizer};

/// Longer texts are tokenised away from the threads that serve connections, so many at a time: about 1 ms each here.
const INLINE_BYTES_MAX: usize = 4 << 10;
const TOKENISING_MAX: usize = 2;
/// A stream that its client has left for a new one is gone by then.
const SUPERSEDED_MAX: Duration = Duration::from_secs(2);
const SUPERSEDED_POLL: Duration = Duration::from_millis(5);

pub struct Service {
    pub model: Model,
    pub tokenizer: Arc<Tokenizer>,
    pub workers: Arc<Workers>,
    pub figures: Figures,
    pub seats: Arc<Seats>,
    template: Option<ChatTemplate>,
    requests: Mutex<Requests>,
    started: Instant,
    tokenising: Semaphore,
    stopping: AtomicBool,
}

struct Requests {
    admission: Admission,
    running: HashMap<String, Signals>,
}

/// What a running request may be told, and by whom.
#[derive(Clone, Default)]
struct Signals {
    /// Whose it is, where there are keys.
    owner: Option<String>,
    abort: CancellationToken,
    /// The client goes on on another stream: this one ends, and leaves what it runs.
    superseded: CancellationToken,
}

/// Who asks.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// Whose key it came with, where there are keys.
    pub account: Option<Arc<Account>>,
    /// The caller's span, if it named one.
    traceparent: Option<String>,
}

impl Client {
    pub fn of(extensions: &http::Extensions, headers: &HeaderMap) -> Self {
        let traceparent = headers.get(trace::HEADER).and_then(|value| value.to_str().ok());
        Self { account: extensions.get().cloned(), traceparent: traceparent.map(str::to_owned) }
    }

    /// The name of its key.
    pub fn name(&self) -> Option<&str> {
        self.account.as_ref().map(|account| account.name.as_str())
    }
}

/// A request's permit: held by everything that runs for it; its place is free when the last one drops it.
pub struct Ticket {
    service: Arc<Service>,
    request_id: String,
    signals: Signals,
    /// Among the requests of its key.
    place: Option<Place>,
    /// The client's span, if it named one.
    traceparent: Option<String>,
}

impl Ticket {
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// Counts tokens that were read or made for the request against its key.
    pub(super) fn charge(&self, tokens: usize) {
        if let Some(place) = &self.place {
            place.charge(tokens);
        }
    }

    /// The name of the key that it came with; empty where there are none.
    fn owner(&self) -> &str {
        self.signals.owner.as_deref().unwrap_or_default()
    }

    pub(super) fn figures(&self) -> &Figures {
        &self.service.figures
    }

    pub(super) async fn aborted(&self) {
        tokio::select! {
            () = self.signals.abort.cancelled() => {}
            () = self.signals.superseded.cancelled() => {}
        }
    }

    /// Whether what this request runs is left to whom its client goes on with: another stream, or another coordinator.
    pub(super) fn leaves_its_sequences(&self) -> bool {
        self.signals.superseded.is_cancelled() || self.service.stopping.load(Ordering::Relaxed)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let now_ms = self.service.now_ms();
        let mut requests = self.service.lock();
        requests.running.remove(&self.request_id);
        requests.admission.release(&self.request_id, now_ms);
    }
}

/// A conversation as tokens.
pub struct ChatPrompt {
    pub tokens: Vec<u32>,
    /// The template has opened the reasoning already.
    pub reasoning_opened: bool,
}

impl Service {
    pub fn new(
        model: Model,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        workers: Arc<Workers>,
        sequences_max: usize,
    ) -> Self {
        let requests = Requests { admission: Admission::new(sequences_max), running: HashMap::new() };
        Self {
            model,
            tokenizer: Arc::new(tokenizer),
            workers,
            figures: Figures::default(),
            seats: Arc::default(),
            template,
            requests: Mutex::new(requests),
            started: Instant::now(),
            tokenising: Semaphore::new(TOKENISING_MAX),
            stopping: AtomicBool::new(false),
        }
    }

    /// Lets a request in, with so many sequences.
    pub fn admit(
        self: &Arc<Self>,
        client: Client,
        request_id: String,
        sequences: usize,
    ) -> Result<Arc<Ticket>, ApiError> {
        let admitted = self.try_admit(client, request_id, sequences);
        self.figures.asked(&admitted);
        admitted
    }

    fn try_admit(
        self: &Arc<Self>,
        Client { account, traceparent }: Client,
        request_id: String,
        sequences: usize,
    ) -> Result<Arc<Ticket>, ApiError> {
        check_request_id(&request_id)?;
        if let Some(reason) = self.workers.not_ready().borrow().clone() {
            return Err(ApiError::Unavailable { reason });
        }
        let place = account.as_ref().map(|account| account.admit(sequences as u32, self.now_ms())).transpose()?;
        let signals = Signals { owner: account.map(|account| account.name.clone()), ..Signals::default() };
        let mut requests = self.lock();
        requests.admission.admit(&request_id, sequences)?;
        requests.running.insert(request_id.clone(), signals.clone());
        drop(requests);
        Ok(Arc::new(Ticket { service: self.clone(), request_id, signals, place, traceparent }))
    }

    /// The same for a client that goes on with a request: a stream of it that is still here ends.
    pub async fn admit_again(
        self: &Arc<Self>,
        client: Client,
        request_id: String,
        sequences: usize,
    ) -> Result<Arc<Ticket>, ApiError> {
        check_request_id(&request_id)?;
        if let Some(before) = self.running(client.name(), &request_id) {
            before.superseded.cancel();
            let gone = async {
                while self.lock().running.contains_key(&request_id) {
                    tokio::time::sleep(SUPERSEDED_POLL).await;
                }
            };
            // Whoever does not read cannot be told to go: then the id is refused as in use.
            let _ = tokio::time::timeout(SUPERSEDED_MAX, gone).await;
        }
        self.admit(client, request_id, sequences)
    }

    /// From now on streams that are cut go on on other coordinators.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Ends a running request of `owner`; false if there is none of that id.
    pub fn abort(&self, owner: Option<&str>, request_id: &str) -> bool {
        self.running(owner, request_id).inspect(|signals| signals.abort.cancel()).is_some()
    }

    /// One key's requests are nobody else's; without a key all are in reach.
    fn running(&self, owner: Option<&str>, request_id: &str) -> Option<Signals> {
        let signals = self.lock().running.get(request_id).cloned();
        signals.filter(|signals| owner.is_none() || signals.owner.as_deref() == owner)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Sequences that run or wait.
    pub fn sequences(&self) -> usize {
        self.lock().admission.sequences()
    }

    pub fn check_model(&self, name: &str) -> Result<(), ApiError> {
        if name.is_empty() || name == self.model.name {
            return Ok(());
        }
        Err(ApiError::UnknownModel { name: shortened(name), served: self.model.name.clone() })
    }

    /// The sequence for a prompt, checked against the model and the largest cache.
    pub fn request(&self, params: &Params, prompt: Vec<u32>) -> Result<Request, ApiError> {
        params.request(prompt, &self.model, self.workers.capacity_max())
    }

    /// Runs one sequence of a request. `sequence` counts them, `choice` those of the same prompt. `known`: the client has
    /// so many of its tokens from an earlier stream. Then the sequence is taken over where it still runs, and made again
    /// where it does not: from the same request come the same tokens.
    pub async fn generate(
        &self,
        ticket: Arc<Ticket>,
        request: Request,
        seed: u64,
        (sequence, choice): (u32, u32),
        known: Option<u32>,
    ) -> Result<Generation, ApiError> {
        if choice == 0 {
            ticket.charge(request.prompt.len());
        }
        self.figures.started(request.prompt.len(), known.is_some());
        let output = Output::new(&request, self.tokenizer.clone());
        let request_id = match sequence {
            0 => ticket.request_id.clone(),
            _ => format!("{}-{sequence}", ticket.request_id),
        };
        let mut span = trace::root("generate", ticket.traceparent.as_deref());
        span.set("moesaic.request_id", request_id.clone());
        span.set("gen_ai.request.model", self.model.name.clone());
        span.set("gen_ai.usage.input_tokens", request.prompt.len() as i64);
        let seat = self.seats.take(&request_id, ticket.owner(), request.prompt.len());
        let (mut attempt, run) = attempt(&span, request.into_run(request_id, choice_seed(seed, choice)));
        let resume = async || match known {
            Some(_) => self.workers.resume(run.clone()).await,
            None => None,
        };
        let placed = async {
            if let Some(call) = resume().await {
                return Ok(call);
            }
            let retry_after_s = self.lock().admission.retry_after_s();
            match self.workers.start(run.clone(), retry_after_s, &[]).await {
                // It runs on a worker that did not answer in time before.
                Err(ApiError::Exists { request_id }) => resume().await.ok_or(ApiError::Exists { request_id }),
                started => started,
            }
        };
        // A worker that is cut off is given up only after seconds: nobody waits so long for the request's id.
        let call = tokio::select! {
            biased;
            () = ticket.aborted() => {
                let reason = "the request was aborted, or goes on on another stream".into();
                return Err(ApiError::Unavailable { reason });
            }
            call = placed => call.inspect_err(|error| span.fail(error))?,
        };
        seat.placed(&call.place.worker);
        attempt.set("moesaic.worker", call.place.worker.as_str().to_owned());
        let known = known.unwrap_or(0);
        Ok(Generation::new(call, Journal::new(run), output, ticket, Watched { seat, span, attempt }, known))
    }

    /// A text's tokens.
    pub async fn tokenize(&self, text: String, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let (least, context) = (self.tokenizer.tokens_min(text.len()), self.model.context_max);
        if least > context {
            return Err(ApiError::TextLength { context, least });
        }
        let encode = |tokenizer: &Tokenizer| {
            tokenizer.encode(&text, add_special).map_err(|e| ApiError::invalid("prompt", e.to_string()))
        };
        if text.len() <= INLINE_BYTES_MAX {
            return encode(&self.tokenizer);
        }
        let failed = |reason: String| ApiError::Failed { reason };
        let _turn = self.tokenising.acquire().await.map_err(|e| failed(e.to_string()))?;
        let (tokenizer, text) = (self.tokenizer.clone(), text.clone());
        let encoded = tokio::task::spawn_blocking(move || tokenizer.encode(&text, add_special)).await;
        encoded.map_err(|e| failed(e.to_string()))?.map_err(|e| ApiError::invalid("prompt", e.to_string()))
    }

    /// A conversation's tokens. Special tokens written out in a message are refused: as text they would be the
    /// template's own markup, and a user could speak as the assistant.
    pub async fn tokenize_chat(
        &self,
        messages: &[Message],
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<ChatPrompt, ApiError> {
        let Some(template) = &self.template else {
            return Err(ApiError::invalid("messages", "this model has no chat template; use /v1/completions"));
        };
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "is empty; expected at least 1 message"));
        }
        for (i, message) in messages.iter().enumerate() {
            if let Some(token) = self.tokenizer.find_special(&message.content) {
                let reason = format!("has the special token {token:?}, which only the chat template may write");
                return Err(ApiError::invalid(format!("messages[{i}].content"), reason));
            }
        }
        let prompt = template.render(messages, variables).map_err(|e| ApiError::invalid("messages", e.to_string()))?;
        let reasoning_opened = ReasoningSplitter::opened_by(&prompt);
        Ok(ChatPrompt { tokens: self.tokenize(prompt, false).await?, reasoning_opened })
    }

    fn lock(&self) -> MutexGuard<'_, Requests> {
        // Nothing panics while it is held; if it did, the counts would still be whole.
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name for a request that has none, and a seed for one that has none.
pub fn draw_id(prefix: &str) -> String {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple())
}

pub fn draw_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1
}
