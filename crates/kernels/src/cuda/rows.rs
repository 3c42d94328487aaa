//! The residual stream: `cuda/rows.cu`.

use bytemuck::{Pod, Zeroable};

use super::gpu::{Buffer, Device, GpuError, Kernel, View};
use crate::{Choice, GateParams, GroupScore, Scoring};

/// Queues h = the tokens' rows of the table: bf16 [vocabulary, hidden] to [rows, hidden]. Tokens are of the vocabulary.
pub fn embed(
    device: &Device,
    tokens: View<'_, u32>,
    table: View<'_, u16>,
    hidden: usize,
    h: View<'_, f32>,
) -> Result<(), GpuError> {
    let rows = tokens.len();
    let call = EmbedCall {
        tokens: tokens.of_len(rows),
        table: table.of_len(0),
        rows: rows as u32,
        hidden: hidden as u32,
        h: h.of_len(rows * hidden),
    };
    // SAFETY: the views are as large as the kernel takes them to be, if tokens are what they should.
    unsafe { device.queue_launch(EMBED, &call) }
}

/// What [`norm`] does with each row of h.
#[derive(Clone, Copy, Debug)]
pub struct Normed<'a> {
    /// Added to h first, and with it `shared`. [.., hidden] like h.
    pub y: Option<View<'a, f32>>,
    pub shared: Option<View<'a, f32>>,
    /// Rows of h; none: the first `rows`.
    pub pick: Option<View<'a, u32>>,
    /// The norm's; none: h is only added to.
    pub weight: Option<View<'a, f32>>,
    pub eps: f32,
    /// bf16 [rows, hidden]
    pub x: Option<View<'a, u16>>,
    /// The same before rounding.
    pub exact: Option<View<'a, f32>>,
}

/// Queues h = h + (y + shared), x = norm(h) * weight for `rows` rows of h [.., hidden].
pub fn norm(device: &Device, rows: usize, hidden: usize, h: View<'_, f32>, n: Normed<'_>) -> Result<(), GpuError> {
    // Rows that are picked may be any of h's.
    let len = if n.pick.is_some() { h.len() } else { rows * hidden };
    let f32s = |view: Option<View<'_, f32>>, len| view.map_or(0, |view| view.of_len(len));
    assert_eq!(n.weight.is_some(), n.x.is_some(), "a norm has a weight and a result");
    let call = NormCall {
        h: h.of_len(len),
        y: f32s(n.y, len),
        shared: f32s(n.shared, len),
        pick: n.pick.map_or(0, |pick| pick.of_len(rows)),
        weight: f32s(n.weight, hidden),
        rows: rows as u32,
        hidden: hidden as u32,
        eps: n.eps,
        _pad: 0,
        x: n.x.map_or(0, |x| x.of_len(rows * hidden)),
        exact: f32s(n.exact, rows * hidden),
    };
    // SAFETY: the views are as large as the kernel takes them to be, if picks are of h's rows.
    unsafe { device.queue_launch(NORM, &call) }
}

/// Queues logits [rows, experts] = x [rows, hidden] Wᵀ, all in f32.
pub fn gate(
    device: &Device,
    rows: usize,
    x: View<'_, f32>,
    weight: View<'_, f32>,
    hidden: usize,
    logits: View<'_, f32>,
) -> Result<(), GpuError> {
    let experts = weight.len() / hidden;
    let call = GateCall {
        x: x.of_len(rows * hidden),
        weight: weight.of_len(experts * hidden),
        rows: rows as u32,
        hidden: hidden as u32,
        experts: experts as u32,
        _pad: 0,
        logits: logits.of_len(rows * experts),
    };
    // SAFETY: the views are as large as the kernel takes them to be.
    unsafe { device.queue_launch(GATE, &call) }
}

/// An expert of a row and its weight, as a GPU has them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, Pod, Zeroable)]
pub struct Routed {
    pub expert: u32,
    pub weight: f32,
}

impl From<Routed> for Choice {
    fn from(Routed { expert, weight }: Routed) -> Self {
        Self { expert: expert as u16, weight }
    }
}

/// The most that `route` knows, of a layer, of its groups and of a row's choices.
const EXPERTS_MAX: usize = 256;
const LANES: usize = 32;

