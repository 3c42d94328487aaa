//! The expert worker's end: hands the frames of each stream to the host and sends its answers back as they come.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use moesaic_node::handshake;
use moesaic_proto::limits::FRAME_BYTES_MAX;
use moesaic_proto::v1::exchange_message::Kind;
use moesaic_proto::v1::experts_server::{Experts, ExpertsServer};
use moesaic_proto::v1::lane::What;
use moesaic_proto::v1::{self, ExchangeMessage, RefusalReason};
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{FINISH_POLL, HELLO_TIMEOUT, STREAM_FRAMES_MAX};
use crate::frame::{FrameError, Header, Refusal, RequestFrame};
use crate::local::{ExpertHost, ReplySender};
use crate::nccl::lane::{End, Lane, LaneOwner, Message, Offer, Place, Sender};
use crate::nccl::{Fabric, IDLE_AFTER};
use crate::payload::Payload;

/// The `Experts` service in front of a host.
pub struct ExpertsService {
    host: Arc<dyn ExpertHost>,
    fabric: Option<Arc<dyn Fabric>>,
    hello: v1::Hello,
    closing: CancellationToken,
}

/// `hello` is the worker's own; with a `fabric`, it names its version. Once `closing` is cancelled no stream is opened or
/// read on; each ends when what it has in hand is answered.
pub fn service(
    host: Arc<dyn ExpertHost>,
    fabric: Option<Arc<dyn Fabric>>,
    hello: v1::Hello,
    closing: CancellationToken,
) -> ExpertsServer<ExpertsService> {
    ExpertsServer::new(ExpertsService { host, fabric, hello, closing })
        .max_decoding_message_size(FRAME_BYTES_MAX)
        .max_encoding_message_size(FRAME_BYTES_MAX)
}

#[tonic::async_trait]
impl Experts for ExpertsService {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<ExchangeMessage, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<ExchangeMessage>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let mut inbound = request.into_inner();
        let peer = first_hello(&mut inbound).await?;
        handshake::check(&self.hello, &peer, v1::Role::AttentionWorker)
            .map_err(|mismatch| Status::failed_precondition(mismatch.to_string()))?;
        let Ok(source) = u16::try_from(peer.source) else {
            return Err(Status::failed_precondition(format!("source: {}; expected at most {}", peer.source, u16::MAX)));
        };
        if self.closing.is_cancelled() {
            // Else the caller would take the worker for reachable until its stream ends, and try again at once.
            return Err(Status::unavailable("the worker is stopping"));
        }
        let (answers, outbound) = mpsc::channel(STREAM_FRAMES_MAX);
        // The channel is new: it has room.
        let _ = answers.try_send(Ok(ExchangeMessage { kind: Some(Kind::Hello(self.hello.clone())) }));
        let inbox = Inbox { host: self.host.clone(), source };
        let caller = Caller { inbox, answers, fabric: self.fabric.clone(), closing: self.closing.clone() };
        tokio::spawn(caller.read(inbound));
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }
}

