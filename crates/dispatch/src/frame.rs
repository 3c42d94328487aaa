//! What travels between an attention worker and an expert worker, and the checks that a received frame must pass.
//!
//! A request carries rows of activations once, and a list of outputs: each names a row and one expert (answered as it
//! is) or several (answered as their weighted sum). An answer carries one f32 row for each output, in order. A frame of
//! any bytes gives a value or an error: never a panic, never an allocation of more than twice its size.

mod ahead;
mod error;

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use bytes::Bytes;
use half::bf16;
use moesaic_kernels::cuda::{Device, GpuBytes, GpuError, Parcel, View, pick_rows};
use moesaic_proto::limits::{FRAME_BYTES_MAX, FRAME_ROWS_MAX};
use moesaic_proto::v1::{self, RefusalReason};
use moesaic_proto::{Epoch, ExpertId, LayerId};

use crate::dispatcher::Route;
use crate::payload::{Payload, Values};
use crate::plan::Part;
use crate::shared::Shared;

pub use ahead::AheadFrame;
pub use error::FrameError;

/// Set in every answer.
pub const FLAG_ANSWER: u16 = 1;
/// Set in an answer that has a refusal instead of rows.
pub const FLAG_REFUSAL: u16 = 1 << 1;
/// The rows are f32; bf16 otherwise. Always set in answers.
pub const FLAG_F32: u16 = 1 << 2;

/// Largest payload of a frame, and of the answer that it asks for: what the limit leaves beside the framing.
pub const PAYLOAD_BYTES_MAX: usize = FRAME_BYTES_MAX - 4096;

/// The first 16 bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The placement that the frame was made under.
    pub epoch: Epoch,
    pub layer: LayerId,
    pub micro_batch: u8,
    pub flags: u16,
    /// The attention worker's number.
    pub source: u16,
    /// For transports with fixed buffers; zero on the others.
    pub slot: u16,
    /// With `micro_batch`, unique among the sender's outstanding frames.
    pub sequence: u32,
}

impl Header {
    pub const LEN: usize = 16;

    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0..4].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[4] = self.layer.0;
        bytes[5] = self.micro_batch;
        bytes[6..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.source.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.slot.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let bytes: [u8; Self::LEN] = bytes.try_into().map_err(|_| FrameError::Header { len: bytes.len() })?;
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(Self {
            epoch: Epoch(long(0)),
            layer: LayerId(bytes[4]),
            micro_batch: bytes[5],
            flags: short(6),
            source: short(8),
            slot: short(10),
            sequence: long(12),
        })
    }

    /// The header of the answer to this frame.
    fn answer(self, flags: u16) -> Self {
        Self { flags: FLAG_ANSWER | flags, ..self }
    }
}

/// A micro-batch's activations, row-major, in the compute dtype.
#[derive(Debug)]
pub enum Rows<'a> {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    /// bf16 on a GPU. Frames get rows of their own there, with room for the copy's list: the copy of the call before is through.
    There(&'a Device, View<'a, u16>, &'a mut Option<Parcel>),
}

impl Rows<'_> {
    /// How many numbers.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::There(_, values, _) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn value_bytes(&self) -> usize {
        if matches!(self, Self::F32(_)) { size_of::<f32>() } else { size_of::<bf16>() }
    }

    /// The activations of each part's frame. On a GPU they are the part's own, which then has all of them: a frame lives
    /// longer than what a layer is computed in. Where the GPU has no room for that, they are brought here.
    pub(crate) fn shared(self, hidden: usize, parts: &mut [&mut Part]) -> Result<Vec<Activations>, GpuError> {
        let all = match self {
            Self::F32(values) => values.into(),
            Self::Bf16(values) => values.into(),
            Self::There(device, x, list) => {
                let picks: Vec<u32> = parts.iter().flat_map(|part| part.content.rows.iter().copied()).collect();
                if let Some(picked) = GpuError::if_room(pick_rows(device, x, hidden, &picks, list))? {
                    let row_bytes = hidden * size_of::<bf16>();
                    let own = picked.cut(parts.iter().map(|part| part.content.rows.len() * row_bytes));
                    let own = own.map(Activations::There).collect();
                    for Part { content, .. } in parts {
                        content.rows = (0..content.rows.len() as u32).collect();
                    }
                    return Ok(own);
                }
                let mut values = vec![bf16::ZERO; x.len()];
                device.read(x, bytemuck::cast_slice_mut(&mut values))?;
                values.into()
            }
        };
        Ok(vec![all; parts.len()])
    }
}

