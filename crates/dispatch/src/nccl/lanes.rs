//! The attention worker's end of an edge's lanes, one after the other: which frames they carry, and what becomes of those when
//! a lane fails.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use moesaic_proto::v1::{self, lane::What};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::core::{Carrier, Claim};
use super::lane::{End, Lane, LaneOwner, Message, Offer, Sender};
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

/// The lane in hand.
struct Current {
    lane: Option<Lane>,
    carrier: Carrier<RequestFrame>,
    /// When the last answer came, or the first frame left since none waits.
    heard: Instant,
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
        self.carrier.answered(answer)
    }
}

/// Some share of one, another for each who asks.
fn share() -> f64 {
    RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64
}

/// Passes an answer on; called on a lane's thread.
type Deliver = Arc<dyn Fn(AnswerFrame) + Send + Sync>;

impl Lanes {
    pub fn new(fabric: Arc<dyn Fabric>, hidden: usize) -> Arc<Self> {
        let (carrier, heard, state) = (Carrier::default(), Instant::now(), "not offered yet".into());
        let current = Current { lane: None, carrier, heard, state };
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
        let current = self.current();
        let Some(lane) = current.lane.as_ref().filter(|lane| lane.generation() == said.generation) else { return };
        match said.what {
            Some(What::Wake(sequence)) => lane.wake(sequence),
            Some(What::Failed(reason)) => {
                let lane = lane.sender().clone();
                // Its owner wants the lock.
                drop(current);
                lane.fail(&format!("the worker says: {reason}"));
            }
            // An offer is the attention worker's to make.
            Some(What::Offer(_)) | None => {}
        }
    }

    /// Offers lanes, one after the other, as long as it is polled: as long as the stream lives.
    pub async fn keep(self: &Arc<Self>, stream: mpsc::Sender<Outbound>, deliver: Deliver) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let was_up = self.run_lane(&stream, &deliver).await;
            if was_up {
                backoff = BACKOFF_MIN;
            }
            // Not all lanes of a GPU at a time.
            sleep(backoff.mul_f64(1.0 + share())).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One lane from beginning to end; whether it was up.
    async fn run_lane(self: &Arc<Self>, stream: &mpsc::Sender<Outbound>, deliver: &Deliver) -> bool {
        let (ended, end) = oneshot::channel();
        let generation = self.current().carrier.offer();
        // Ends with the stream, too: its frames are the stream's loss.
        let _given_up = GivenUp(self, generation);
        let fabric = self.fabric.clone();
        let hidden = self.hidden;
        // The first id starts the library.
        let offer = tokio::task::spawn_blocking(move || Offer::new(&*fabric, hidden)).await;
        let offer = match offer.map_err(|error| error.to_string()).and_then(|offer| offer) {
            Ok(offer) => offer,
            Err(reason) => return self.note(reason),
        };
        let what = Some(What::Offer(offer.encode()));
        if stream.send(Outbound::Lane(v1::Lane { generation, what })).await.is_err() {
            return self.note("the stream is gone".into());
        }
        let owner = Arc::new(Owner {
            lanes: Arc::downgrade(self),
            generation,
            stream: stream.clone(),
            deliver: deliver.clone(),
            ended: Mutex::new(Some(ended)),
        });
        let lane = match Lane::open(self.fabric.clone(), generation, offer, End::Attention, owner) {
            Ok(lane) => lane,
            Err(error) => return self.note(error.to_string()),
        };
        let sender = lane.sender().clone();
        self.current().lane = Some(lane);
        let watch = async {
            self.silence().await;
            sender.fail(&format!("no answer for {ANSWER_TIMEOUT:?}"));
            std::future::pending().await
        };
        let ended = tokio::select! { ended = end => ended, () = watch => unreachable!("it fails the lane") };
        let (reason, was_up) = ended.unwrap_or_else(|_| ("its threads have ended".into(), false));
        let back = self.take_back(generation);
        self.cannot(reason.clone());
        let said = Outbound::Lane(v1::Lane { generation, what: Some(What::Failed(reason)) });
        for message in [said].into_iter().chain(back.into_iter().map(Outbound::Frame)) {
            // If the stream is gone, whoever waits for the frames is told so.
            let _ = stream.send(message).await;
        }
        was_up
    }

    /// Returns when the lane in hand has not answered for too long.
    async fn silence(&self) {
        let is_silent = || {
            let current = self.current();
            !current.carrier.is_idle() && current.heard.elapsed() >= ANSWER_TIMEOUT
        };
        while !is_silent() {
            sleep(ANSWER_TIMEOUT / 10).await;
        }
    }

    fn note(&self, reason: String) -> bool {
        self.cannot(reason);
        false
    }

    /// Ends a lane, and says which frames it leaves unanswered, oldest first.
    fn take_back(&self, generation: u32) -> Vec<RequestFrame> {
        let mut current = self.current();
        let left = current.carrier.fail(generation);
        let lane = current.lane.take_if(|lane| lane.generation() == generation);
        // Not with the lock.
        drop(current);
        drop(lane);
        left.unwrap_or_default()
    }
}

/// Ends a lane with the task that runs it.
struct GivenUp<'a>(&'a Lanes, u32);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.take_back(self.1);
    }
}

/// Hears one lane.
struct Owner {
    lanes: Weak<Lanes>,
    generation: u32,
    stream: mpsc::Sender<Outbound>,
    deliver: Deliver,
    /// Why, and whether it was up.
    ended: Mutex<Option<oneshot::Sender<(String, bool)>>>,
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
                due.into_iter().for_each(|answer| (self.deliver)(answer));
            }
            Err(error) => lane.fail(&format!("it sent a frame that is wrong: {error}")),
        }
    }

    fn wake(&self, sequence: u32) {
        let what = Some(What::Wake(sequence));
        // A stream that is gone ends the lane, too.
        let _ = self.stream.blocking_send(Outbound::Lane(v1::Lane { generation: self.generation, what }));
    }

    fn failed(&self, reason: &str) {
        tracing::warn!(generation = self.generation, reason, "a lane to an expert worker has failed");
        let Some(lanes) = self.lanes.upgrade() else { return };
        lanes.failures.fetch_add(1, Ordering::Relaxed);
        let was_up = lanes.is_up();
        if let Some(ended) = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Nobody listens if the stream has ended.
            let _ = ended.send((reason.to_owned(), was_up));
        }
    }
}
