//! A client of the public API that knows how to go on: when its coordinator dies, it takes the same request to another
//! one and says how far it has come. It writes down what it sees and judges nothing.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use moesaic_proto::v1::inference_client::InferenceClient;
use moesaic_proto::v1::{FinishReason, GenerateResponse};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::judge::{Arrival, End, History, Piece, Refusal};
use super::requests::{Door, Request};
use super::sse;

/// For all attempts to go on after one break.
const RESUME_MAX: Duration = Duration::from_secs(30);
const RESUME_PAUSE: Duration = Duration::from_millis(50);
pub const CONNECT_MAX: Duration = Duration::from_secs(1);
/// A stream that says nothing for so long hangs.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);

/// For ids that no other request has had.
static REQUESTS: AtomicUsize = AtomicUsize::new(0);

/// What a client does about UNAVAILABLE. A stream whose connection breaks is always resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It is a failure: nothing was done to any coordinator.
    Firm,
    /// It is tried again: a coordinator is stopping, or an expert has no holder for a while.
    Patient,
}

/// What all clients of a run share.
#[derive(Clone, Debug)]
pub struct Doors {
    /// Coordinators.
    pub urls: Vec<String>,
    pub http: reqwest::Client,
    pub begin: Instant,
    /// Pieces that have arrived at any client.
    pub arrived: Arc<AtomicUsize>,
    /// One connection to each coordinator for all; empty: each request has its own.
    channels: Vec<Channel>,
}

/// Why an attempt ended before the answer did.
pub enum Break {
    /// The connection was refused or broke.
    Gone(String),
    /// The coordinator said so.
    Unavailable(String),
    /// There is no room; whether it said when to come again.
    Full(bool),
    Failed(String),
}

impl Doors {
    pub fn new(urls: Vec<String>) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().no_proxy().connect_timeout(CONNECT_MAX).read_timeout(SILENCE_MAX);
        Ok(Self {
            urls,
            // A connection for each request: one that is kept would be found broken by the next.
            http: http.pool_max_idle_per_host(0).build()?,
            begin: Instant::now(),
            arrived: Arc::default(),
            channels: Vec::new(),
        })
    }

    /// For many clients, who should cost this machine little. gRPC only.
    pub fn shared(urls: Vec<String>) -> anyhow::Result<Self> {
        let channel =
            |url: &String| Ok(Endpoint::from_shared(url.clone())?.connect_timeout(CONNECT_MAX).connect_lazy());
        let channels = urls.iter().map(channel).collect::<anyhow::Result<_>>()?;
        Ok(Self { channels, ..Self::new(urls)? })
    }

    pub fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Asks, and reads to the end. `first` is the coordinator to begin with.
    pub async fn ask(&self, request: &Request, first: usize, policy: Policy) -> History {
        let number = REQUESTS.fetch_add(1, Ordering::Relaxed);
        let mut stream = Stream {
            request,
            doors: self,
            request_id: format!("faults-{}-{number}", std::process::id()),
            history: History {
                request: request.index,
                sent: self.now(),
                arrivals: Vec::new(),
                resumed: 0,
                end: End::Finished,
            },
            begun: false,
        };
        stream.run(first, policy).await;
        stream.history
    }

    async fn connect(&self, door: usize) -> Result<Channel, Break> {
        if let Some(channel) = self.channels.get(door % self.urls.len()) {
            return Ok(channel.clone());
        }
        let url = self.urls[door % self.urls.len()].clone();
        let endpoint = Endpoint::from_shared(url).map_err(|error| Break::Failed(error.to_string()))?;
        endpoint.connect_timeout(CONNECT_MAX).connect().await.map_err(|error| Break::Gone(chain(&error)))
    }
}

/// One answer on its way.
pub struct Stream<'a> {
    pub request: &'a Request,
    pub doors: &'a Doors,
    request_id: String,
    pub history: History,
    /// A coordinator has taken it: from now on it is resumed, not asked anew.
    pub begun: bool,
}

