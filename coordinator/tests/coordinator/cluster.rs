//! A coordinator on a real port, with attention workers that say what a test wants. The text is tiny-r1's, the tokens
//! are a script.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt, stream};
use moesaic_coordinator::text::Tokenizer;
use moesaic_coordinator::{Config, Context, Coordinator};
use moesaic_node::{Member, MemberSettings, Registration, Registry, handshake, registry, server};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::attention_worker_server::{AttentionWorker, AttentionWorkerServer};
use moesaic_proto::v1::{
    AbortCallRequest, AbortResponse, EdgeStatus, ExpertLoadRequest, ExpertLoadResponse, FinishReason, LoadRequest,
    LoadResponse, Role, RunEvent, RunRequest, TokenInfo, TopLogprob,
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

pub const FINGERPRINT: &str = "0123456789abcdef0123456789abcdef";
pub const EOS: u32 = 1;
/// Pages of the fake workers' caches, of 64 tokens each.
pub const PAGES: u32 = 32;

pub fn model_dir() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/moesaic/models/tiny-r1")
}

pub fn ids(text: &str) -> Vec<u32> {
    Tokenizer::open(&model_dir()).unwrap().encode(text, false).unwrap()
}

/// What a fake worker answers to every request.
#[derive(Clone, Default)]
pub struct Script {
    pub tokens: Vec<u32>,
    /// Before each token.
    pub pause: Duration,
    /// After the tokens: the first one again and again, until the request's own end.
    pub endless: bool,
    pub refusal: Option<Status>,
    /// Runs every sequence for somebody else, and finds none the first time that it is asked.
    pub is_running_it: bool,
    /// Takes calls and does not answer them.
    pub hangs: bool,
    /// In place of the token at this position.
    pub failure: Option<(usize, Status)>,
    /// Says each token twice, or leaves the one at this position out.
    pub stutters: bool,
    pub skips: Option<u32>,
    /// Whether it has every sequence that somebody wants to resume.
    pub resumes: bool,
}

impl Script {
    /// Says the text and ends.
    pub fn says(text: &str) -> Self {
        Self { tokens: ids(text).into_iter().chain([EOS]).collect(), ..Self::default() }
    }

    pub fn endless() -> Self {
        Self { tokens: ids("a"), endless: true, pause: Duration::from_millis(5), ..Self::default() }
    }
}

#[derive(Default)]
pub struct Fake {
    script: Mutex<Script>,
    pub reachable: AtomicBool,
    pub running: AtomicUsize,
    pub requests: Mutex<Vec<RunRequest>>,
    /// What it says of its ways to expert workers.
    pub edges: Mutex<Vec<EdgeStatus>>,
    /// Ids that were to be forgotten, by the call that reads them.
    pub aborted: Mutex<Vec<String>>,
}

impl Fake {
    pub fn set_script(&self, script: Script) {
        *self.script.lock().unwrap() = script;
    }
}

struct RunningGuard(Arc<Fake>);

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

fn scripted(run: &RunRequest, script: &Script) -> Vec<RunEvent> {
    let mut tokens = script.tokens.clone();
    if script.endless {
        tokens.resize(run.max_tokens as usize, tokens[0]);
    }
    tokens.truncate(run.max_tokens as usize);
    let info = |id: u32, wanted: Option<u32>| TokenInfo {
        token: id,
        logprob: wanted.map(|_| -0.25),
        top: (0..wanted.unwrap_or(0)).map(|i| TopLogprob { token: id + i, logprob: -0.25 - i as f32 }).collect(),
    };
    let mut events = Vec::new();
    for (position, id) in tokens.iter().copied().enumerate() {
        let stops = run.stop_token_ids.contains(&id);
        let full = position + 1 == run.max_tokens as usize;
        let finish = match (stops, full) {
            (true, _) => Some(FinishReason::Stop.into()),
            (false, true) => Some(FinishReason::Length.into()),
            _ => None,
        };
        let prompt = run.prompt_logprobs.filter(|_| position == 0);
        events.push(RunEvent {
            position: position as u32,
            token: Some(info(id, run.logprobs)),
            prompt: prompt.map_or_else(Vec::new, |n| run.prompt[1..].iter().map(|p| info(*p, Some(n))).collect()),
            finish,
        });
        if finish.is_some() {
            break;
        }
    }
    // What another worker has said is not said again.
    events.drain(..run.emitted.len().min(events.len()));
    events.retain(|event| Some(event.position) != script.skips);
    if script.stutters {
        events = events.into_iter().flat_map(|event| [event.clone(), event]).collect();
    }
    events
}