/// Activations as frames share them.
#[derive(Clone, Debug)]
pub enum Activations {
    F32(Shared<f32>),
    Bf16(Shared<bf16>),
    /// bf16 on the worker's GPU.
    There(GpuBytes),
}

impl From<Vec<f32>> for Activations {
    fn from(values: Vec<f32>) -> Self {
        Self::F32(values.into())
    }
}

impl From<Vec<bf16>> for Activations {
    fn from(values: Vec<bf16>) -> Self {
        Self::Bf16(values.into())
    }
}

impl Activations {
    /// How many numbers.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::There(bytes) => bytes.len() / size_of::<bf16>(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn value_bytes(&self) -> usize {
        match self {
            Self::F32(_) => size_of::<f32>(),
            Self::Bf16(_) | Self::There(_) => size_of::<bf16>(),
        }
    }

    fn flags(&self) -> u16 {
        if matches!(self, Self::F32(_)) { FLAG_F32 } else { 0 }
    }

    /// Whether they lie on a GPU.
    pub fn are_there(&self) -> bool {
        matches!(self, Self::There(_))
    }

    /// These rows of `hidden` values, one after the other; no copy where all are asked for, or where they lie on a GPU.
    fn gather(&self, hidden: usize, index: Option<&[u32]>) -> Payload {
        Payload::Here(match (self, index) {
            (Self::F32(values), None) => values.bytes(),
            (Self::Bf16(values), None) => values.bytes(),
            (Self::F32(values), Some(index)) => gather(values, hidden, index).bytes(),
            (Self::Bf16(values), Some(index)) => gather(values, hidden, index).bytes(),
            (Self::There(bytes), None) => return Payload::There(vec![bytes.clone()]),
            (Self::There(bytes), Some(index)) => {
                let row_bytes = hidden * size_of::<bf16>();
                let runs = index.chunk_by(|a, b| a + 1 == *b);
                let run = |rows: &[u32]| rows[0] as usize * row_bytes..(rows[0] as usize + rows.len()) * row_bytes;
                return Payload::There(runs.map(|rows| bytes.slice(run(rows))).collect());
            }
        })
    }
}

fn gather<T: Pod + Send + Sync>(values: &[T], hidden: usize, index: &[u32]) -> Shared<T> {
    let mut rows = Vec::with_capacity(index.len() * hidden);
    for &row in index {
        rows.extend_from_slice(&values[row as usize * hidden..][..hidden]);
    }
    rows.into()
}

/// What to answer: one expert's row as it is, or the weighted sum of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Output {
    row: u16,
    terms: u16,
}

impl Output {
    const WEIGHTED: u16 = 1 << 15;

    /// One term, answered as it is.
    pub fn single(row: u16) -> Self {
        Self { row, terms: 1 }
    }

    /// The weighted sum of `terms` terms.
    pub fn sum(row: u16, terms: u16) -> Self {
        Self { row, terms: terms | Self::WEIGHTED }
    }

    /// A row of the frame.
    pub fn row(self) -> u16 {
        self.row
    }

    pub fn is_weighted(self) -> bool {
        self.terms & Self::WEIGHTED != 0
    }

    /// How many terms.
    pub fn terms(self) -> usize {
        usize::from(self.terms & !Self::WEIGHTED)
    }
}

/// One expert's part in an output.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Term {
    expert: u16,
    zero: u16,
    weight: f32,
}

impl Term {
    pub fn new(expert: ExpertId, weight: f32) -> Self {
        Self { expert: expert.0, zero: 0, weight }
    }

