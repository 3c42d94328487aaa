//! A lane's decisions, without its bytes: what a slot says, which slot comes next, and when a side may stop waiting.
//!
//! Each direction is a row of slots, numbered from 0 on. The receiving side waits for the next slot all the time, so that it
//! costs nothing to begin one; a sender that falls idle *parks*: it sends a slot that says so, and says over the stream
//! which slot comes, before it sends that one. A slot's size has to be known before it comes: the slot before it says it, by
//! what the frames before took.

use std::collections::{HashMap, VecDeque};

use super::{LANE_FRAMES_MAX, SLOT_TABLE_BYTES};
use crate::frame::{AnswerFrame, Header};
use crate::tracker::FrameKey;

/// The beginning of a slot; all numbers are little-endian.
///
/// ```text
/// magic u32, generation u32, sequence u32, kind u32
/// message u32, rows u32     bytes of a frame's message and rows
/// next u32                  bytes of the slot that follows
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub generation: u32,
    pub sequence: u32,
    pub kind: Kind,
    pub load: Load,
    pub next: u32,
}

/// Bytes of what a slot brings, in it or behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// A frame's message, without its rows.
    pub message: u32,
    pub rows: u32,
}

/// Where a load lies: both parts in the slot, or both in a second message of `behind` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub message: usize,
    pub rows: usize,
    pub behind: Option<usize>,
}

impl Load {
    pub fn new(message: usize, rows: usize) -> Self {
        Self { message: message as u32, rows: rows as u32 }
    }

    pub fn bytes(self) -> usize {
        self.message as usize + self.rows as usize
    }

    /// In a slot of so many bytes, or behind it. Rows begin where a GPU reads them at full speed; those that were sent ahead begin
    /// at the same byte in any case, since a table is before them.
    pub fn place(self, kind: Kind, slot_bytes: usize) -> Place {
        let (message, rows) = (self.message as usize, self.rows as usize);
        if Head::LEN + message <= SLOT_TABLE_BYTES && SLOT_TABLE_BYTES + rows <= slot_bytes {
            return Place { message: Head::LEN, rows: SLOT_TABLE_BYTES, behind: None };
        }
        let start = if kind == Kind::Ahead { SLOT_TABLE_BYTES } else { message.next_multiple_of(ROWS_ALIGNMENT) };
        Place { message: 0, rows: start, behind: Some(start + rows) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A frame.
    Frame = 0,
    /// Nothing: the first of a lane.
    Warm = 1,
    /// Nothing, and nothing comes behind it until it is said over the stream.
    Park = 2,
    /// A frame whose sender does not know what its rows chose. It has room for some, and a table before them says how many there
    /// are.
    Ahead = 3,
}

/// How slots are laid out, and how lanes are agreed on; the last byte counts how often that has changed.
pub const LAYOUT: [u8; 4] = *b"MSL5";
const MAGIC: u32 = u32::from_le_bytes(LAYOUT);

const ROWS_ALIGNMENT: usize = 256;

/// Why a lane cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("a slot begins with {0:#010x}, which is none")]
    Magic(u32),
    #[error("a slot of kind {0}")]
    Kind(u32),
    #[error("a slot of lane {given} came over lane {expected}")]
    Generation { given: u32, expected: u32 },
    #[error("slot {given} came where {expected} was due")]
    Sequence { given: u32, expected: u32 },
    #[error("a load of {given} bytes; expected at most {limit}")]
    Load { given: usize, limit: usize },
    #[error("a slot of {given} bytes is to follow; expected {SLOT_TABLE_BYTES} to {limit}")]
    Next { given: usize, limit: usize },
}

impl Head {
    pub const LEN: usize = 28;

    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let Load { message, rows } = self.load;
        let words = [MAGIC, self.generation, self.sequence, self.kind as u32, message, rows, self.next];
        for (to, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        bytes
    }

    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Fault> {
        let mut words = [0; Self::LEN / 4];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        let [magic, generation, sequence, kind, message, rows, next] = words;
        let kind = match (magic, kind) {
            (MAGIC, 0) => Kind::Frame,
            (MAGIC, 1) => Kind::Warm,
            (MAGIC, 2) => Kind::Park,
            (MAGIC, 3) => Kind::Ahead,
            (MAGIC, other) => return Err(Fault::Kind(other)),
            (other, _) => return Err(Fault::Magic(other)),
        };
        Ok(Self { generation, sequence, kind, load: Load { message, rows }, next })
    }
}

/// The sending side.
#[derive(Debug)]
pub struct Outgoing {
    generation: u32,
    next: u32,
    is_parked: bool,
    sizes: Sizes,
}

/// A slot that is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Departure {
    pub head: Head,
    pub slot_bytes: usize,
    /// The other side has to be told first.
    pub wakes: bool,
}