async fn first_hello(inbound: &mut Streaming<ExchangeMessage>) -> Result<v1::Hello, Status> {
    let first = timeout(HELLO_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no Hello within {} s", HELLO_TIMEOUT.as_secs())))?;
    match first?.and_then(|message| message.kind) {
        Some(Kind::Hello(hello)) => Ok(hello),
        _ => Err(Status::invalid_argument("the first message is no Hello")),
    }
}

/// Where one caller's frames go, whichever way they came.
#[derive(Clone)]
struct Inbox {
    host: Arc<dyn ExpertHost>,
    source: u16,
}

impl Inbox {
    fn take(&self, header: Header, frame: v1::Frame, rows: Payload, reply: ReplySender) {
        match self.check(header, frame, rows) {
            Ok(frame) => self.host.submit(frame, reply),
            Err(error) => reply.send(Err(Refusal::new(RefusalReason::Malformed, error.to_string()))),
        }
    }

    fn check(&self, header: Header, frame: v1::Frame, rows: Payload) -> Result<RequestFrame, FrameError> {
        if header.source != self.source {
            return Err(FrameError::Source { given: header.source, expected: self.source });
        }
        RequestFrame::join(header, frame, rows, self.host.shape())
    }
}

/// One stream's reader. Ends with the stream, or with `closing`.
struct Caller {
    inbox: Inbox,
    answers: mpsc::Sender<Result<ExchangeMessage, Status>>,
    fabric: Option<Arc<dyn Fabric>>,
    closing: CancellationToken,
}

/// Room for one answer, kept from before its frame is read: so a reply never waits.
type Room = OwnedPermit<Result<ExchangeMessage, Status>>;

impl Caller {
    async fn read(self, mut inbound: Streaming<ExchangeMessage>) {
        let next = async |inbound: &mut Streaming<ExchangeMessage>| {
            let room = self.answers.clone().reserve_owned().await.ok()?;
            Some((room, inbound.message().await))
        };
        // Ends with the stream.
        let mut lane = None;
        loop {
            let (room, message) = tokio::select! {
                () = self.closing.cancelled() => return self.let_finish(lane).await,
                () = self.answers.closed() => return,
                next = next(&mut inbound) => match next {
                    Some(next) => next,
                    None => return,
                },
            };
            let frame = match message {
                Ok(None) => return,
                Ok(Some(ExchangeMessage { kind: Some(Kind::Frame(frame)) })) => frame,
                Ok(Some(ping @ ExchangeMessage { kind: Some(Kind::Ping(_)) })) => {
                    room.send(Ok(ping));
                    continue;
                }
                Ok(Some(ExchangeMessage { kind: Some(Kind::Lane(said)) })) => {
                    self.hear(said, &mut lane, room);
                    continue;
                }
                Ok(Some(_)) => return fail(room, Status::invalid_argument("a message after Hello is no frame")),
                Err(status) => return fail(room, status),
            };
            match Header::decode(&frame.header) {
                Ok(header) => self.submit(header, frame, room),
                // Without a header there is nothing that an answer could be matched by.
                Err(error) => return fail(room, Status::invalid_argument(error.to_string())),
            }
        }
    }

    /// Keeps the lane until what has come over it is answered, as what has come over the stream is, or nobody waits any more.
    async fn let_finish(&self, lane: Option<Lane>) {
        let Some(lane) = lane else { return };
        let finished = async {
            while !lane.is_idle() {
                sleep(FINISH_POLL).await;
            }
            // That it has left does not say that it has come.
            sleep(IDLE_AFTER).await;
        };
        tokio::select! {
            () = finished => {}
            () = self.answers.closed() => {}
        }
    }

    fn submit(&self, header: Header, mut frame: v1::Frame, room: Room) {
        let reply = ReplySender::new(header, move |answer| {
            room.send(Ok(ExchangeMessage { kind: Some(Kind::Frame(answer.encode())) }));
        });
        let rows = Payload::taken(&mut frame);
        self.inbox.take(header, frame, rows, reply);
    }

    /// What the caller says of a lane. `room` is for what is to be said to that.
    fn hear(&self, said: v1::Lane, lane: &mut Option<Lane>, room: Room) {
        let generation = said.generation;
        let is_in_hand = |lane: &Lane| lane.generation() == generation;
        match said.what {
            Some(What::Offer(offer)) => {
                // The one before is of no use any more.
                *lane = None;
                *lane = self.take_offer(generation, &offer, room);
            }
            Some(What::Wake(sequence)) => {
                lane.iter().filter(|lane| is_in_hand(lane)).for_each(|lane| lane.wake(sequence))
            }
            Some(What::Failed(_)) => drop(lane.take_if(|lane| is_in_hand(lane))),
            // The worker's to say.
            Some(What::Accepted(_)) | None => {}
        }
    }

    fn take_offer(&self, generation: u32, offer: &v1::LaneOffer, room: Room) -> Option<Lane> {
        let owner = Arc::new(LaneInbox { inbox: self.inbox.clone(), answers: self.answers.downgrade(), generation });
        let fit = || {
            let fabric = self.fabric.clone().ok_or("there is no NCCL here")?;
            let offer = Offer::decode(offer).map_err(|invalid| invalid.to_string())?;
            let place = Place::take(&*fabric).map_err(|error| error.to_string())?;
            Ok::<_, String>((fabric, offer, place))
        };
        let (fabric, offer, place) = match fit() {
            Ok(fit) => fit,
            Err(reason) => {
                room.send(owner.message(What::Failed(reason)));
                return None;
            }
        };
        // Before the lane can say that it has failed.
        room.send(owner.message(What::Accepted(true)));
        let opened = Lane::open(fabric, generation, offer, End::Expert, owner.clone(), place);
        opened.inspect_err(|error| owner.failed(&error.to_string())).ok()
    }
}

/// Hears one lane of a stream. Frames that came over it are answered over it; those of a lane that fails are asked for again.
struct LaneInbox {
    inbox: Inbox,
    /// Which may end while the lane's threads still do.
    answers: mpsc::WeakSender<Result<ExchangeMessage, Status>>,
    generation: u32,
}

impl LaneInbox {
    fn message(&self, what: What) -> Result<ExchangeMessage, Status> {
        let said = v1::Lane { generation: self.generation, what: Some(what) };
        Ok(ExchangeMessage { kind: Some(Kind::Lane(said)) })
    }
}

impl LaneOwner for LaneInbox {
    fn up(&self) {}

    fn frame(&self, frame: v1::Frame, rows: Payload, lane: &Sender) {
        let header = match Header::decode(&frame.header) {
            Ok(header) => header,
            Err(error) => return lane.fail(&error.to_string()),
        };
        let (back, in_hand) = (lane.clone(), lane.in_hand());
        let reply = ReplySender::new(header, move |answer| {
            if !back.send(Message::Answer(answer, in_hand)) {
                back.fail("more answers wait than a lane holds");
            }
        });
        self.inbox.take(header, frame, rows, reply);
    }

    fn wake(&self, sequence: u32) {
        // Without its stream the lane ends, too.
        if let Some(answers) = self.answers.upgrade() {
            let _ = answers.blocking_send(self.message(What::Wake(sequence)));
        }
    }

    fn failed(&self, reason: &str) {
        // Where the stream is full, the caller notices that its slots are not taken.
        if let Some(answers) = self.answers.upgrade() {
            let _ = answers.try_send(self.message(What::Failed(reason.to_owned())));
        }
    }
}

/// Ends the stream with an error.
fn fail(room: Room, status: Status) {
    room.send(Err(status));
}
