//! Rows that leave for their experts before the processor knows which those are: a GPU splits them by the choices that it has just
//! made, and lanes carry its shares. What each of them asks is worked out here meanwhile.

use std::sync::Arc;

use half::bf16;
use moesaic_kernels::cuda::{GpuBytes, GpuError, NOBODY, Split};
use moesaic_proto::ExpertId;

use super::{Inner, LayerCall, Turn};
use crate::frame::{AheadFrame, Header, RequestFrame, Rows};
use crate::nccl::{SLOT_ROWS, SLOT_TABLE_BYTES};
use crate::plan::{Layout, Part};
use crate::tracker::Destination;

/// A layer call that has begun, and what of its rows has left. Whoever drops it without [`super::Dispatcher::dispatch_layer`] wants
/// none of their answers.
pub struct Ahead {
    inner: Arc<Inner>,
    /// Until the call is made.
    pub(super) turn: Option<Turn>,
    /// Where frames have gone of which it is not known yet what they ask.
    sent: Vec<(u32, Destination, AheadFrame)>,
}

impl Ahead {
    /// `split` has the GPU split the rows, if it has room. Nothing leaves where there are no lanes, or where it would not pay; there is
    /// no call without a placement.
    pub(super) fn send<E>(
        inner: &Arc<Inner>,
        call: &LayerCall,
        rows: usize,
        split: impl FnOnce(&Split<'_>) -> Result<Option<GpuBytes>, E>,
    ) -> Result<Option<Self>, E> {
        let experts = 0..inner.config.experts as u16;
        let Some(turn) = inner.begin(call.layer, experts.map(ExpertId)) else { return Ok(None) };
        // Whatever comes of it, this is the call's turn.
        let mut ahead = Self { inner: inner.clone(), turn: None, sent: Vec::new() };
        ahead.send_shares(&turn, call, rows, split)?;
        ahead.turn = Some(turn);
        Ok(Some(ahead))
    }

    fn send_shares<E>(
        &mut self,
        Turn { ways, holders, .. }: &Turn,
        call: &LayerCall,
        rows: usize,
        split: impl FnOnce(&Split<'_>) -> Result<Option<GpuBytes>, E>,
    ) -> Result<(), E> {
        let inner = &self.inner;
        let mut asked = holders.clone();
        asked.sort_unstable();
        asked.dedup();
        let has_lane = |to| inner.views().edge(to).is_some_and(|edge| edge.has_lane());
        let takers = asked.iter().copied().filter(|worker| ways.destination(*worker).is_some_and(has_lane));
        let takers: Vec<u32> = takers.collect();
        let layout = Layout::new(inner.config.hidden, size_of::<bf16>(), inner.config.group_size(), call.top_k);
        let pays = room(rows, call.top_k, asked.len()).filter(|room| *room <= layout.frame_rows());
        let Some(room) = pays.filter(|_| !takers.is_empty()) else { return Ok(()) };
        let taker = |holder: &u32| takers.binary_search(holder).map_or(NOBODY, |taker| taker as u32);
        let owners: Vec<u32> = holders.iter().map(taker).collect();
        let (count, width) = (takers.len(), inner.config.hidden);
        let shape = Split { owners: &owners, takers: count, room, top_k: call.top_k, width };
        let Some(shares) = split(&shape)? else { return Ok(()) };
        let shares = shares.cut(std::iter::repeat_n(shape.share_bytes(), count));
        for ((number, worker), share) in (0..).zip(&takers).zip(shares) {
            let Some(to) = ways.destination(*worker) else { continue };
            let sequence = inner.core().tracker.number(call.micro_batch);
            let header = Header { sequence, ..inner.header(ways.epoch(), call.layer, call.micro_batch) };
            let frame = AheadFrame::new(header, &shape, number, share, inner.config.group_size());
            let frame = frame.within(call.traceparent.clone());
            if inner.views().edge(to).is_some_and(|edge| edge.send_ahead(frame.clone())) {
                self.sent.push((*worker, to.clone(), frame));
            }
        }
        Ok(())
    }

    /// Rows of a worker that have left at most, if any have.
    pub(super) fn room(&self) -> Option<usize> {
        self.sent.first().map(|(.., frame)| frame.room())
    }

    /// What has left of a worker's parts: the first.
    fn take(&mut self, worker: u32) -> Option<AheadFrame> {
        let at = self.sent.iter().position(|(taker, ..)| *taker == worker)?;
        Some(self.sent.swap_remove(at).2)
    }
}

/// The frames of a call's parts, in order, and for whom they are: those that have left have their number, and their rows where they left.
pub(super) fn frames(
    mut parts: Vec<Part>,
    rows: Rows<'_>,
    header: Header,
    hidden: usize,
    mut ahead: Option<&mut Ahead>,
) -> Result<Vec<(u32, RequestFrame)>, GpuError> {
    let mut take = |part: &Part| ahead.as_mut().and_then(|ahead| ahead.take(part.worker));
    let left: Vec<_> = parts.iter().map(&mut take).collect();
    let mut others: Vec<_> =
        parts.iter_mut().zip(&left).filter(|(_, left)| left.is_none()).map(|(part, _)| part).collect();
    let shared = if others.is_empty() { Vec::new() } else { rows.shared(hidden, &mut others)? };
    let mut shared = shared.into_iter();
    let frame = |(Part { worker, mut content }, left): (Part, Option<AheadFrame>)| {
        let Some(left) = left else {
            let activations = shared.next().expect("all parts that have not left have rows");
            return (worker, RequestFrame::new(header, activations, hidden, content));
        };
        let rows = content.rows.len();
        content.rows = (0..rows as u32).collect();
        let activations = left.activations(rows, hidden);
        (worker, RequestFrame::new(*left.header(), activations, hidden, content).numbered())
    };
    Ok(parts.into_iter().zip(left).map(frame).collect())
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let views = self.inner.views();
        for (_, to, frame) in &self.sent {
            if let Some(edge) = views.edge(to) {
                edge.forget(frame.header());
            }
        }
    }
}

/// For how many rows a share needs room, so that seldom more of that many rows are for one worker: by what a row's choices would be
/// if all experts were chosen alike. None where it does not pay, since few workers get any, or a slot has no such room.
fn room(rows: usize, top_k: usize, workers: usize) -> Option<usize> {
    let elsewhere = 1.0 - 1.0 / workers as f64;
    let of_row = 1.0 - elsewhere.powi(top_k as i32);
    let of_any = 1.0 - elsewhere.powi((rows * top_k) as i32);
    let mean = rows as f64 * of_row;
    let spread = (mean * (1.0 - of_row)).sqrt();
    let room = ((mean + SPREADS * spread).ceil() as usize).min(rows);
    let fits = room <= SLOT_ROWS && rows <= Split::ROWS_MAX && Split::table_bytes(room, top_k) <= TABLE_MAX;
    (of_any >= ASKED_MIN && fits).then_some(room)
}

/// Of the slots that are sent, so many should have rows.
const ASKED_MIN: f64 = 0.75;
/// Standard deviations: of 44 shares, one has more rows.
const SPREADS: f64 = 2.0;
/// The rest is for a frame's message.
const TABLE_MAX: usize = SLOT_TABLE_BYTES * 3 / 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pays_is_a_batch_for_most_workers_and_no_more_than_slots_hold() {
        // 16 workers, top 8: from a few rows up to the batch of which each gets a slot of rows.
        let table = [None, None, Some(3), Some(4), Some(19), Some(34), Some(63), None];
        assert_eq!([1, 2, 3, 4, 32, 64, 128, 132].map(|rows| room(rows, 8, 16)), table);
        assert_eq!([1, 64, 65].map(|rows| room(rows, 8, 1)), [Some(1), Some(64), None]);
        assert_eq!([8, 16, 64, 256, 257].map(|rows| room(rows, 8, 64)), [None, Some(5), Some(13), Some(41), None]);
        assert_eq!([16, 24].map(|rows| room(rows, 32, 4)), [Some(16), None]);
    }
}
