//! One end of a lane: two threads, of which one sends slots and the other waits for them, until the lane fails or is dropped.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use half::bf16;
use moesaic_kernels::cuda::{Device, GpuBytes, Lent, QUARTERS, Split};
use moesaic_proto::limits::FRAME_BYTES_MAX;
use moesaic_proto::v1;
use prost::Message as _;

use super::core::{Departure, Incoming, Kind, Load, Outgoing};
use super::fabric::{Breaker, Channel, Direction, Fabric, Id, Source};
use super::watch::{self, Late, Watched};
use super::*;
use crate::frame::{AheadFrame, AnswerFrame, RequestFrame, Term};
use crate::payload::Payload;

/// Whose end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Attention,
    Expert,
}

/// What both ends have to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    pub requests: Id,
    pub answers: Id,
    /// Bytes of the first slot, and of the largest.
    pub request_slot: usize,
    pub answer_slot: usize,
}

/// Why an offer cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOffer {
    #[error("{0} is no id of 128 bytes")]
    Id(&'static str),
    #[error("slots of {0} bytes; expected {SLOT_TABLE_BYTES} to {FRAME_BYTES_MAX}")]
    Slot(usize),
}

impl Offer {
    /// Of rows of `hidden` values: GPUs ask in bf16 and answer in f32.
    pub fn new(fabric: &dyn Fabric, hidden: usize) -> Result<Self, String> {
        Ok(Self {
            requests: fabric.new_id()?,
            answers: fabric.new_id()?,
            request_slot: slot_bytes(hidden * size_of::<bf16>()),
            answer_slot: slot_bytes(hidden * size_of::<f32>()),
        })
    }

    pub fn decode(offer: &v1::LaneOffer) -> Result<Self, InvalidOffer> {
        let slot = |bytes: u32| {
            let bytes = bytes as usize;
            let fits = (SLOT_TABLE_BYTES..=FRAME_BYTES_MAX).contains(&bytes);
            fits.then_some(bytes).ok_or(InvalidOffer::Slot(bytes))
        };
        Ok(Self {
            requests: offer.requests[..].try_into().map_err(|_| InvalidOffer::Id("requests"))?,
            answers: offer.answers[..].try_into().map_err(|_| InvalidOffer::Id("answers"))?,
            request_slot: slot(offer.request_slot_bytes)?,
            answer_slot: slot(offer.answer_slot_bytes)?,
        })
    }

    pub fn encode(&self) -> v1::LaneOffer {
        v1::LaneOffer {
            requests: self.requests.to_vec(),
            answers: self.answers.to_vec(),
            request_slot_bytes: self.request_slot as u32,
            answer_slot_bytes: self.answer_slot as u32,
        }
    }
}

/// Who hears from a lane, on its threads.
pub trait LaneOwner: Send + Sync + 'static {
    /// Slots have gone both ways.
    fn up(&self);
    /// With its rows beside it; it is in hand until what `lane` says to be in hand is dropped.
    fn frame(&self, frame: v1::Frame, rows: Payload, lane: &Sender);
    /// The other side has to be told, over the stream, that this slot comes.
    fn wake(&self, sequence: u32);
    /// It is of no use any more. Called once, after which nothing else is.
    fn failed(&self, reason: &str);
}

/// A lane. Dropping it ends it, and its owner hears nothing of that.
pub struct Lane {
    sender: Sender,
    state: Arc<State>,
}

struct State {
    generation: u32,
    owner: Arc<dyn LaneOwner>,
    incoming: Mutex<Incoming>,
    /// A slot was announced, or the lane has ended.
    news: Condvar,
    end: Mutex<Ending>,
    /// Has clones for frames that are not answered.
    in_hand: Arc<()>,
}

#[derive(Default)]
struct Ending {
    is_over: bool,
    breakers: Vec<Arc<dyn Breaker>>,
}

/// Gives a lane what it is to send. Clones are for the same one.
#[derive(Clone)]
pub struct Sender {
    messages: SyncSender<Message>,
    state: Weak<State>,
}

