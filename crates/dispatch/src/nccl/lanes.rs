//! The attention worker's end of an edge's lanes, one after the other: which frames they carry, and what becomes of those when
//! a lane fails.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use moesaic_proto::v1::{self, lane::What};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::core::{Carrier, Claim};
use super::lane::{End, Lane, LaneOwner, Message, NotOpened, Offer, Place, Sender};
use super::watch;
use super::*;
use crate::frame::{AheadFrame, AnswerFrame, Header, RequestFrame};
use crate::grpc::Outbound;
use crate::payload::Payload;

/// Of one edge.
pub struct Lanes {
    fabric: Arc<dyn Fabric>,
    hidden: usize,
    current: Mutex<Current>,
    failures: AtomicU64,
}

/// Who hears from an edge's lanes, on their threads.
pub(crate) trait LanesOwner: Send + Sync + 'static {
    fn answer(&self, answer: AnswerFrame);
    /// Whether somebody waits for the answer to that frame.
    fn awaits(&self, header: &Header) -> bool;
}

/// The lane in hand.
struct Current {
    lane: Option<Lane>,
    carrier: Carrier<RequestFrame>,
    /// When the last answer came, or the first frame left since none waits.
    heard: Instant,
    /// How many answers have come over it.
    answers: usize,
    /// Hears what the worker makes of an offer.
    reply: Option<oneshot::Sender<Result<(), String>>>,
    /// What lanes that have ended have left unanswered, oldest first, until it is asked again.
    left: VecDeque<RequestFrame>,
    /// An offer that nobody has taken up.
    spare: Option<Offer>,
    /// For people: why there is none.
    state: String,
}

impl Current {
    fn send(&mut self, message: Message) -> bool {
        if self.carrier.is_idle() {
            self.heard = Instant::now();
        }
        let lane = self.lane.as_ref().filter(|_| self.carrier.has_room());
        lane.is_some_and(|lane| lane.sender().send(message))
    }

    fn answered(&mut self, answer: AnswerFrame) -> Option<AnswerFrame> {
        self.heard = Instant::now();
        self.answers += 1;
        self.carrier.answered(answer)
    }
}

/// Some share of one, another for each who asks.
fn share() -> f64 {
    RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64
}

