//! One end of a lane: `Outgoing` and `Incoming` of the product, over a stream of its own beside that of the edge. A slot that
//! comes before its receive is queued waits, as in NCCL.

use std::collections::VecDeque;
use std::time::Duration;

use moesaic_dispatch::nccl::core::{self, Departure, Fault, Head, Incoming, Kind, Outgoing};
use moesaic_dispatch::{AnswerFrame, RequestFrame};

use super::messages::Message;
use super::net::{Context, StreamId};

const IDLE_AFTER: Duration = Duration::from_millis(200);
/// Rows are a byte here.
const SLOT_BYTES: usize = 16 << 10;

/// See the module.
pub struct Lane {
    pub generation: u32,
    pub stream: StreamId,
    /// The edge's.
    pub beside: StreamId,
    outgoing: Outgoing,
    incoming: Incoming,
    waiting: VecDeque<Slot>,
    sent: Duration,
}

#[derive(Clone, Debug)]
pub struct Slot {
    head: [u8; Head::LEN],
    load: Load,
}

/// What is in a slot.
#[derive(Clone, Debug)]
pub enum Load {
    Nothing,
    Frame(RequestFrame),
    Answer(AnswerFrame),
}

impl Lane {
    pub fn new(context: &mut Context<'_>, generation: u32, stream: StreamId, beside: StreamId) -> Self {
        context.wake(IDLE_AFTER, "lane idle", stream.0);
        Self {
            generation,
            stream,
            beside,
            outgoing: Outgoing::new(generation, SLOT_BYTES),
            incoming: Incoming::new(generation, SLOT_BYTES, 1),
            waiting: VecDeque::new(),
            sent: context.now,
        }
    }

    pub fn send(&mut self, context: &mut Context<'_>, load: Load) {
        let (kind, rows) = if matches!(load, Load::Nothing) { (Kind::Warm, 0) } else { (Kind::Frame, 1) };
        let departure = self.outgoing.send(kind, core::Load::new(0, rows));
        self.depart(context, departure, load);
    }

    fn depart(&mut self, context: &mut Context<'_>, Departure { head, wakes, .. }: Departure, load: Load) {
        if wakes {
            let (generation, sequence) = (self.generation, head.sequence);
            context.send(self.beside, Message::LaneWake { generation, sequence });
        }
        self.sent = context.now;
        context.send(self.stream, Message::Slot(Box::new(Slot { head: head.encode(), load })));
    }

    /// It is time to look whether it has been idle.
    pub fn look(&mut self, context: &mut Context<'_>) {
        if context.now >= self.sent + IDLE_AFTER
            && let Some(departure) = self.outgoing.idle()
        {
            self.depart(context, departure, Load::Nothing);
        }
        context.wake(IDLE_AFTER, "lane idle", self.stream.0);
    }

    pub fn arrive(&mut self, slot: Slot) {
        self.waiting.push_back(slot);
    }

    pub fn wake(&mut self, sequence: u32) {
        self.incoming.wake(sequence);
    }

    /// The next load that is received; a first slot has none.
    pub fn receive(&mut self) -> Result<Option<(Kind, Load)>, Fault> {
        while self.incoming.is_awaited()
            && let Some(slot) = self.waiting.pop_front()
        {
            match self.incoming.receive(&slot.head)?.kind {
                Kind::Park => {}
                kind => return Ok(Some((kind, slot.load))),
            }
        }
        Ok(None)
    }
}