impl Stream<'_> {
    async fn run(&mut self, first: usize, policy: Policy) {
        let mut door = first;
        let mut broken: Option<Instant> = None;
        let end = loop {
            let before = self.history.arrivals.len();
            let attempt = match self.request.door {
                Door::Grpc => self.over_grpc(door).await,
                Door::Http => sse::read(self, door).await,
            };
            if self.history.arrivals.len() > before {
                broken = None;
            }
            let reason = match attempt {
                Ok(()) => break End::Finished,
                Err(Break::Gone(reason)) => reason,
                Err(Break::Unavailable(reason)) if policy == Policy::Patient => reason,
                Err(Break::Unavailable(reason) | Break::Failed(reason)) => break End::Failed(reason),
                Err(Break::Full(has_retry_after)) => {
                    break End::Refused(Refusal { after: self.doors.now() - self.history.sent, has_retry_after });
                }
            };
            if broken.get_or_insert_with(Instant::now).elapsed() > RESUME_MAX {
                break End::Failed(format!("nobody went on with it for {RESUME_MAX:?}: {reason}"));
            }
            self.history.resumed += usize::from(self.begun && self.history.arrivals.len() > before);
            door += 1;
            sleep(RESUME_PAUSE).await;
        };
        self.history.end = end;
    }

    async fn over_grpc(&mut self, door: usize) -> Result<(), Break> {
        let mut client = InferenceClient::new(self.doors.connect(door).await?);
        let position = self.begun.then_some(self.history.arrivals.len() as u32);
        let message = self.request.grpc(&self.request_id, position);
        let called = timeout(SILENCE_MAX, client.generate(message)).await;
        let mut stream = called.map_err(|_| silent())?.map_err(|status| broken(&status))?.into_inner();
        self.begun = true;
        loop {
            let part = timeout(SILENCE_MAX, stream.message()).await.map_err(|_| silent())?;
            match part.map_err(|status| broken(&status))? {
                Some(part) => {
                    if self.take(part)? {
                        return Ok(());
                    }
                }
                None => return Err(Break::Failed("the stream ended without a finish".into())),
            }
        }
    }

    /// True at the end of the answer.
    fn take(&mut self, part: GenerateResponse) -> Result<bool, Break> {
        for (position, token) in (part.position..).zip(&part.tokens) {
            self.arrive(Piece::Token { position, id: token.token });
        }
        match part.finish {
            None => Ok(false),
            Some(finish) if finish.reason() == FinishReason::Length => Ok(true),
            Some(finish) => Err(Break::Failed(format!("it ended with {:?}", finish.reason()))),
        }
    }

    pub fn arrive(&mut self, piece: Piece) {
        self.history.arrivals.push(Arrival { at: self.doors.now(), piece });
        self.doors.arrived.fetch_add(1, Ordering::Relaxed);
    }
}

pub fn silent() -> Break {
    Break::Failed(format!("nothing came for {SILENCE_MAX:?}"))
}

/// A status that this side has made of a broken connection has that as its source; one that was sent has none.
fn broken(status: &Status) -> Break {
    let text = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        _ if status.source().is_some() => Break::Gone(chain(status)),
        Code::Unavailable => Break::Unavailable(text),
        Code::ResourceExhausted => Break::Full(status.metadata().contains_key("retry-after")),
        _ => Break::Failed(text),
    }
}

