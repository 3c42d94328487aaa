//! A whole worker over gRPC, with its registry and its expert workers in this process.

use std::sync::Arc;
use std::time::Duration;

use moesaic_attention_worker::{Config, Context, run};
use moesaic_kernels::{Backend, Dtype, Numerics, Pool};
use moesaic_model::Checkpoint;
use moesaic_node::registry::embedded;
use moesaic_node::{Member, MemberSettings, Registration, Registry, handshake};
use moesaic_proto::v1::attention_worker_client::AttentionWorkerClient;
use moesaic_proto::v1::{
    AbortCallRequest, FinishReason, Hello, LoadRequest, LoadResponse, Role, RunEvent, RunRequest, SamplingParams,
};
use moesaic_proto::{Epoch, WorkerId};
use moesaic_worker::WorkerSettings;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::harness::{self, LIMITS, Model, fixture, greedy};

struct Worker {
    registry: Arc<dyn Registry>,
    client: AttentionWorkerClient<Channel>,
    stop: CancellationToken,
    ended: JoinHandle<anyhow::Result<()>>,
    hello: Hello,
    _experts: Vec<Registration>,
}

async fn until<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = check().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), found).await.unwrap_or_else(|_| panic!("{what} does not come"))
}

impl Worker {
    async fn start(model: &Model, cache_tokens: usize) -> Self {
        let registry = embedded();
        let checkpoint = Arc::new(Checkpoint::open(&fixture("v3")).unwrap());
        let config = Config {
            worker: WorkerSettings {
                member: MemberSettings::named("a0", "test"),
                dtype: "f32".into(),
                ..WorkerSettings::default()
            },
            cache_tokens: Some(cache_tokens),
            waiting_max: 2,
            orphan_seconds: 1,
            ..Config::default()
        };
        let hello = |role, id: &str, numerics| {
            handshake::hello("test", role, &WorkerId::new(id).unwrap(), checkpoint.fingerprint(), numerics)
        };
        let mut experts = Vec::new();
        for id in model.placement().workers() {
            let hello = hello(Role::ExpertWorker, id.as_str(), "f32");
            let member = Member::new(hello, id.clone(), "here:1".into(), None);
            let member = Member { epoch_loaded: Epoch(1), ..member };
            experts.push(registry.register(member).await.unwrap());
        }
        let context = Context {
            membership: registry.clone().into(),
            hub: Some(model.hub()),
            backend: Backend::Cpu(model.weights.numerics, Pool::new(2)),
            fabric: None,
            checkpoint: checkpoint.clone(),
            profile: Arc::default(),
        };
        let stop = CancellationToken::new();
        let ended = tokio::spawn(run(config, context, stop.clone()));
        let view = registry.view();
        let find = async || view.borrow().of_role(Role::AttentionWorker).next().map(|member| member.address.clone());
        let address = until("the worker's record", find).await;
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let (client, hello) = (AttentionWorkerClient::new(channel), hello(Role::Coordinator, "c0", ""));
        Self { registry, client, stop, ended, hello, _experts: experts }
    }

    /// Makes the placement known and waits until the worker says that it reaches the experts.
    async fn place(&mut self, model: &Model) {
        assert!(!self.load().await.experts_reachable);
        assert!(self.registry.publish((*model.placement()).clone()).await.unwrap());
        let mut client = self.client.clone();
        let reachable =
            async || client.load(LoadRequest {}).await.unwrap().into_inner().experts_reachable.then_some(());
        until("reachable experts", reachable).await;
    }

    async fn load(&mut self) -> LoadResponse {
        self.client.load(LoadRequest {}).await.unwrap().into_inner()
    }

    fn request(&self, id: &str, prompt: &[u32], max_tokens: u32) -> RunRequest {
        RunRequest {
            hello: Some(self.hello.clone()),
            request_id: id.into(),
            prompt: prompt.to_vec(),
            sampling: Some(SamplingParams {
                temperature: Some(0.0),
                top_p: Some(1.0),
                repetition_penalty: Some(1.0),
                seed: Some(0),
                ..Default::default()
            }),
            max_tokens,
            logprobs: Some(2),
            prompt_logprobs: Some(0),
            ..Default::default()
        }
    }

    async fn refusal(&mut self, run: RunRequest) -> Status {
        self.client.run(run).await.map(drop).expect_err("a refusal")
    }
}

async fn all(mut events: tonic::Streaming<RunEvent>) -> Vec<RunEvent> {
    let mut all = Vec::new();
    while let Some(event) = events.message().await.unwrap() {
        all.push(event);
    }
    all
}

fn model() -> Model {
    Model::open("v3", Numerics::detect(Dtype::F32), 2)
}