impl Outgoing {
    /// `slot_bytes`: of the first slot, and of the largest.
    pub fn new(generation: u32, slot_bytes: usize) -> Self {
        let sizes = Sizes { largest: slot_bytes, late: VecDeque::new() };
        Self { generation, next: 0, is_parked: false, sizes }
    }

    pub fn send(&mut self, kind: Kind, load: Load) -> Departure {
        let (sequence, wakes, slot_bytes) = (self.next, self.is_parked, self.sizes.slot_bytes());
        self.next = self.next.wrapping_add(1);
        self.is_parked = kind == Kind::Park;
        self.sizes.leaves(load);
        let next = self.sizes.slot_bytes() as u32;
        Departure { head: Head { generation: self.generation, sequence, kind, load, next }, slot_bytes, wakes }
    }

    /// There has been nothing to send for a while: what is to be sent now, if anything.
    pub fn idle(&mut self) -> Option<Departure> {
        (!self.is_parked).then(|| self.send(Kind::Park, Load::default()))
    }
}

/// How large slots are: as the largest of the last frames needs it. What has no room in the largest slot comes behind one anyway.
#[derive(Debug)]
struct Sizes {
    largest: usize,
    /// What the last frames needed, in bytes.
    late: VecDeque<usize>,
}

impl Sizes {
    /// Frames of a step, of which a model has one for each layer.
    const LATE: usize = 64;
    const STEP: usize = 4096;

    /// Of the next slot.
    fn slot_bytes(&self) -> usize {
        self.late.iter().copied().max().unwrap_or(self.largest)
    }

    fn leaves(&mut self, load: Load) {
        let needed = (SLOT_TABLE_BYTES + load.rows as usize).next_multiple_of(Self::STEP);
        if load.rows > 0 && needed <= self.largest {
            if self.late.len() == Self::LATE {
                self.late.pop_front();
            }
            self.late.push_back(needed);
        }
    }
}

/// The receiving side.
#[derive(Debug)]
pub struct Incoming {
    generation: u32,
    load_max: usize,
    largest: usize,
    slot_bytes: usize,
    next: u32,
    is_parked: bool,
    /// The last slot that was announced over the stream, which may overtake the slots before it.
    woken: Option<u32>,
}

impl Incoming {
    /// `slot_bytes`: of the first slot, and of the largest.
    pub fn new(generation: u32, slot_bytes: usize, load_max: usize) -> Self {
        let (next, is_parked, woken) = (0, false, None);
        Self { generation, load_max, largest: slot_bytes, slot_bytes, next, is_parked, woken }
    }

    /// Of the next slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Whether the next slot is to be waited for: what comes before an announced one is on its way, too.
    pub fn is_awaited(&self) -> bool {
        !self.is_parked || self.woken.is_some_and(|woken| woken.wrapping_sub(self.next) < 1 << 31)
    }

    /// The slot of that number comes.
    pub fn wake(&mut self, sequence: u32) {
        self.woken = Some(sequence);
    }

    /// A slot has come.
    pub fn receive(&mut self, head: &[u8; Head::LEN]) -> Result<Head, Fault> {
        let head = Head::decode(head)?;
        let (given, expected) = (head.generation, self.generation);
        if given != expected {
            return Err(Fault::Generation { given, expected });
        }
        let (given, expected) = (head.sequence, self.next);
        if given != expected {
            return Err(Fault::Sequence { given, expected });
        }
        let limit = if matches!(head.kind, Kind::Frame | Kind::Ahead) { self.load_max } else { 0 };
        let given = head.load.bytes();
        if given > limit {
            return Err(Fault::Load { given, limit });
        }
        let (given, limit) = (head.next as usize, self.largest);
        if !(SLOT_TABLE_BYTES..=limit).contains(&given) {
            return Err(Fault::Next { given, limit });
        }
        self.slot_bytes = given;
        self.next = self.next.wrapping_add(1);
        self.is_parked = head.kind == Kind::Park;
        Ok(head)
    }
}