pub enum Message {
    /// With the width of a row.
    Request(RequestFrame, usize),
    Ahead(AheadFrame),
    /// The frame is in hand until this has left.
    Answer(AnswerFrame, InHand),
    Warm,
}

/// A frame that is not answered yet, so that its lane is not ended in good order.
pub type InHand = Arc<()>;

/// A frame in a slot.
struct Sent {
    kind: Kind,
    message: Vec<u8>,
    rows: Payload,
    /// Bytes of `rows` that are a table before them.
    table_bytes: usize,
    /// What it answers.
    _in_hand: Option<InHand>,
}

impl Message {
    /// What is sent, if it is not empty.
    fn split(self) -> Option<Sent> {
        let frame = |(message, rows): (v1::Frame, Payload), _in_hand| {
            Some(Sent { kind: Kind::Frame, message: message.encode_to_vec(), rows, table_bytes: 0, _in_hand })
        };
        match self {
            Self::Request(request, hidden) => frame(request.split(hidden), None),
            Self::Answer(answer, in_hand) => frame(answer.split(), Some(in_hand)),
            Self::Ahead(ahead) => {
                let table_bytes = ahead.table_bytes();
                let (message, share) = ahead.split();
                let (message, rows) = (message.encode_to_vec(), Payload::There(vec![share]));
                Some(Sent { kind: Kind::Ahead, message, rows, table_bytes, _in_hand: None })
            }
            Self::Warm => None,
        }
    }
}

impl Sent {
    fn load(&self) -> Load {
        Load::new(self.message.len(), self.rows.len() - self.table_bytes)
    }
}

impl Sender {
    /// Never waits; false if the lane takes nothing more: it has ended, or too much waits to be sent.
    pub fn send(&self, message: Message) -> bool {
        let is_over = self.state.upgrade().is_none_or(|state| state.ending().is_over);
        !is_over && self.messages.try_send(message).is_ok()
    }

    /// To be kept until a frame that has come is answered.
    pub fn in_hand(&self) -> InHand {
        self.state.upgrade().map(|state| state.in_hand.clone()).unwrap_or_default()
    }

    /// Ends the lane; its owner hears why.
    pub fn fail(&self, reason: &str) {
        if let Some(state) = self.state.upgrade() {
            state.fail(reason);
        }
    }
}

impl Lane {
    /// Connects in the background.
    pub fn open(
        fabric: Arc<dyn Fabric>,
        generation: u32,
        offer: Offer,
        end: End,
        owner: Arc<dyn LaneOwner>,
        place: Place,
    ) -> Result<Self, NotOpened> {
        let (sender, messages) = sync_channel(2 * LANE_FRAMES_MAX);
        let (out_slot, in_slot) = match end {
            End::Attention => (offer.request_slot, offer.answer_slot),
            End::Expert => (offer.answer_slot, offer.request_slot),
        };
        let incoming = Mutex::new(Incoming::new(generation, in_slot, FRAME_BYTES_MAX));
        let (news, end_of, in_hand) = (Condvar::new(), Mutex::default(), InHand::default());
        let state = Arc::new(State { generation, owner, incoming, news, end: end_of, in_hand });
        let sender = Sender { messages: sender, state: Arc::downgrade(&state) };
        let lane = Self { sender: sender.clone(), state: state.clone() };
        spawn("lane", move || {
            let _place = place;
            let ended = Ended(state.clone());
            let run = || -> Result<(), String> {
                let deadline = Instant::now() + OPEN_TIMEOUT;
                let connect = |id: &Id, direction| {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let largest = if direction == Direction::Send { out_slot } else { in_slot };
                    // One of a lane that has ended meanwhile is aborted as it begins.
                    let begun = |breaker| state.register(breaker);
                    Watched::connect(&state, || fabric.connect(id, direction, largest, left, &begun))
                };
                // Both ends open them in the same order.
                let (out, mut inbound) = match end {
                    End::Attention => {
                        let requests = connect(&offer.requests, Direction::Send)?;
                        (requests, connect(&offer.answers, Direction::Receive)?)
                    }
                    End::Expert => {
                        let requests = connect(&offer.requests, Direction::Receive)?;
                        (connect(&offer.answers, Direction::Send)?, requests)
                    }
                };
                let sending = Ended(state.clone());
                let sends = move || {
                    if let Err(reason) = sending.0.keep_sending(out, out_slot, &messages) {
                        sending.0.fail(&reason);
                    }
                };
                spawn("lane-send", sends).map_err(|error| NotOpened::Thread(error).to_string())?;
                if end == End::Attention {
                    sender.send(Message::Warm);
                }
                state.keep_receiving(&mut inbound, end, fabric.device(), &sender)
            };
            if let Err(reason) = run() {
                ended.0.fail(&reason);
            }
        })?;
        Ok(lane)
    }