    pub fn expert(self) -> ExpertId {
        ExpertId(self.expert)
    }

    pub fn weight(self) -> f32 {
        self.weight
    }
}

impl From<&Route> for Term {
    fn from(route: &Route) -> Self {
        Self::new(route.expert, route.weight)
    }
}

/// What a frame must fit: sizes of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub hidden: usize,
    /// Routed experts of a layer.
    pub experts: usize,
}

/// What a frame asks for, before it is one: `plan` fills it.
#[derive(Debug, Default)]
pub struct Content {
    /// Rows of the call's activations, ascending.
    pub rows: Vec<u32>,
    pub outputs: Vec<Output>,
    pub terms: Vec<Term>,
}

/// Rows on their way to experts. Clones share everything.
#[derive(Clone, Debug)]
pub struct RequestFrame {
    pub header: Header,
    rows: usize,
    activations: Activations,
    /// The frame's rows as rows of `activations`; `None`: all of them in order.
    index: Option<Arc<[u32]>>,
    outputs: Shared<Output>,
    terms: Shared<Term>,
    /// The span that it is part of, if it is traced.
    traceparent: Option<Arc<str>>,
    /// Its number is not to be chosen any more.
    is_numbered: bool,
}

impl RequestFrame {
    /// A frame of some rows of a call's activations, which it shares with the call's other frames.
    pub fn new(header: Header, activations: Activations, hidden: usize, content: Content) -> Self {
        let header = Header { flags: activations.flags(), ..header };
        let Content { rows, outputs, terms } = content;
        let index = (rows.len() * hidden != activations.len()).then(|| rows.as_slice().into());
        let (rows, outputs, terms) = (rows.len(), outputs.into(), terms.into());
        Self { header, rows, activations, index, outputs, terms, traceparent: None, is_numbered: false }
    }

    /// The same frame, which has left under the number of its header already: see [`AheadFrame`].
    pub fn numbered(self) -> Self {
        Self { is_numbered: true, ..self }
    }

    pub fn is_numbered(&self) -> bool {
        self.is_numbered
    }

    /// The same frame as part of a span.
    pub fn within(self, traceparent: Option<Arc<str>>) -> Self {
        Self { traceparent, ..self }
    }

    /// Checks a received frame against itself and the model; its header has been decoded already.
    pub fn decode(header: Header, mut frame: v1::Frame, shape: Shape) -> Result<Self, FrameError> {
        let rows = Payload::taken(&mut frame);
        Self::join(header, frame, rows, shape)
    }

    /// The same where its rows came beside it: what `split` has parted.
    pub fn join(header: Header, frame: v1::Frame, rows: Payload, shape: Shape) -> Result<Self, FrameError> {
        if header.flags & !FLAG_F32 != 0 {
            return Err(FrameError::Flags { flags: header.flags, expected: "a request's: 0, or 4 for f32 rows" });
        }
        if header.slot != 0 {
            return Err(FrameError::Slot { slot: header.slot });
        }
        let value_bytes = if header.flags & FLAG_F32 != 0 { size_of::<f32>() } else { size_of::<bf16>() };
        let (len, row_bytes) = (rows.len(), shape.hidden * value_bytes);
        let count = len / row_bytes;
        if count == 0 || count > FRAME_ROWS_MAX || !len.is_multiple_of(row_bytes) {
            return Err(FrameError::Rows { len, row_bytes });
        }
        let mut terms = table(&frame.terms, "terms")?;
        let mut outputs = table(&frame.outputs, "outputs")?;
        let (mut asked, mut index) = (count, None);
        if let Some(choices) = &frame.choices {
            if !outputs.is_empty() {
                return Err(FrameError::Both { outputs: outputs.len() });
            }
            let content = ahead::content(choices, &terms, count, shape.experts)?;
            asked = content.rows.len();
            index = (asked != count).then(|| content.rows.into());
            (outputs, terms) = (content.outputs.into(), content.terms.into());
        }
        check_outputs(&outputs, &terms, asked, shape)?;
        let activations = match (value_bytes, rows) {
            (2, Payload::There(pieces)) if pieces.len() == 1 => pieces.into_iter().next().map(Activations::There),
            (2, rows) => Shared::from_bytes(rows.brought()).map(Activations::Bf16),
            (_, rows) => Shared::from_bytes(rows.brought()).map(Activations::F32),
        }
        .filter(|activations| activations.len() == count * shape.hidden)
        .ok_or(FrameError::Rows { len, row_bytes })?;
        let traceparent = (!frame.traceparent.is_empty()).then(|| frame.traceparent.into());
        Ok(Self { header, rows: asked, activations, index, outputs, terms, traceparent, is_numbered: false })
    }