#[tokio::test]
async fn a_sequence_over_grpc_is_the_engines_own() {
    let model = model();
    let expected = harness::run(&model.engine(LIMITS), greedy(&[5, 6, 7], 12)).await;
    let mut worker = Worker::start(&model, 1024).await;
    worker.place(&model).await;
    let events = all(worker.client.run(worker.request("r", &[5, 6, 7], 12)).await.unwrap().into_inner()).await;
    assert_eq!(events.len(), 12);
    for (i, (event, token)) in events.iter().zip(&expected.tokens).enumerate() {
        let (info, logprobs) = (event.token.clone().unwrap(), token.logprobs.clone().unwrap());
        assert_eq!((event.position as usize, info.token, info.logprob), (i, token.token, Some(logprobs.logprob)));
        assert_eq!(info.top.iter().map(|t| (t.token, t.logprob)).collect::<Vec<_>>(), logprobs.top);
        let finish = (i == 11).then_some(i32::from(FinishReason::Length));
        assert_eq!((event.finish, event.prompt.len()), (finish, if i == 0 { 2 } else { 0 }));
    }
    let load = worker.load().await;
    assert_eq!((load.pages_total, load.pages_free, load.page_tokens), (16, 16, 64));
}

#[tokio::test]
async fn what_is_wrong_is_refused_with_the_reason_and_disturbs_nobody() {
    let model = model();
    let mut worker = Worker::start(&model, 128).await;
    worker.place(&model).await;
    let good = worker.request("r", &[5], 8);
    let other = Hello { fingerprint: "f00d".into(), ..worker.hello.clone() };
    let table = [
        (RunRequest { hello: None, ..good.clone() }, Code::FailedPrecondition, "hello"),
        (RunRequest { hello: Some(other), ..good.clone() }, Code::FailedPrecondition, "fingerprint"),
        (RunRequest { prompt: vec![512], ..good.clone() }, Code::InvalidArgument, "prompt[0]: 512"),
        (RunRequest { max_tokens: 256, ..good.clone() }, Code::InvalidArgument, "context of 256"),
        (RunRequest { max_tokens: 128, ..good.clone() }, Code::ResourceExhausted, "= 129 tokens"),
        (RunRequest { max_tokens: 128, ..good.clone() }, Code::ResourceExhausted, "cache of 128 tokens"),
    ];
    for (run, code, expected) in table {
        let status = worker.refusal(run).await;
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(expected), "{status} does not contain {expected:?}");
    }
    assert_eq!(all(worker.client.run(good).await.unwrap().into_inner()).await.len(), 8);
}

#[tokio::test]
async fn a_worker_without_a_placement_sends_sequences_elsewhere() {
    let model = model();
    let mut worker = Worker::start(&model, 128).await;
    let status = worker.refusal(worker.request("r", &[5], 8)).await;
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "this worker does not know yet who holds the experts");
    worker.place(&model).await;
    assert_eq!(all(worker.client.run(worker.request("r", &[5], 8)).await.unwrap().into_inner()).await.len(), 8);
}

#[tokio::test]
async fn abort_ends_a_stream_and_gives_its_id_back() {
    let model = model();
    let mut worker = Worker::start(&model, 512).await;
    worker.place(&model).await;
    let run = worker.request("r", &[5; 4], 250);
    let mut events = worker.client.run(run.clone()).await.unwrap().into_inner();
    assert!(events.message().await.unwrap().is_some());
    assert_eq!(worker.refusal(run.clone()).await.code(), Code::AlreadyExists);
    let abort = AbortCallRequest { request_id: "r".into(), call: 0 };
    assert!(worker.client.abort(abort.clone()).await.unwrap().into_inner().aborted);
    let last = all(events).await.pop().unwrap();
    assert_eq!((last.finish(), last.token), (FinishReason::Aborted, None));
    assert!(!worker.client.abort(abort).await.unwrap().into_inner().aborted);
    let again = worker.client.run(RunRequest { max_tokens: 3, ..run }).await.unwrap().into_inner();
    assert_eq!(all(again).await.len(), 3);
}

