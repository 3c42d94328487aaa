//! Requests that leave before their sender knows which experts were chosen: with the choices of their rows, and which experts the
//! worker is asked for. Both sides split those in the same way (`plan`), so both know what is asked.

use std::sync::Arc;

use bytes::Bytes;
use half::bf16;
use moesaic_kernels::cuda::{GpuBytes, Split};
use moesaic_proto::ExpertId;
use moesaic_proto::v1::{self, Choices};

use super::{Activations, Content, FrameError, Header, Term, check_terms};
use crate::plan;

/// Rows that a GPU has picked for one worker. Clones share everything.
#[derive(Clone, Debug)]
pub struct AheadFrame {
    header: Header,
    choices: Choices,
    /// A table, and rows: see [`Split`].
    share: GpuBytes,
    table_bytes: usize,
    traceparent: Option<Arc<str>>,
}

impl AheadFrame {
    /// The share of one of `split`'s takers, who is asked for the experts that are its own.
    pub fn new(header: Header, split: &Split<'_>, taker: u32, share: GpuBytes, group_size: usize) -> Self {
        let bits =
            |owners: &[u32]| (0..8).zip(owners).fold(0, |bits, (i, owner)| bits | u8::from(*owner == taker) << i);
        let experts = split.owners.chunks(8).map(bits).collect();
        let (top_k, group_size) = (split.top_k as u32, group_size as u32);
        let choices = Choices { experts, top_k, group_size, room: split.room as u32 };
        let table_bytes = Split::table_bytes(split.room, split.top_k);
        Self { header, choices, share, table_bytes, traceparent: None }
    }

    /// The same frame as part of a span.
    pub fn within(self, traceparent: Option<Arc<str>>) -> Self {
        Self { traceparent, ..self }
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Rows that the share has room for.
    pub fn room(&self) -> usize {
        self.choices.room as usize
    }

    /// Bytes of the share's table.
    pub fn table_bytes(&self) -> usize {
        self.table_bytes
    }

    /// The first rows of the share, of which it has as many.
    pub fn activations(&self, rows: usize, hidden: usize) -> Activations {
        let start = self.table_bytes;
        Activations::There(self.share.slice(start..start + rows * hidden * size_of::<bf16>()))
    }

    /// The message of this frame, to which the share belongs.
    pub fn split(self) -> (v1::Frame, GpuBytes) {
        let message = v1::Frame {
            header: Bytes::copy_from_slice(&self.header.encode()),
            choices: Some(self.choices),
            traceparent: self.traceparent.as_deref().unwrap_or_default().to_owned(),
            ..Default::default()
        };
        (message, self.share)
    }
}

/// What a received frame's choices ask of this worker.
pub(super) fn content(choices: &Choices, terms: &[Term], rows: usize, experts: usize) -> Result<Content, FrameError> {
    let (top_k, group_size) = (choices.top_k as usize, choices.group_size as usize);
    if top_k == 0 || rows.checked_mul(top_k) != Some(terms.len()) {
        return Err(FrameError::Choices { terms: terms.len(), rows, top_k });
    }
    let (len, expected) = (choices.experts.len(), experts.div_ceil(8));
    if len != expected {
        return Err(FrameError::Asked { len, expected });
    }
    if group_size == 0 {
        return Err(FrameError::GroupSize);
    }
    for (row, terms) in terms.chunks_exact(top_k).enumerate() {
        check_terms(row, terms, experts)?;
    }
    let is_asked = |ExpertId(expert)| choices.experts[usize::from(expert / 8)] >> (expert % 8) & 1 == 1;
    Ok(plan::part_of(terms, top_k, group_size, is_asked))
}

#[cfg(test)]
mod tests;