    /// The message of this frame without its rows, and these; they are gathered here if the frame has only some of its
    /// activations.
    pub fn split(&self, hidden: usize) -> (v1::Frame, Payload) {
        let message = v1::Frame {
            header: Bytes::copy_from_slice(&self.header.encode()),
            outputs: self.outputs.bytes(),
            terms: self.terms.bytes(),
            traceparent: self.traceparent.as_deref().unwrap_or_default().to_owned(),
            ..Default::default()
        };
        (message, self.rows(hidden))
    }

    /// Its rows, one after the other.
    pub fn rows(&self, hidden: usize) -> Payload {
        self.activations.gather(hidden, self.index.as_deref())
    }

    /// The message of this frame, with its rows.
    pub fn encode(&self, hidden: usize) -> v1::Frame {
        let (message, rows) = self.split(hidden);
        v1::Frame { rows: rows.brought(), ..message }
    }

    /// The same frame with another header.
    pub fn under(&self, header: Header) -> Self {
        Self { header, is_numbered: false, ..self.clone() }
    }

    pub fn row_count(&self) -> usize {
        self.rows
    }

    /// Values that hold the frame's rows, and maybe others between them: see `position`.
    pub fn activations(&self) -> &Activations {
        &self.activations
    }

    /// Where a row of the frame is: the number of a row of `activations`.
    pub fn position(&self, row: u16) -> u32 {
        self.index.as_ref().map_or(u32::from(row), |index| index[usize::from(row)])
    }

    /// What to answer, in order, each with its terms.
    pub fn outputs(&self) -> impl Iterator<Item = (Output, &[Term])> + '_ {
        let mut rest: &[Term] = &self.terms;
        self.outputs.iter().map(move |&output| {
            let (terms, after) = rest.split_at(output.terms());
            rest = after;
            (output, terms)
        })
    }

    /// Bytes of its rows and tables, as they are sent.
    pub fn encoded_len(&self, hidden: usize) -> usize {
        let rows = self.rows * hidden * self.activations.value_bytes();
        rows + size_of_val(&self.outputs[..]) + size_of_val(&self.terms[..])
    }

    pub fn output_count(&self) -> usize {
        self.outputs.len()
    }

    pub fn terms(&self) -> &[Term] {
        &self.terms
    }

    /// The span that it is part of, if it is traced.
    pub fn traceparent(&self) -> Option<Arc<str>> {
        self.traceparent.clone()
    }
}

fn table<T: Pod + Send + Sync>(bytes: &Bytes, field: &'static str) -> Result<Shared<T>, FrameError> {
    let entry = size_of::<T>();
    Shared::from_bytes(bytes.clone()).ok_or(FrameError::Table { field, len: bytes.len(), entry })
}

fn check_outputs(outputs: &[Output], terms: &[Term], rows: usize, shape: Shape) -> Result<(), FrameError> {
    let limit = PAYLOAD_BYTES_MAX / (shape.hidden * size_of::<f32>());
    if outputs.is_empty() || outputs.len() > limit {
        return Err(FrameError::OutputCount { count: outputs.len(), limit });
    }
    let mut rest = terms;
    for (index, output) in outputs.iter().enumerate() {
        if usize::from(output.row) >= rows {
            return Err(FrameError::OutputRow { index, row: output.row, rows });
        }
        let count = output.terms();
        if count == 0 || count > rest.len() || (!output.is_weighted() && count != 1) {
            return Err(FrameError::OutputTerms { index, count, left: rest.len() });
        }
        let (own, after) = rest.split_at(count);
        check_terms(index, own, shape.experts)?;
        rest = after;
    }
    if rest.is_empty() { Ok(()) } else { Err(FrameError::TermsLeft { left: rest.len() }) }
}