impl Lanes {
    pub fn new(fabric: Arc<dyn Fabric>, hidden: usize) -> Arc<Self> {
        let current = Current {
            lane: None,
            carrier: Carrier::default(),
            heard: Instant::now(),
            answers: 0,
            reply: None,
            left: VecDeque::new(),
            spare: None,
            state: "not offered yet".into(),
        };
        Arc::new(Self { fabric, hidden, current: Mutex::new(current), failures: AtomicU64::new(0) })
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_up(&self) -> bool {
        self.current().carrier.is_up()
    }

    /// For people.
    pub fn describe(&self) -> String {
        let current = self.current();
        if current.carrier.is_up() { "up".into() } else { current.state.clone() }
    }

    /// There can be no lane, for this reason.
    pub fn cannot(&self, reason: String) {
        self.current().state = reason;
    }

    /// Lanes that have failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Gives the frame to the lane, if it has not left ahead. [`Claim::None`]: it has to go over the stream.
    pub fn carry(&self, frame: &RequestFrame) -> Claim {
        let mut current = self.current();
        let claim = current.carrier.claim(&frame.header, || frame.clone());
        if !matches!(claim, Claim::None) || !current.send(Message::Request(frame.clone(), self.hidden)) {
            return claim;
        }
        current.carrier.carry(&frame.header, frame.clone());
        Claim::Carried
    }

    /// Gives the lane a frame of which it is not known yet what it asks. False if it takes none.
    pub fn carry_ahead(&self, frame: AheadFrame) -> bool {
        let (mut current, header) = (self.current(), *frame.header());
        let is_sent = current.send(Message::Ahead(frame));
        if is_sent {
            current.carrier.carry_ahead(&header);
        }
        is_sent
    }

    /// A frame that has left ahead is not claimed any more.
    pub fn forget(&self, header: &Header) {
        self.current().carrier.forget(header);
    }

    /// What the worker says of a lane, over the stream.
    pub fn hear(&self, said: v1::Lane) {
        let mut current = self.current();
        if !current.carrier.has(said.generation) {
            return;
        }
        match said.what {
            Some(What::Wake(sequence)) => current.lane.iter().for_each(|lane| lane.wake(sequence)),
            Some(What::Accepted(_)) => reply(&mut current, Ok(())),
            Some(What::Failed(reason)) if current.reply.is_some() => reply(&mut current, Err(reason)),
            Some(What::Failed(reason)) => match current.lane.as_ref().map(|lane| lane.sender().clone()) {
                Some(lane) => {
                    // Its owner wants the lock.
                    drop(current);
                    lane.fail(&format!("the worker says: {reason}"));
                }
                // It is about to be connected.
                None => drop(current.carrier.fail(said.generation)),
            },
            // An offer is the attention worker's to make.
            Some(What::Offer(_)) | None => {}
        }
    }

    /// Offers lanes, one after the other, as long as it is polled: as long as the stream lives.
    pub async fn keep(self: &Arc<Self>, stream: mpsc::Sender<Outbound>, owner: Arc<dyn LanesOwner>) {
        let mut backoff = BACKOFF_MIN;
        loop {
            match self.run_lane(&stream, &owner).await {
                Ok(()) => backoff = BACKOFF_MIN,
                Err(reason) => self.cannot(reason),
            }
            // Not all lanes of a GPU at a time.
            sleep(backoff.mul_f64(1.0 + share())).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One lane from beginning to end. An error if it was of little use, with the reason.
    async fn run_lane(
        self: &Arc<Self>,
        stream: &mpsc::Sender<Outbound>,
        owner: &Arc<dyn LanesOwner>,
    ) -> Result<(), String> {
        // First of all: of an offer that one side takes up alone, NCCL keeps two threads and two sockets.
        let place = Place::take(&*self.fabric).map_err(|error| error.to_string())?;
        let (reply, replied) = oneshot::channel();
        let generation = self.begin(reply);
        // Ends with the stream, too.
        let _given_up = GivenUp(self, generation);
        let spare = self.current().spare.take();
        let offer = match spare {
            Some(offer) => offer,
            None => self.new_offer().await?,
        };
        let say = |what| stream.send(Outbound::Lane(v1::Lane { generation, what: Some(what) }));
        let gone = |_| "the stream is gone".to_owned();
        say(What::Offer(offer.encode())).await.map_err(gone)?;
        match timeout(OPEN_TIMEOUT, replied).await {
            Ok(Ok(Ok(()))) if watch::is_late() => {
                say(What::Failed(NotOpened::Late.to_string())).await.map_err(gone)?;
                return Err(NotOpened::Late.to_string());
            }
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(reason))) => {
                self.current().spare = Some(offer);
                return Err(format!("the worker says: {reason}"));
            }
            Ok(Err(_)) | Err(_) => {
                say(What::Failed("no word of the offer".into())).await.map_err(gone)?;
                return Err("the worker says nothing of the offer".into());
            }
        }
        let (ended, end) = oneshot::channel();
        let hears = Arc::new(Owner {
            lanes: Arc::downgrade(self),
            generation,
            stream: stream.downgrade(),
            owner: owner.clone(),
            ended: Mutex::new(Some(ended)),
        });
        let lane = Lane::open(self.fabric.clone(), generation, offer, End::Attention, hears, place);
        let reason = match lane.map(|lane| self.take_into_hand(lane)) {
            Ok(Some(lane)) => self.until_ended(&lane, end).await,
            Ok(None) => return Err("the worker has given it up".into()),
            Err(error) => error.to_string(),
        };
        self.take_back(generation);
        self.cannot(reason.clone());
        // If the stream is gone, whoever waits for the frames is told so.
        say(What::Failed(reason.clone())).await.map_err(gone)?;
        self.ask_again(stream, owner).await;
        if self.current().answers < LANE_FRAMES_MAX { Err(reason) } else { Ok(()) }
    }

    fn begin(&self, reply: oneshot::Sender<Result<(), String>>) -> u32 {
        let mut current = self.current();
        (current.reply, current.answers) = (Some(reply), 0);
        current.carrier.offer()
    }

    async fn new_offer(&self) -> Result<Offer, String> {
        let (fabric, hidden) = (self.fabric.clone(), self.hidden);
        // The first id starts the library.
        let offer = tokio::task::spawn_blocking(move || Offer::new(&*fabric, hidden)).await;
        offer.map_err(|error| error.to_string())?
    }

    /// Takes the lane into hand, unless the worker has given it up meanwhile.
    fn take_into_hand(&self, lane: Lane) -> Option<Sender> {
        let sender = lane.sender().clone();
        let mut current = self.current();
        if current.carrier.has(lane.generation()) {
            current.lane = Some(lane);
            return Some(sender);
        }
        // Not with the lock.
        drop(current);
        drop(lane);
        None
    }

    /// Returns when the lane has ended, with the reason.
    async fn until_ended(&self, lane: &Sender, end: oneshot::Receiver<String>) -> String {
        let silence = async {
            self.silence().await;
            lane.fail(&format!("no answer for {ANSWER_TIMEOUT:?}"));
            std::future::pending().await
        };
        let reason = tokio::select! { reason = end => reason, () = silence => unreachable!("it fails the lane") };
        reason.unwrap_or_else(|_| "it has ended".into())
    }

    /// Sends what lanes have left unanswered over the stream, as far as somebody waits for it. Goes on where it was cancelled.
    pub async fn ask_again(&self, stream: &mpsc::Sender<Outbound>, owner: &Arc<dyn LanesOwner>) {
        let (hidden, oldest) = (self.hidden, || self.current().left.front().cloned());
        while let Some(frame) = oldest() {
            if owner.awaits(&frame.header) {
                // It may have to wait for the GPU.
                let encoded = tokio::task::spawn_blocking(move || frame.encode(hidden)).await;
                if let Ok(frame) = encoded {
                    // If the stream is gone, whoever waits is told so.
                    let _ = stream.send(Outbound::Encoded(frame)).await;
                }
            }
            let asked = self.current().left.pop_front();
            // Not with the lock.
            drop(asked);
        }
    }

    /// Returns when the lane in hand has not answered for too long.
    async fn silence(&self) {
        loop {
            let slept = Instant::now();
            sleep(SILENCE_POLL).await;
            let mut current = self.current();
            if slept.elapsed() > 2 * SILENCE_POLL {
                // The process was stopped, and answers are about to be seen.
                current.heard = Instant::now();
            }
            if !current.carrier.is_idle() && current.heard.elapsed() >= ANSWER_TIMEOUT {
                return;
            }
        }
    }

    /// Ends a lane, and keeps what it leaves unanswered.
    fn take_back(&self, generation: u32) {
        let mut current = self.current();
        let left = current.carrier.fail(generation);
        current.left.extend(left.into_iter().flatten());
        let lane = current.lane.take_if(|lane| lane.generation() == generation);
        // Not with the lock.
        drop(current);
        drop(lane);
    }

    /// Forgets what lanes have left unanswered: whoever waits for it knows that the stream has ended.
    pub fn forget_left(&self) {
        let left = std::mem::take(&mut self.current().left);
        // Not with the lock.
        drop(left);
    }
}

/// Passes on what the worker makes of an offer, if somebody waits for that.
fn reply(current: &mut Current, answer: Result<(), String>) {
    if let Some(reply) = current.reply.take() {
        // Whoever waited may be gone.
        let _ = reply.send(answer);
    }
}

/// Ends a lane with the task that runs it.
struct GivenUp<'a>(&'a Lanes, u32);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.take_back(self.1);
    }
}

