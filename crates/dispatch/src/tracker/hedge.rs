//! Asking twice: of others what a silent or late worker was asked, and of a slow worker what others compute.

use std::time::Duration;

use moesaic_proto::WorkerId;

use super::call::{PartId, Sent};
use super::health::Rank;
use super::{CallId, FrameKey, NOWHERE, Tracker, Turn, Why};
use crate::frame::{Header, RequestFrame};
use crate::plan;

impl Tracker {
    /// Asks others as well for a frame whose worker is silent; or late, once at a time and while there is credit.
    pub(super) fn hedge(&mut self, turn: &mut Turn, key: FrameKey) {
        let Some(Sent { part: id, to, terms, at, .. }) = self.frames.get(&key) else { return };
        let id = *id;
        let is_silent = self.is_silent(key, turn.now);
        let is_late = turn.now > *at + self.health.late_after(&to.worker, *terms);
        let Some(part) = self.part(id) else { return };
        let terms = part.frame.terms().len() as f64;
        let is_hedged = if is_silent {
            // Where it waits for a holder already, it is looked for when that is due.
            part.retry_at.is_none() && self.retry(turn, id)
        } else if is_late && part.tries.len() == 1 && self.credit >= terms {
            let asked = self.asked(id);
            let is_asked = self.ask(turn, id, &asked, Rank::Slow, Why::Hedge);
            self.credit -= if is_asked { terms } else { 0.0 };
            is_asked
        } else {
            false
        };
        if is_hedged && let Some(sent) = self.frames.get(&key) {
            self.health.detour(&sent.to.worker, |detours| detours.hedged += 1);
        }
    }

    /// Whether nobody computes a part, or only silent workers do.
    pub(super) fn is_stuck(&self, now: Duration, id: PartId) -> bool {
        let Some(call) = self.calls.get(&id.call) else { return false };
        let part = &call.parts[id.index];
        part.answer.is_none() && part.tries.iter().all(|t| t.keys.iter().any(|key| self.is_silent(*key, now)))
    }

    fn is_silent(&self, key: FrameKey, now: Duration) -> bool {
        self.frames.get(&key).is_some_and(|sent| self.health.rank(&sent.to, now) >= Rank::Silent)
    }

    /// Who computes a part at present, or has failed it.
    pub(super) fn asked(&self, id: PartId) -> Vec<WorkerId> {
        let Some(call) = self.calls.get(&id.call) else { return Vec::new() };
        let part = &call.parts[id.index];
        let keys = part.tries.iter().flat_map(|t| &t.keys);
        let asked = keys.filter_map(|key| self.frames.get(key)).map(|sent| sent.to.worker.clone());
        asked.chain(part.tried.iter().cloned()).collect()
    }

    /// Now and then a slow worker, which is not asked any more, gets a copy of what others compute: it may be well again.
    /// Nobody waits for its answer, which only tells how long it took.
    pub(super) fn probe(&mut self, turn: &mut Turn, id: CallId) {
        let Some(ways) = self.ways.clone() else { return };
        for worker in 0..ways.placement().workers().len() as u32 {
            let due = ways.destination(worker).filter(|to| self.health.is_probe_due(to, turn.now));
            let Some(to) = due else { continue };
            self.health.probed(to, turn.now);
            let Some(call) = self.calls.get(&id) else { return };
            let held = |expert| {
                let is_held = ways.placement().holders(call.layer, expert).contains(&worker);
                if is_held { worker } else { NOWHERE }
            };
            let copy = |index: usize| {
                let frame = &call.parts[index].frame;
                let mut parts = plan::resplit(&call.layout, frame, held).parts.into_iter();
                let content = parts.find(|part| part.worker == worker)?.content;
                let header = Header { epoch: ways.epoch(), ..frame.header };
                let copy = RequestFrame::new(header, frame.activations().clone(), call.layout.hidden, content);
                Some((PartId { call: id, index }, copy.within(frame.traceparent())))
            };
            let copies = (0..call.parts.len()).filter_map(copy);
            let Some((part, frame)) = copies.max_by_key(|(_, frame)| frame.terms().len()) else { continue };
            let (terms, is_asked) = (frame.terms().len() as f64, self.asked(part).contains(&to.worker));
            if !is_asked && self.credit >= terms {
                self.credit -= terms;
                let probe = self.send_one(turn, part, to.clone(), frame, Why::Hedge);
                self.given_up.insert(FrameKey::of(&probe.header), probe);
            }
        }
    }
}