fn check_terms(output: usize, terms: &[Term], experts: usize) -> Result<(), FrameError> {
    for (i, term) in terms.iter().enumerate() {
        let Term { expert, zero, weight } = *term;
        if usize::from(expert) >= experts {
            return Err(FrameError::Expert { output, expert, experts });
        }
        if i > 0 && terms[i - 1].expert >= expert {
            return Err(FrameError::ExpertOrder { output, expert, after: terms[i - 1].expert });
        }
        if zero != 0 {
            return Err(FrameError::TermReserved { output, value: zero });
        }
        if !weight.is_finite() {
            return Err(FrameError::Weight { output, expert, weight });
        }
    }
    Ok(())
}

/// Results on their way back, or the reason why there are none.
#[derive(Clone, Debug)]
pub struct AnswerFrame {
    pub header: Header,
    /// One row for each output that was asked for, in order.
    pub result: Result<Values, Refusal>,
}

impl AnswerFrame {
    /// The answer to a frame with this header.
    pub fn new(asked: Header, result: Result<Values, Refusal>) -> Self {
        let flags = if result.is_ok() { FLAG_F32 } else { FLAG_F32 | FLAG_REFUSAL };
        Self { header: asked.answer(flags), result }
    }

    /// Checks a received answer against itself. Whether it fits what was asked is the tracker's to say.
    pub fn decode(mut frame: v1::Frame) -> Result<Self, FrameError> {
        let values = Payload::taken(&mut frame);
        Self::join(frame, values)
    }

    /// The same where its values came beside it: what `split` has parted.
    pub fn join(frame: v1::Frame, values: Payload) -> Result<Self, FrameError> {
        let header = Header::decode(&frame.header)?;
        let refused = header.flags & FLAG_REFUSAL != 0;
        if header.flags & !FLAG_REFUSAL != FLAG_ANSWER | FLAG_F32 || refused != frame.refusal.is_some() {
            let expected = "an answer's: 5, or 7 and a refusal";
            return Err(FrameError::Flags { flags: header.flags, expected });
        }
        if let Some(refusal) = frame.refusal {
            return Ok(Self { header, result: Err(Refusal { reason: refusal.reason(), detail: refusal.detail }) });
        }
        let (len, row_bytes) = (values.len(), size_of::<f32>());
        let values = match values {
            Payload::There(pieces) if pieces.len() == 1 && len.is_multiple_of(row_bytes) => {
                pieces.into_iter().next().map(Values::There)
            }
            values => Shared::from_bytes(values.brought()).map(Values::Here),
        };
        let values = values.ok_or(FrameError::Rows { len, row_bytes })?;
        Ok(Self { header, result: Ok(values) })
    }

    /// The message of this answer without its values, and these.
    pub fn split(self) -> (v1::Frame, Payload) {
        let header = Bytes::copy_from_slice(&self.header.encode());
        match self.result {
            Ok(values) => (v1::Frame { header, ..Default::default() }, values.payload()),
            Err(Refusal { reason, detail }) => {
                let refusal = Some(v1::Refusal { reason: reason.into(), detail });
                (v1::Frame { header, refusal, ..Default::default() }, Payload::Here(Bytes::new()))
            }
        }
    }

    /// The message of this answer, with its values.
    pub fn encode(self) -> v1::Frame {
        let (message, values) = self.split();
        v1::Frame { rows: values.brought(), ..message }
    }
}

/// Why a worker computed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", .reason.as_str_name())]
pub struct Refusal {
    pub reason: RefusalReason,
    pub detail: String,
}

impl Refusal {
    pub fn new(reason: RefusalReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

#[cfg(test)]
mod tests;
