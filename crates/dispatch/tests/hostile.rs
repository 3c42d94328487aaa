//! Peers that do not keep to the protocol: what they send is refused with its reason, and nobody else notices.

#![allow(clippy::unwrap_used)]

mod support;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use moesaic_dispatch::frame::{AnswerFrame, FLAG_ANSWER, FLAG_F32, FLAG_REFUSAL, Header};
use moesaic_dispatch::grpc::HELLO_TIMEOUT;
use moesaic_dispatch::{Cause, DispatchError, Dispatcher, Refusal};
use moesaic_proto::Epoch;
use moesaic_proto::limits::FRAME_BYTES_MAX;
use moesaic_proto::v1::exchange_message::Kind;
use moesaic_proto::v1::experts_client::ExpertsClient;
use moesaic_proto::v1::experts_server::{Experts, ExpertsServer};
use moesaic_proto::v1::{ExchangeMessage, Frame, Ping, RefusalReason, Role};
use support::*;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};

fn message(kind: Kind) -> ExchangeMessage {
    ExchangeMessage { kind: Some(kind) }
}

fn greeting() -> ExchangeMessage {
    message(Kind::Hello(hello(Role::AttentionWorker, "a0")))
}

/// A valid request: one row, its first expert as it is.
fn frame(sequence: u32) -> Frame {
    let header =
        Header { epoch: Epoch(1), layer: LAYER, micro_batch: 2, flags: FLAG_F32, source: SOURCE, slot: 0, sequence };
    Frame {
        header: Bytes::copy_from_slice(&header.encode()),
        rows: vec![0; HIDDEN * size_of::<f32>()].into(),
        outputs: vec![0, 0, 1, 0].into(),
        terms: vec![0; 8].into(),
        ..Default::default()
    }
}

/// An attention worker's end, message by message.
struct Caller {
    requests: mpsc::Sender<ExchangeMessage>,
    answers: Streaming<ExchangeMessage>,
}

impl Caller {
    /// A stream whose first messages are these.
    async fn open(remote: &RemoteWorker, first: Vec<ExchangeMessage>) -> Result<Self, Status> {
        let (requests, outbound) = mpsc::channel(16);
        let mut client = ExpertsClient::connect(format!("http://{}", remote.address)).await.unwrap();
        let outbound = stream::iter(first).chain(ReceiverStream::new(outbound));
        Ok(Self { requests, answers: client.exchange(outbound).await?.into_inner() })
    }

    /// Past the Hellos.
    async fn greeted(remote: &RemoteWorker) -> Self {
        let mut caller = Self::open(remote, vec![greeting()]).await.unwrap();
        let Ok(Some(Kind::Hello(peer))) = caller.next().await else {
            panic!("the worker's first message is its Hello")
        };
        assert_eq!(peer, hello(Role::ExpertWorker, "w0"));
        caller
    }