#[tonic::async_trait]
impl AttentionWorker for Shared {
    type RunStream = Pin<Box<dyn Stream<Item = Result<RunEvent, Status>> + Send>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let (run, script) = (request.into_inner(), self.0.script.lock().unwrap().clone());
        self.0.requests.lock().unwrap().push(run.clone());
        if let Some(refusal) = script.refusal {
            return Err(refusal);
        }
        if script.is_running_it && !run.resume {
            return Err(Status::already_exists("it is running"));
        }
        if script.is_running_it && self.0.requests.lock().unwrap().len() == 1 {
            return Err(Status::not_found("nothing to resume"));
        }
        if script.hangs {
            std::future::pending::<()>().await;
        }
        if run.resume && !script.resumes {
            return Err(Status::not_found("nothing to resume"));
        }
        self.0.running.fetch_add(1, Ordering::SeqCst);
        let guard = RunningGuard(self.0.clone());
        let events = stream::iter(scripted(&run, &script)).then(move |event| {
            let (pause, failure, i) = (script.pause, script.failure.clone(), event.position as usize);
            async move {
                tokio::time::sleep(pause).await;
                match failure {
                    Some((at, status)) if at == i => Err(status),
                    _ => Ok(event),
                }
            }
        });
        let events = events.map(move |event| {
            let _held_with_the_stream = &guard;
            event
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn abort(&self, request: Request<AbortCallRequest>) -> Result<Response<AbortResponse>, Status> {
        let AbortCallRequest { request_id, call } = request.into_inner();
        let reads = |run: &RunRequest| (&run.request_id, run.call) == (&request_id, call);
        let aborted = self.0.requests.lock().unwrap().iter().any(reads);
        if aborted {
            self.0.aborted.lock().unwrap().push(request_id);
        }
        Ok(Response::new(AbortResponse { aborted }))
    }

    async fn expert_load(&self, _: Request<ExpertLoadRequest>) -> Result<Response<ExpertLoadResponse>, Status> {
        Ok(Response::new(ExpertLoadResponse::default()))
    }

    async fn load(&self, _: Request<LoadRequest>) -> Result<Response<LoadResponse>, Status> {
        Ok(Response::new(LoadResponse {
            pages_total: PAGES,
            pages_free: PAGES,
            page_tokens: 64,
            experts_reachable: self.0.reachable.load(Ordering::SeqCst),
            edges: self.0.edges.lock().unwrap().clone(),
            ..LoadResponse::default()
        }))
    }
}

#[derive(Clone)]
struct Shared(Arc<Fake>);

pub struct Cluster {
    pub url: String,
    pub registry: Arc<dyn Registry>,
    pub workers: Vec<Arc<Fake>>,
    pub client: reqwest::Client,
    pub stop: CancellationToken,
    pub serving: tokio::task::JoinHandle<anyhow::Result<()>>,
    registrations: Vec<Registration>,
}

pub fn config() -> Config {
    Config {
        model: Some(model_dir()),
        listen: ([127, 0, 0, 1], 0).into(),
        member: MemberSettings { registry: "embedded".into(), ..MemberSettings::default() },
        expert_workers: 2,
        replicas: 1,
        drain_seconds: 2,
        ..Config::default()
    }
}

impl Cluster {
    /// One worker with that script, ready.
    pub async fn new(script: Script) -> Self {
        let mut cluster = Self::start(config()).await;
        cluster.add_worker("a-0", FINGERPRINT, script).await;
        cluster.until_health(200).await;
        cluster
    }

    /// No workers yet.
    pub async fn start(config: Config) -> Self {
        let registry = registry::embedded();
        let coordinator = Coordinator::bind(config, Context { membership: registry.clone().into() }).unwrap();
        let url = format!("http://{}", coordinator.address());
        let stop = CancellationToken::new();
        let serving = tokio::spawn(coordinator.serve(stop.clone()));
        let client = reqwest::Client::new();
        Self { url, registry, workers: Vec::new(), client, stop, serving, registrations: Vec::new() }
    }

    pub async fn add_worker(&mut self, id: &str, fingerprint: &str, script: Script) {
        let fake = Arc::new(Fake { script: Mutex::new(script), reachable: true.into(), ..Fake::default() });
        let bound = server::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let address = bound.address().to_string();
        let routes = tonic::service::Routes::new(AttentionWorkerServer::new(Shared(fake.clone())));
        tokio::spawn(bound.serve(routes, None, CancellationToken::new(), Duration::ZERO));
        self.workers.push(fake);
        self.register(Role::AttentionWorker, id, fingerprint, &address).await;
    }

    pub async fn register(&mut self, role: Role, id: &str, fingerprint: &str, address: &str) {
        let id = WorkerId::new(id).unwrap();
        let hello = handshake::hello("moesaic", role, &id, fingerprint, "f32");
        let member = Member::new(hello, id, address.to_owned(), None);
        self.registrations.push(self.registry.register(member).await.unwrap());
    }

    pub fn set_script(&self, script: Script) {
        self.workers[0].set_script(script);
    }

    /// Sequences that run on the workers.
    pub fn running(&self) -> usize {
        self.workers.iter().map(|worker| worker.running.load(Ordering::SeqCst)).sum()
    }

    pub fn last_run(&self) -> RunRequest {
        self.workers[0].requests.lock().unwrap().last().unwrap().clone()
    }

    pub async fn until_health(&self, status: u16) {
        let start = Instant::now();
        loop {
            let now = self.get("/health").await.0;
            if now == status {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "health stays {now}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn send(&self, path: &str, body: impl ToString) -> reqwest::Response {
        let request = self.client.post(format!("{}{path}", self.url));
        request.header("content-type", "application/json").body(body.to_string()).send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let response = self.send(path, body).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// The chunks of a stream, and whether it ended with `[DONE]`.
    pub async fn stream(&self, path: &str, mut body: Value) -> (Vec<Value>, bool) {
        body["stream"] = true.into();
        let response = self.send(path, body).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let done = data.pop_if(|last| *last == "[DONE]").is_some();
        (data.into_iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect(), done)
    }
}

/// Waits until the condition holds; fails after the bound.
pub async fn until(what: &str, bound: Duration, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < bound, "not within {bound:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn user(text: &str) -> Value {
    serde_json::json!([{"role": "user", "content": text}])
}