    /// Whether all frames that have come are answered.
    pub fn is_idle(&self) -> bool {
        Arc::strong_count(&self.state.in_hand) == 1
    }

    pub fn generation(&self) -> u32 {
        self.state.generation
    }

    pub fn sender(&self) -> &Sender {
        &self.sender
    }

    /// The other side says that this slot comes.
    pub fn wake(&self, sequence: u32) {
        self.state.incoming().wake(sequence);
        self.state.news.notify_all();
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.state.close();
    }
}

/// Why a lane was not begun.
#[derive(Debug, thiserror::Error)]
pub enum NotOpened {
    #[error("{0} lanes are open or being connected")]
    Many(usize),
    #[error("calls to the GPU's driver do not return")]
    Late,
    #[error("starting a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Of a GPU: a multiprocessor for the receive that waits, and one for what four lanes send.
const LENT: u32 = QUARTERS + 1;

/// Room for a lane among those of this process.
pub struct Place(#[expect(dead_code, reason = "it is what it counts")] Counted);

impl Place {
    pub fn take(fabric: &dyn Fabric) -> Result<Self, NotOpened> {
        if watch::is_late() {
            return Err(NotOpened::Late);
        }
        let lanes_max = fabric.lanes_max();
        Counted::take(&LANES, lanes_max).map(Self).ok_or(NotOpened::Many(lanes_max))
    }
}

/// Ends a lane with one of its threads, however that ends.
struct Ended(Arc<State>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.fail("one of its threads has ended");
    }
}

/// Lanes of this process, and threads of lanes: those that are there or about to be.
static LANES: AtomicUsize = AtomicUsize::new(0);
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// One of what is counted, until it is dropped.
struct Counted(&'static AtomicUsize);

impl Counted {
    /// None if there are `limit` already.
    fn take(of: &'static AtomicUsize, limit: usize) -> Option<Self> {
        let more = |taken| (taken < limit).then_some(taken + 1);
        of.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Self(of))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let counted = Counted::take(&THREADS, usize::MAX);
    let run = move || {
        let _counted = counted;
        run();
    };
    thread::Builder::new().name(name.into()).spawn(run).map(drop)
}

/// What does not end in time waits for other lanes.
fn abort(breaker: &dyn Breaker) {
    if !breaker.abort() {
        watch::end_all();
    }
}

/// Whether lanes of this process still run, or are being ended.
pub(super) fn are_ending() -> bool {
    THREADS.load(Ordering::Acquire) > 0
}

impl State {
    fn incoming(&self) -> MutexGuard<'_, Incoming> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ending(&self) -> MutexGuard<'_, Ending> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, breaker: Arc<dyn Breaker>) {
        let mut ending = self.ending();
        if ending.is_over {
            // Not with the lock: it may take a while.
            drop(ending);
            return abort(&*breaker);
        }
        ending.breakers.push(breaker);
    }

    fn fail(&self, reason: &str) {
        if self.close() {
            self.owner.failed(reason);
        }
    }

    /// Whether it was open until now. What waits on its channels ends, in the background.
    fn close(&self) -> bool {
        let breakers = {
            let mut ending = self.ending();
            if std::mem::replace(&mut ending.is_over, true) {
                return false;
            }
            std::mem::take(&mut ending.breakers)
        };
        // Aborting may take a while: NCCL frees memory, for which it waits until nothing runs on the GPU, and so until the
        // other is aborted, too.
        for breaker in breakers {
            if let Err(error) = spawn("lane-abort", move || abort(&*breaker)) {
                tracing::error!(%error, "a lane could not be aborted: no thread");
            }
        }
        // With the lock, so that who looks and then waits hears it.
        drop(self.incoming());
        self.news.notify_all();
        true
    }

    fn keep_sending(
        &self,
        mut channel: Watched,
        slot_bytes: usize,
        messages: &Receiver<Message>,
    ) -> Result<(), String> {
        let mut outgoing = Outgoing::new(self.generation, slot_bytes);
        while !self.ending().is_over {
            let (Departure { head, slot_bytes, wakes }, frame) = match messages.recv_timeout(IDLE_AFTER) {
                Ok(message) => match message.split() {
                    Some(frame) => (outgoing.send(frame.kind, frame.load()), Some(frame)),
                    None => (outgoing.send(Kind::Warm, Load::default()), None),
                },
                Err(RecvTimeoutError::Timeout) => match outgoing.idle() {
                    Some(departure) => (departure, None),
                    None => continue,
                },
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let (head_bytes, place) = (head.encode(), head.load.place(head.kind, slot_bytes));
            let mut slot = vec![(0, Source::Here(&head_bytes))];
            let mut behind = Vec::new();
            if let Some(Sent { message, rows, table_bytes, .. }) = &frame {
                let parts = if place.behind.is_some() { &mut behind } else { &mut slot };
                parts.push((place.message, Source::Here(message)));
                parts.extend(parts_of(rows, place.rows - table_bytes));
            }
            if wakes {
                self.owner.wake(head.sequence);
            }
            let timeout = if head.kind == Kind::Warm { OPEN_TIMEOUT } else { SEND_TIMEOUT };
            channel.send(slot_bytes, &slot, timeout)?;
            if let Some(bytes) = place.behind {
                channel.send(bytes, &behind, SEND_TIMEOUT)?;
            }
        }
        Ok(())
    }

    fn keep_receiving(
        &self,
        channel: &mut dyn Channel,
        end: End,
        device: Option<&Device>,
        sender: &Sender,
    ) -> Result<(), String> {
        let mut start = [0; SLOT_TABLE_BYTES];
        let mut timeout = Some(OPEN_TIMEOUT);
        let mut lent = None;
        while self.wait_for_slot(&mut lent) {
            // What waits keeps a multiprocessor busy until it parks.
            lent = lent.take().or_else(|| device.map(|device| device.lend(LENT)));
            let slot_bytes = self.incoming().slot_bytes();
            channel.receive(slot_bytes, &mut start, timeout.take())?;
            let (head, rest) = start.split_first_chunk().ok_or("a slot without room for its head")?;
            let head = self.incoming().receive(head).map_err(|fault| fault.to_string())?;
            let (Load { message, rows }, place) = (head.load, head.load.place(head.kind, slot_bytes));
            match head.kind {
                Kind::Park => {}
                Kind::Warm => {
                    if end == End::Expert {
                        sender.send(Message::Warm);
                    }
                    self.owner.up();
                }
                Kind::Frame => {
                    let message = match place.behind {
                        None => rest[..message as usize].to_vec(),
                        Some(bytes) => {
                            let mut taken = vec![0; message as usize];
                            channel.receive(bytes, &mut taken, Some(WRITTEN_TIMEOUT + SEND_TIMEOUT))?;
                            taken
                        }
                    };
                    let frame = v1::Frame::decode(Bytes::from(message)).map_err(|error| error.to_string())?;
                    let rows = take_rows(channel, place.rows, rows as usize, device)?;
                    self.owner.frame(frame, rows, sender);
                }
                Kind::Ahead => {
                    if let Some(bytes) = place.behind {
                        channel.receive(bytes, &mut start, Some(WRITTEN_TIMEOUT + SEND_TIMEOUT))?;
                    }
                    let (frame, bytes) = taken_ahead(&start, place.message, head.load)?;
                    if bytes > 0 {
                        let rows = take_rows(channel, SLOT_TABLE_BYTES, bytes, device)?;
                        self.owner.frame(frame, rows, sender);
                    }
                }
            }
        }
        Ok(())
    }

    /// False when the lane has ended. Nothing stays lent while no slot is due.
    fn wait_for_slot(&self, lent: &mut Option<Lent>) -> bool {
        let mut incoming = self.incoming();
        loop {
            if self.ending().is_over {
                return false;
            }
            if incoming.is_awaited() {
                return true;
            }
            *lent = None;
            let waited = self.news.wait_timeout(incoming, Duration::from_secs(60));
            incoming = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The frame that was sent ahead, with its rows' choices as terms, and how many bytes of rows it has: none, where no row chose an
/// expert of this worker. `start` is what comes before the rows, with the frame's message at byte `at`.
pub fn taken_ahead(start: &[u8], at: usize, load: Load) -> Result<(v1::Frame, usize), String> {
    let (message_end, rows) = (at + load.message as usize, load.rows as usize);
    let message = start.get(at..message_end).ok_or("a frame that was sent ahead has no room for its message")?;
    let frame = v1::Frame::decode(Bytes::copy_from_slice(message)).map_err(|error| error.to_string())?;
    let choices = frame.choices.as_ref().ok_or("a frame that was sent ahead says no choices")?;
    let (top_k, room) = (choices.top_k as usize, choices.room as usize);
    if room == 0 || !rows.is_multiple_of(room) {
        return Err(format!("a frame that was sent ahead has room for {room} rows, in {rows} bytes"));
    }
    // Of so many none has room.
    let table_bytes = Split::table_bytes(room.min(SLOT_TABLE_BYTES), top_k.min(SLOT_TABLE_BYTES));
    let at = SLOT_TABLE_BYTES.checked_sub(table_bytes).filter(|at| *at >= message_end);
    let at = at.ok_or_else(|| format!("a slot has no room for a table of {room} rows with {top_k} choices each"))?;
    let (count, choices) = start[at..].split_at(Split::CHOICES);
    let count = count.first_chunk().map_or(0, |count| u32::from_le_bytes(*count)) as usize;
    if count > room {
        return Err(format!("a frame that was sent ahead has {count} rows; expected at most {room}"));
    }
    let terms = Bytes::copy_from_slice(&choices[..count * top_k * size_of::<Term>()]);
    Ok((v1::Frame { terms, ..frame }, rows / room * count))
}

/// Rows as parts of a message, one after the other from byte `at` on.
fn parts_of(rows: &Payload, mut at: usize) -> Vec<(usize, Source<'_>)> {
    let pieces = match rows {
        Payload::Here(bytes) if bytes.is_empty() => return Vec::new(),
        Payload::Here(bytes) => return vec![(at, Source::Here(bytes))],
        Payload::There(pieces) => pieces,
    };
    let part = |piece| {
        at += GpuBytes::len(piece);
        (at - piece.len(), Source::There(piece))
    };
    pieces.iter().map(part).collect()
}

/// Rows of the message that came last: on the GPU, if it has room.
fn take_rows(channel: &mut dyn Channel, at: usize, bytes: usize, device: Option<&Device>) -> Result<Payload, String> {
    let room = device.filter(|_| bytes > 0).and_then(|device| Some((device, device.buffer_if_free(bytes).ok()?)));
    let Some((device, to)) = room else {
        let mut rows = vec![0; bytes];
        if bytes > 0 {
            channel.take(at, &mut rows)?;
        }
        return Ok(Payload::Here(rows.into()));
    };
    channel.take_there(at, to).map(|to| Payload::There(vec![GpuBytes::new(device, to)]))
}

impl Late for State {
    fn end(&self) -> bool {
        self.close()
    }

    fn tell(&self) {
        self.owner.failed(&NotOpened::Late.to_string());
    }
}

#[cfg(test)]
mod tests;