/// The attention worker's end: which frames a lane carries, and what is to be asked again when it fails. Numbers the lanes of
/// an edge; what is said of another one than that in hand changes nothing.
#[derive(Debug)]
pub struct Carrier<F> {
    generation: u32,
    /// That lane has not failed.
    is_in_hand: bool,
    is_up: bool,
    carried: HashMap<FrameKey, F>,
    /// Frames that have left, of which it is not known yet what they ask; with answers that were faster.
    ahead: HashMap<FrameKey, Option<AnswerFrame>>,
}

/// What becomes of a frame that is to be sent.
#[derive(Debug)]
pub enum Claim {
    /// It has not left.
    None,
    /// It has left ahead, and is carried now.
    Carried,
    /// It has been answered, too.
    Answered(AnswerFrame),
}

impl<F> Default for Carrier<F> {
    fn default() -> Self {
        Self { generation: 0, is_in_hand: false, is_up: false, carried: HashMap::new(), ahead: HashMap::new() }
    }
}

impl<F> Carrier<F> {
    /// The number of a new lane, after the one before has failed.
    pub fn offer(&mut self) -> u32 {
        self.generation += 1;
        self.is_in_hand = true;
        self.generation
    }

    /// Whether that lane is the one in hand.
    pub fn has(&self, generation: u32) -> bool {
        self.is_in_hand && generation == self.generation
    }

    /// Slots have gone both ways. Says nothing of a lane that has failed meanwhile.
    pub fn up(&mut self, generation: u32) {
        self.is_up |= self.has(generation);
    }

    pub fn is_up(&self) -> bool {
        self.is_up
    }

    /// Whether no frame of its waits for an answer.
    pub fn is_idle(&self) -> bool {
        self.carried.is_empty() && self.ahead.is_empty()
    }

    /// Whether one more frame may take the lane.
    pub fn has_room(&self) -> bool {
        self.is_up && self.carried.len() + self.ahead.len() < LANE_FRAMES_MAX
    }

    /// The lane has taken a frame, and is there room for it.
    pub fn carry(&mut self, header: &Header, frame: F) {
        self.carried.insert(FrameKey::of(header), frame);
    }

    /// The lane has taken a frame of which it is not known yet what it asks, and is there room for it.
    pub fn carry_ahead(&mut self, header: &Header) {
        self.ahead.insert(FrameKey::of(header), None);
    }

    /// What a frame asks is known; it need not be sent if it has left ahead. `frame` is kept then.
    pub fn claim(&mut self, header: &Header, frame: impl FnOnce() -> F) -> Claim {
        let key = FrameKey::of(header);
        match self.ahead.remove(&key) {
            None => Claim::None,
            Some(None) => {
                self.carried.insert(key, frame());
                Claim::Carried
            }
            Some(Some(answer)) => Claim::Answered(answer),
        }
    }

    /// A frame that has left ahead asks nothing, or nobody wants it any more.
    pub fn forget(&mut self, header: &Header) {
        self.ahead.remove(&FrameKey::of(header));
    }

    /// An answer has come. It is given back, unless it came before it was known what its frame asks.
    pub fn answered(&mut self, answer: AnswerFrame) -> Option<AnswerFrame> {
        let key = FrameKey::of(&answer.header);
        if let Some(early) = self.ahead.get_mut(&key) {
            *early = Some(answer);
            return None;
        }
        self.carried.remove(&key);
        Some(answer)
    }

    /// What the lane leaves unanswered, oldest first; `None` if another one is in hand.
    pub fn fail(&mut self, generation: u32) -> Option<Vec<F>> {
        if !self.has(generation) {
            return None;
        }
        (self.is_in_hand, self.is_up) = (false, false);
        // These are sent once it is known what they ask.
        self.ahead.clear();
        let mut left: Vec<_> = self.carried.drain().collect();
        left.sort_unstable_by_key(|(key, _)| key.sequence);
        Some(left.into_iter().map(|(_, frame)| frame).collect())
    }
}

#[cfg(test)]
mod tests;