const SILENCE_POLL: Duration = Duration::from_secs(1);

/// Hears one lane.
struct Owner {
    lanes: Weak<Lanes>,
    generation: u32,
    /// Which may end while the lane's threads still do.
    stream: mpsc::WeakSender<Outbound>,
    owner: Arc<dyn LanesOwner>,
    /// Why.
    ended: Mutex<Option<oneshot::Sender<String>>>,
}

impl LaneOwner for Owner {
    fn up(&self) {
        if let Some(lanes) = self.lanes.upgrade() {
            lanes.current().carrier.up(self.generation);
        }
        tracing::info!(generation = self.generation, "a lane to an expert worker is up");
    }

    fn frame(&self, frame: v1::Frame, values: Payload, lane: &Sender) {
        match AnswerFrame::join(frame, values) {
            Ok(answer) => {
                let Some(lanes) = self.lanes.upgrade() else { return };
                let due = lanes.current().answered(answer);
                due.into_iter().for_each(|answer| self.owner.answer(answer));
            }
            Err(error) => lane.fail(&format!("it sent a frame that is wrong: {error}")),
        }
    }

    fn wake(&self, sequence: u32) {
        let what = Some(What::Wake(sequence));
        // A stream that is gone ends the lane, too.
        if let Some(stream) = self.stream.upgrade() {
            let _ = stream.blocking_send(Outbound::Lane(v1::Lane { generation: self.generation, what }));
        }
    }

    fn failed(&self, reason: &str) {
        tracing::warn!(generation = self.generation, reason, "a lane to an expert worker has failed");
        let Some(lanes) = self.lanes.upgrade() else { return };
        lanes.failures.fetch_add(1, Ordering::Relaxed);
        if let Some(ended) = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Nobody listens if the stream has ended.
            let _ = ended.send(reason.to_owned());
        }
    }
}