/// Whether the gate's sizes are within what [`route`] takes, with `experts` in a layer.
pub fn can_route(p: &GateParams, experts: usize) -> bool {
    experts <= EXPERTS_MAX && p.groups <= LANES && p.top_k <= LANES
}

/// Queues the choices [rows, top_k] (all experts if there are fewer), of logits [rows, experts], as [`crate::route`] makes them.
pub fn route(
    device: &Device,
    rows: usize,
    logits: View<'_, f32>,
    bias: Option<View<'_, f32>>,
    (p, experts): (&GateParams, usize),
    choices: View<'_, Routed>,
) -> Result<(), GpuError> {
    assert!(can_route(p, experts) && experts.is_multiple_of(p.groups), "{experts} experts by {p:?}");
    let top_k = p.top_k.min(experts);
    let call = RouteCall {
        logits: logits.of_len(rows * experts),
        bias: bias.map_or(0, |bias| bias.of_len(experts)),
        rows: rows as u32,
        experts: experts as u32,
        groups: p.groups as u32,
        groups_kept: p.groups_kept as u32,
        top_k: top_k as u32,
        is_softmax: u32::from(p.scoring == Scoring::Softmax),
        is_top_two: u32::from(p.group_score == GroupScore::TopTwoSum),
        normalize: u32::from(p.normalize),
        mask: p.mask,
        scale: p.scale,
        choices: choices.of_len(rows * top_k),
    };
    // SAFETY: the views are as large as the kernel takes them to be.
    unsafe { device.queue_launch(ROUTE, &call) }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RouteCall {
    logits: u64,
    bias: u64,
    rows: u32,
    experts: u32,
    groups: u32,
    groups_kept: u32,
    top_k: u32,
    is_softmax: u32,
    is_top_two: u32,
    normalize: u32,
    mask: f32,
    scale: f32,
    choices: u64,
}

/// Random values below `size` in magnitude, the same for the same seed: to measure with.
pub fn random_bf16(device: &Device, len: usize, size: f32, seed: u64) -> Result<Buffer<u16>, GpuError> {
    let buffer = device.buffer::<u16>(len.next_multiple_of(2))?;
    fill(device, buffer.view().bytes(), buffer.len() * 2, Some(size), seed)?;
    Ok(buffer)
}

/// Queues random weights: e4m3 codes that are numbers, or bf16 below `size` in magnitude. The same for the same seed.
pub(super) fn fill(
    device: &Device,
    to: View<'_, u8>,
    bytes: usize,
    bf16_size: Option<f32>,
    seed: u64,
) -> Result<(), GpuError> {
    assert!(bytes.is_multiple_of(4), "{bytes} bytes are no words");
    let (kind, size) = bf16_size.map_or((0, 0.0), |size| (1, size));
    let call = FillCall { to: to.of_len(bytes), bytes: bytes as u64, seed, kind, size };
    // SAFETY: the view is so large.
    unsafe { device.queue_launch(FILL, &call) }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FillCall {
    to: u64,
    bytes: u64,
    seed: u64,
    kind: u32,
    size: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct EmbedCall {
    tokens: u64,
    table: u64,
    rows: u32,
    hidden: u32,
    h: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct NormCall {
    h: u64,
    y: u64,
    shared: u64,
    pick: u64,
    weight: u64,
    rows: u32,
    hidden: u32,
    eps: f32,
    _pad: u32,
    x: u64,
    exact: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GateCall {
    x: u64,
    weight: u64,
    rows: u32,
    hidden: u32,
    experts: u32,
    _pad: u32,
    logits: u64,
}

const EMBED: Kernel = Kernel { name: "embed_rows", threads: 256, blocks_each: 4 };
const NORM: Kernel = Kernel { name: "norm_rows", threads: 256, blocks_each: 4 };
const GATE: Kernel = Kernel { name: "gate_rows", threads: 256, blocks_each: 2 };
const ROUTE: Kernel = Kernel { name: "route_rows", threads: 256, blocks_each: 2 };
const FILL: Kernel = Kernel { name: "fill_random", threads: 256, blocks_each: 4 };
pub(super) const KERNELS: [Kernel; 5] = [EMBED, NORM, GATE, ROUTE, FILL];