/// An error with its reasons.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use futures::Stream as FutureStream;
    use futures::stream::{self, StreamExt};
    use moesaic_proto::v1::inference_server::{Inference, InferenceServer};
    use moesaic_proto::v1::{
        AbortRequest, AbortResponse, Finish, GenerateRequest, ListModelsRequest, ListModelsResponse, TokenInfo,
        TokenizeRequest, TokenizeResponse,
    };
    use tokio::runtime::Runtime;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Response, transport::Server};

    use super::*;
    use crate::faults::requests::request;

    const TOKENS: u32 = 6;

    /// Token p is 100 + p. It falls silent after so many, or refuses everything.
    struct Fake {
        silent_after: u32,
        refuses: Option<Code>,
    }

    #[tonic::async_trait]
    impl Inference for Fake {
        type GenerateStream = Pin<Box<dyn FutureStream<Item = Result<GenerateResponse, Status>> + Send>>;

        async fn generate(
            &self,
            message: tonic::Request<GenerateRequest>,
        ) -> Result<Response<Self::GenerateStream>, Status> {
            if let Some(code) = self.refuses {
                let mut status = Status::new(code, "no");
                status.metadata_mut().insert("retry-after", 1.into());
                return Err(status);
            }
            let first = message.into_inner().resume_position.unwrap_or(0);
            let part = |position| GenerateResponse {
                position,
                tokens: vec![TokenInfo { token: 100 + position, ..Default::default() }],
                finish: (position + 1 == TOKENS)
                    .then(|| Finish { reason: FinishReason::Length.into(), ..Default::default() }),
                ..Default::default()
            };
            let parts = stream::iter(first..TOKENS.min(self.silent_after)).map(move |position| Ok(part(position)));
            Ok(Response::new(Box::pin(parts.chain(stream::pending()))))
        }

        async fn abort(&self, _: tonic::Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn list_models(
            &self,
            _: tonic::Request<ListModelsRequest>,
        ) -> Result<Response<ListModelsResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn tokenize(&self, _: tonic::Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
            Err(Status::unimplemented(""))
        }
    }

    /// In a runtime of its own, whose end is as sudden as a process's.
    fn coordinator(fake: Fake) -> (Runtime, String) {
        let runtime = Runtime::new().unwrap();
        let incoming = {
            let _inside = runtime.enter();
            TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap()
        };
        let url = format!("http://{}", incoming.local_addr().unwrap());
        runtime.spawn(Server::builder().add_service(InferenceServer::new(fake)).serve_with_incoming(incoming));
        (runtime, url)
    }

    fn well() -> Fake {
        Fake { silent_after: TOKENS, refuses: None }
    }

    async fn ask(urls: Vec<String>, policy: Policy) -> History {
        Doors::new(urls).unwrap().ask(&request(0, 4, TOKENS as usize), 0, policy).await
    }

    fn is_whole(history: &History) -> bool {
        let token = |position| Piece::Token { position, id: 100 + position };
        let pieces = history.arrivals.iter().map(|arrival| &arrival.piece);
        pieces.eq((0..TOKENS).map(token).collect::<Vec<_>>().iter()) && history.end == End::Finished
    }

    #[tokio::test]
    async fn it_goes_on_where_it_was_when_its_coordinator_dies() {
        let (dies, first) = coordinator(Fake { silent_after: 2, refuses: None });
        let (other, second) = coordinator(well());
        let doors = Doors::new(vec![first, second]).unwrap();
        let (kill, asked) = (doors.clone(), request(0, 4, TOKENS as usize));
        let killer = async {
            while kill.arrived.load(Ordering::Relaxed) < 2 {
                sleep(Duration::from_millis(1)).await;
            }
            dies.shutdown_background();
        };
        let (history, ()) = tokio::join!(doors.ask(&asked, 0, Policy::Firm), killer);
        assert!(is_whole(&history), "{history:?}");
        assert_eq!(history.resumed, 1);
        other.shutdown_background();
    }

    #[tokio::test]
    async fn what_a_coordinator_says_counts() {
        let (well, good) = coordinator(well());
        let check = async |code, policy, expect: fn(&History) -> bool| {
            let (refuses, bad) = coordinator(Fake { silent_after: 0, refuses: Some(code) });
            let history = ask(vec![bad, good.clone()], policy).await;
            assert!(expect(&history) && history.resumed == 0, "{code:?} {policy:?} {history:?}");
            refuses.shutdown_background();
        };
        check(Code::Unavailable, Policy::Patient, is_whole).await;
        check(Code::Unavailable, Policy::Firm, |history| matches!(history.end, End::Failed(_))).await;
        check(Code::Internal, Policy::Patient, |history| matches!(history.end, End::Failed(_))).await;
        let full = |history: &History| matches!(&history.end, End::Refused(refusal) if refusal.has_retry_after);
        check(Code::ResourceExhausted, Policy::Patient, full).await;
        // Nobody listens there.
        let history = ask(vec!["http://127.0.0.1:1".into(), good.clone()], Policy::Firm).await;
        assert!(is_whole(&history) && history.resumed == 0, "{history:?}");
        well.shutdown_background();
    }
}