#[tokio::test]
async fn a_sequence_whose_call_has_broken_is_resumed_from_its_first_event() {
    let model = model();
    let mut worker = Worker::start(&model, 512).await;
    worker.place(&model).await;
    let run = worker.request("r", &[5; 4], 120);
    let expected =
        all(worker.client.run(RunRequest { request_id: "all".into(), ..run.clone() }).await.unwrap().into_inner());
    let expected = expected.await;
    let resume = RunRequest { resume: true, ..run.clone() };
    assert_eq!(worker.refusal(resume.clone()).await.code(), Code::NotFound, "it does not run");

    let mut broken = worker.client.run(run.clone()).await.unwrap().into_inner();
    assert!(broken.message().await.unwrap().is_some());
    drop(broken);
    let other = RunRequest { prompt: vec![5; 5], ..resume.clone() };
    assert_eq!(worker.refusal(other).await.code(), Code::NotFound, "another request");
    // While it runs, from another coordinator; and one that takes over from that one; and when it has ended.
    let hello = Hello { id: "c1".into(), ..worker.hello.clone() };
    let mut first = worker.client.run(RunRequest { hello: Some(hello), ..resume.clone() }).await.unwrap().into_inner();
    assert_eq!(first.message().await.unwrap().as_ref(), expected.first());
    let second = worker.client.run(resume.clone()).await.unwrap().into_inner();
    let taken_over = async {
        loop {
            match first.message().await {
                Ok(Some(_)) => {}
                other => return other,
            }
        }
    };
    assert_eq!(taken_over.await.unwrap_err().code(), Code::Aborted);
    assert_eq!(all(second).await, expected);
    assert_eq!(all(worker.client.run(resume.clone()).await.unwrap().into_inner()).await, expected);

    // Nobody comes any more.
    tokio::time::sleep(Duration::from_millis(1700)).await;
    assert_eq!(worker.refusal(resume).await.code(), Code::NotFound);
    assert_eq!(worker.load().await.pages_free, worker.load().await.pages_total);
}

/// A coordinator that has lost a sequence may hear of it late, and its Abort may come when another one has the sequence.
#[tokio::test]
async fn an_abort_from_a_call_that_has_been_taken_over_ends_nothing() {
    let model = model();
    let mut worker = Worker::start(&model, 512).await;
    worker.place(&model).await;
    let run = RunRequest { call: 1, ..worker.request("r", &[5; 4], 120) };
    let mut first = worker.client.run(run.clone()).await.unwrap().into_inner();
    assert!(first.message().await.unwrap().is_some());
    let second = worker.client.run(RunRequest { resume: true, call: 2, ..run }).await.unwrap().into_inner();
    let abort = |call| AbortCallRequest { request_id: "r".into(), call };
    assert!(!worker.client.abort(abort(1)).await.unwrap().into_inner().aborted);
    let events = all(second).await;
    assert_eq!((events.len(), events[119].finish()), (120, FinishReason::Length));
    assert!(worker.client.abort(abort(2)).await.unwrap().into_inner().aborted);
}

#[tokio::test]
async fn a_sequence_that_nobody_resumes_or_that_is_aborted_gives_its_pages_back() {
    let model = model();
    let mut worker = Worker::start(&model, 512).await;
    worker.place(&model).await;
    for is_aborted in [false, true] {
        let mut broken = worker.client.run(worker.request("r", &[5; 4], 250)).await.unwrap().into_inner();
        assert!(broken.message().await.unwrap().is_some());
        drop(broken);
        until("the orphan", async || (worker.load().await.orphans == 1).then_some(())).await;
        assert_eq!(worker.load().await.sequences_running, 1, "it goes on");
        if is_aborted {
            let abort = AbortCallRequest { request_id: "r".into(), call: 0 };
            assert!(worker.client.abort(abort).await.unwrap().into_inner().aborted);
        }
        let pages = async || {
            let load = worker.load().await;
            (load.pages_free == load.pages_total && load.orphans == 0).then_some(())
        };
        until("all pages", pages).await;
    }
}

#[tokio::test]
async fn what_another_worker_has_generated_counts_and_is_not_said_again() {
    let model = model();
    let mut worker = Worker::start(&model, 512).await;
    worker.place(&model).await;
    let run = worker.request("r", &[5; 4], 40);
    let expected = all(worker.client.run(run.clone()).await.unwrap().into_inner()).await;
    let emitted: Vec<_> = expected[..17].iter().map(|event| event.token.clone().unwrap()).collect();
    let moved = RunRequest { request_id: "moved".into(), emitted, ..run };
    let rest = all(worker.client.run(moved.clone()).await.unwrap().into_inner()).await;
    assert_eq!(rest, expected[17..]);
    let all_of_it = RunRequest { max_tokens: 17, request_id: "all".into(), ..moved };
    let refused = worker.refusal(all_of_it).await;
    assert_eq!(refused.message(), "emitted: 17 tokens; expected fewer than max_tokens, 17");
}

#[tokio::test]
async fn a_stop_finishes_what_runs_refuses_what_comes_and_leaves_the_registry() {
    let model = model();
    let mut worker = Worker::start(&model, 512).await;
    worker.place(&model).await;
    let run = worker.request("r", &[5; 4], 200);
    let mut events = worker.client.run(run).await.unwrap().into_inner();
    assert!(events.message().await.unwrap().is_some());
    worker.stop.cancel();
    let late = worker.refusal(worker.request("late", &[5], 3)).await;
    assert_eq!(late.code(), Code::Unavailable, "{late}");
    assert_eq!(all(events).await.len(), 199);
    tokio::time::timeout(Duration::from_secs(5), worker.ended).await.expect("it ends").unwrap().unwrap();
    assert_eq!(worker.registry.view().borrow().of_role(Role::AttentionWorker).count(), 0);
}