    async fn send(&self, kind: Kind) {
        self.requests.send(message(kind)).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<Kind>, Status> {
        Ok(self.answers.message().await?.and_then(|message| message.kind))
    }

    async fn answer(&mut self) -> AnswerFrame {
        let Ok(Some(Kind::Frame(frame))) = self.next().await else { panic!("an answer is a frame") };
        AnswerFrame::decode(frame).unwrap()
    }

    async fn ended(&mut self) -> (Code, String) {
        let status = self.next().await.expect_err("the stream should end with an error");
        (status.code(), status.message().to_owned())
    }
}

async fn victim() -> (Arc<FakeHost>, RemoteWorker) {
    let host = FakeHost::new(Mood::Answers);
    let remote = start(0, &host).await;
    (host, remote)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_message_that_is_no_hello_ends_the_stream() {
    let (host, remote) = victim().await;
    let frame = || message(Kind::Frame(frame(1)));
    for first in [vec![frame()], vec![frame(), greeting()], vec![ExchangeMessage { kind: None }]] {
        let status = Caller::open(&remote, first).await.err().unwrap();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "the first message is no Hello"));
    }
    assert_eq!(host.frame_count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_never_says_hello_is_not_waited_for() {
    let (_host, remote) = victim().await;
    let opened = Instant::now();
    let status = Caller::open(&remote, vec![]).await.err().unwrap();
    assert_eq!((status.code(), status.message()), (Code::DeadlineExceeded, "no Hello within 5 s"));
    let waited = opened.elapsed();
    assert!(HELLO_TIMEOUT <= waited && waited < HELLO_TIMEOUT + Duration::from_secs(2), "it took {waited:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_message_that_is_no_frame_ends_the_stream() {
    let (_host, remote) = victim().await;
    for second in [greeting(), ExchangeMessage { kind: None }] {
        let mut caller = Caller::greeted(&remote).await;
        caller.requests.send(second).await.unwrap();
        assert_eq!(caller.ended().await, (Code::InvalidArgument, "a message after Hello is no frame".into()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_without_a_header_ends_its_stream_and_no_other() {
    let (host, remote) = victim().await;
    let mut other = Caller::greeted(&remote).await;
    for len in [0, 15, 17] {
        let mut caller = Caller::greeted(&remote).await;
        caller.send(Kind::Frame(frame(1))).await;
        assert!(caller.answer().await.result.is_ok());
        caller.send(Kind::Frame(Frame { header: vec![0; len].into(), ..frame(2) })).await;
        let words = format!("header: {len} bytes; expected 16");
        assert_eq!(caller.ended().await, (Code::InvalidArgument, words));
        other.send(Kind::Frame(frame(3))).await;
        assert!(other.answer().await.result.is_ok());
    }
    assert_eq!(host.frame_count(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_is_wrong_is_refused_with_what_is_wrong_and_the_stream_goes_on() {
    let (host, remote) = victim().await;
    let mut caller = Caller::greeted(&remote).await;
    type Break = fn(&mut Frame);
    let table: [(Break, &str); 5] = [
        (|f| f.rows = Bytes::new(), "rows: 0 bytes; expected 1 to 4096 rows of 96 bytes"),
        (|f| f.outputs = vec![0; 3].into(), "outputs: 3 bytes; expected a multiple of 4"),
        (
            |f| f.terms = Bytes::new(),
            "outputs[0]: 1 terms of 0 that are left; expected at least 1, and 1 if not weighted",
        ),
        (
            |f| set_header(f, |h| h.flags = FLAG_ANSWER),
            "header: flags are 0x0001; expected a request's: 0, or 4 for f32 rows",
        ),
        (|f| set_header(f, |h| h.source = 8), "header: source is 8; this stream's is 7"),
    ];
    for (sequence, (break_it, words)) in (0..).zip(table) {
        let mut bad = frame(sequence);
        break_it(&mut bad);
        caller.send(Kind::Frame(bad)).await;
        let answer = caller.answer().await;
        assert_eq!(answer.result.unwrap_err(), Refusal::new(RefusalReason::Malformed, words));
        let AnswerFrame { header: Header { flags, micro_batch, sequence: answered, .. }, .. } = answer;
        assert_eq!((flags, micro_batch, answered), (FLAG_ANSWER | FLAG_REFUSAL | FLAG_F32, 2, sequence));

        caller.send(Kind::Frame(frame(100))).await;
        let answer = caller.answer().await;
        assert_eq!((answer.header.sequence, answer.result.unwrap().len()), (100, HIDDEN));
    }
    assert_eq!(host.frame_count(), 5, "the host sees valid frames only");
}

fn set_header(frame: &mut Frame, change: impl Fn(&mut Header)) {
    let mut header = Header::decode(&frame.header).unwrap();
    change(&mut header);
    frame.header = Bytes::copy_from_slice(&header.encode());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_larger_than_a_frame_ends_the_stream_before_it_is_read() {
    let (host, remote) = victim().await;
    let mut caller = Caller::greeted(&remote).await;
    caller.send(Kind::Frame(Frame { rows: vec![0; FRAME_BYTES_MAX].into(), ..frame(1) })).await;
    assert_eq!(caller.ended().await.0, Code::OutOfRange);
    assert_eq!(host.frame_count(), 0);
}

/// An expert worker that says whatever it is told: `first`, then `later` once a frame has come. It does so once; later
/// connections are left without an answer.
struct Liar {
    first: Vec<ExchangeMessage>,
    later: fn(Frame) -> Vec<ExchangeMessage>,
    has_lied: AtomicBool,
}

#[tonic::async_trait]
impl Experts for Liar {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<ExchangeMessage, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<ExchangeMessage>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        if self.has_lied.swap(true, Ordering::SeqCst) {
            std::future::pending().await
        }
        let later = self.later;
        let answers = request.into_inner().flat_map(move |message| match message.unwrap().kind {
            Some(Kind::Frame(frame)) => stream::iter(later(frame)),
            _ => stream::iter(vec![]),
        });
        Ok(Response::new(Box::pin(stream::iter(self.first.clone()).chain(answers).map(Ok))))
    }
}

async fn believing(first: Vec<ExchangeMessage>, later: fn(Frame) -> Vec<ExchangeMessage>) -> (Dispatcher, Runtime) {
    let liar = Liar { first, later, has_lied: AtomicBool::new(false) };
    let (address, runtime) =
        serve("127.0.0.1:0".parse().unwrap(), Server::builder().add_service(ExpertsServer::new(liar))).await;
    let dispatcher = Dispatcher::new(config(SHORT), None);
    dispatcher.set_view(placement(1, &blocks(1)), &[(worker(0), member(address))].into());
    (dispatcher, runtime)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_does_not_say_hello_first_is_not_reached() {
    for first in [vec![message(Kind::Frame(frame(1)))], vec![ExchangeMessage { kind: None }]] {
        let (dispatcher, runtime) = believing(first, |_| vec![]).await;
        until(|| edge(&dispatcher, 0).detail == "its first message is no Hello").await;
        assert!(!dispatcher.reachable());
        let (x, routes) = row_for(0);
        let error = call(&dispatcher, &x, &routes).await.unwrap_err().to_string();
        assert!(error.ends_with("(w0: its first message is no Hello)"), "{error}");
        runtime.shutdown_background();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_has_no_experts_is_not_reached_and_the_reason_is_told() {
    let nothing = Server::builder().add_routes(Routes::default());
    let (address, runtime) = serve("127.0.0.1:0".parse().unwrap(), nothing).await;
    let dispatcher = Dispatcher::new(config(SHORT), None);
    dispatcher.set_view(placement(1, &blocks(1)), &[(worker(0), member(address))].into());
    until(|| edge(&dispatcher, 0).detail.starts_with("Operation is not implemented")).await;
    let (x, routes) = row_for(0);
    let error = call(&dispatcher, &x, &routes).await.unwrap_err().to_string();
    assert!(error.contains("(w0: Operation is not implemented"), "{error}");
    runtime.shutdown_background();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_breaks_the_protocol_loses_its_edge_and_the_call_says_why() {
    let as_expert = || vec![message(Kind::Hello(hello(Role::ExpertWorker, "w0")))];
    type Later = fn(Frame) -> Vec<ExchangeMessage>;
    let table: [(Later, &str); 4] = [
        (|_| vec![greeting()], "it sent a message that is no frame"),
        (|_| vec![ExchangeMessage { kind: None }], "it sent a message that is no frame"),
        (
            |_| vec![message(Kind::Frame(Frame::default()))],
            "it sent a frame that is wrong: header: 0 bytes; expected 16",
        ),
        (
            |f| vec![message(Kind::Frame(f))],
            "it sent a frame that is wrong: header: flags are 0x0004; expected an answer's: 5, or 7 and a refusal",
        ),
    ];
    for (later, words) in table {
        let (dispatcher, runtime) = believing(as_expert(), later).await;
        until(|| dispatcher.reachable()).await;
        let (x, routes) = row_for(0);
        let error = call(&dispatcher, &x, &routes).await.unwrap_err();
        let DispatchError::Lost { worker, cause, .. } = error else { panic!("{error}") };
        assert_eq!((worker.as_str(), cause), ("w0", Cause::EdgeDown { reason: words.into() }));
        assert_eq!((dispatcher.outstanding(), dispatcher.counts().sent), (0, 1));
        runtime.shutdown_background();
    }
}

/// Answers that fit nothing, and pings of any number, change nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_answers_and_pings_that_nobody_asked_for_is_dropped_and_counted() {
    let as_expert = vec![message(Kind::Hello(hello(Role::ExpertWorker, "w0")))];
    let flood = |asked: Frame| {
        let asked = Header::decode(&asked.header).unwrap();
        let nobodys = (1..=1000).map(|i| Header { sequence: asked.sequence + i, ..asked });
        let frame = |header| Kind::Frame(AnswerFrame::new(header, Ok(vec![1.0; HIDDEN].into())).encode());
        let pings = (0..1000).map(|i| Kind::Ping(Ping { number: u64::MAX - i }));
        let right = Kind::Frame(AnswerFrame::new(asked, Ok(vec![1.0; 3 * HIDDEN].into())).encode());
        nobodys.map(frame).chain(pings).chain([right]).map(message).collect()
    };
    let (dispatcher, runtime) = believing(as_expert, flood).await;
    until(|| dispatcher.reachable()).await;
    let (x, routes) = row_for(0);
    // Two sums of groups, of the experts 0 to 2 and 3 and 4; the liar gives three.
    let error = call(&dispatcher, &x, &routes).await.unwrap_err().to_string();
    assert!(error.contains("worker w0 "), "{error}");
    assert!(dispatcher.counts().rejected >= 1 && dispatcher.counts().unmatched >= 1000, "{:?}", dispatcher.counts());
    runtime.shutdown_background();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ping_is_sent_back_at_once_between_frames_that_wait() {
    let host = FakeHost::new(Mood::Keeps);
    let remote = start(0, &host).await;
    let mut caller = Caller::greeted(&remote).await;
    for number in [7, u64::MAX] {
        caller.send(Kind::Frame(frame(number as u32))).await;
        caller.send(Kind::Ping(Ping { number })).await;
        assert!(matches!(caller.next().await, Ok(Some(Kind::Ping(Ping { number: sent_back }))) if sent_back == number));
    }
    host.answer_held();
    for sequence in [7, u32::MAX] {
        assert_eq!(caller.answer().await.header.sequence, sequence);
    }
}
