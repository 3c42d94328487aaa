//! Latent attention over pages: `cuda/attention.cu`.

use bytemuck::{Pod, Zeroable};

use super::gpu::{Buffer, Device, GpuError, Kernel, View};
use super::rows::fill;
use crate::PAGE_TOKENS;

/// Of a context, what is attended to before parts are merged; `cuda/attention.cu` has the same.
const PART_TOKENS: usize = 16 * PAGE_TOKENS;
/// What the kernels' sums have room for.
const LATENT_MAX: usize = 512;
const ROPE_MAX: usize = 64;

/// The latent cache: bf16 [layers, pages, PAGE_TOKENS, latent + rope].
#[derive(Debug)]
pub struct Pages {
    values: Buffer<u16>,
    pages: usize,
    latent: usize,
    rope: usize,
}

impl Pages {
    /// latent is a multiple of 16 and at most 512; rope is a multiple of 8 and at most 64.
    pub fn new(device: &Device, layers: usize, pages: usize, latent: usize, rope: usize) -> Result<Self, GpuError> {
        if !(latent.is_multiple_of(16) && latent <= LATENT_MAX && rope.is_multiple_of(8) && rope <= ROPE_MAX) {
            let reason = format!(
                "a latent of {latent} and {rope} rotated values; expected multiples of 16 and 8, at most {LATENT_MAX} and {ROPE_MAX}"
            );
            return Err(GpuError::Failed { what: "making the latent cache", reason });
        }
        let values = device.buffer(layers * pages * PAGE_TOKENS * (latent + rope))?;
        Ok(Self { values, pages, latent, rope })
    }

    pub fn bytes(&self) -> usize {
        self.values.len() * 2
    }

    /// Queues random latents for all positions: to measure with.
    pub fn fill_random(&self, device: &Device, seed: u64) -> Result<(), GpuError> {
        fill(device, self.values.view().bytes(), self.bytes(), Some(1.0), seed)
    }

    pub fn latent(&self) -> usize {
        self.latent
    }

    pub fn rope(&self) -> usize {
        self.rope
    }

    fn layer(&self, layer: usize) -> u64 {
        let len = self.pages * PAGE_TOKENS * (self.latent + self.rope);
        self.values.view().from(layer * len).of_len(len)
    }
}

/// Queues what goes to the pages of a layer: of kv [rows, latent + rope] the latents' norm and the rotated parts. `turns` is
/// [positions, rope / 2, 2] (cosine, sine); a slot is a page times PAGE_TOKENS and a place in it.
#[derive(Clone, Copy, Debug)]
pub struct Append<'a> {
    pub kv: View<'a, f32>,
    pub norm: View<'a, f32>,
    pub eps: f32,
    pub turns: View<'a, f32>,
    pub positions: View<'a, u32>,
    pub slots: View<'a, u32>,
}

pub fn append(device: &Device, pages: &Pages, layer: usize, a: Append<'_>) -> Result<(), GpuError> {
    let rows = a.positions.len();
    let call = AppendCall {
        kv: a.kv.of_len(rows * (pages.latent + pages.rope)),
        norm: a.norm.of_len(pages.latent),
        turns: a.turns.of_len(0),
        positions: a.positions.of_len(rows),
        slots: a.slots.of_len(rows),
        rows: rows as u32,
        latent: pages.latent as u32,
        rope: pages.rope as u32,
        eps: a.eps,
        cache: pages.layer(layer),
    };
    // SAFETY: the views are as large as the kernel takes them to be, if positions are of the table's and slots of the pages'.
    unsafe { device.queue_launch(APPEND, &call) }
}

/// Queries on their way: q [rows, heads, nope + rope] to `plain`, bf16 [heads, rows, nope], and the rotated ends of `absorbed`,
/// bf16 [rows, heads, latent + rope].
#[derive(Clone, Copy, Debug)]
pub struct Rotate<'a> {
    pub q: View<'a, f32>,
    pub turns: View<'a, f32>,
    pub positions: View<'a, u32>,
    pub plain: View<'a, u16>,
    pub absorbed: View<'a, u16>,
}

/// Queues it.
pub fn rotate(device: &Device, pages: &Pages, heads: usize, nope: usize, r: Rotate<'_>) -> Result<(), GpuError> {
    let rows = r.positions.len();
    let call = RotateCall {
        q: r.q.of_len(rows * heads * (nope + pages.rope)),
        turns: r.turns.of_len(0),
        positions: r.positions.of_len(rows),
        rows: rows as u32,
        heads: heads as u32,
        nope: nope as u32,
        rope: pages.rope as u32,
        latent: pages.latent as u32,
        _pad: 0,
        plain: r.plain.of_len(heads * rows * nope),
        absorbed: r.absorbed.of_len(rows * heads * (pages.latent + pages.rope)),
    };
    // SAFETY: the views are as large as the kernel takes them to be, if positions are of the table's.
    unsafe { device.queue_launch(ROTATE, &call) }
}

/// Rows that attend to their contexts.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    pub heads: usize,
    pub scale: f32,
    /// The longest of the contexts.
    pub longest: usize,
    /// bf16 [rows, heads, latent + rope]
    pub q: View<'a, u16>,
    /// Tokens that each row attends to, at least one.
    pub contexts: View<'a, u32>,
    /// Where in `pages` each row's pages begin.
    pub firsts: View<'a, u32>,
    pub pages: View<'a, u32>,
    /// What it is computed in, some rows at a time: see [`room`].
    pub sums: View<'a, f32>,
    pub weights: View<'a, f32>,
    /// bf16 [heads, rows, latent]
    pub o: View<'a, u16>,
}

/// Parts of contexts that are attended to at a time, at least: a decoding batch's.
const PARTS: usize = 1024;

/// Values of [`Attend`]'s `sums` and `weights`, for contexts of up to `longest` tokens.
pub fn room(heads: usize, latent: usize, longest: usize) -> [usize; 2] {
    let parts = heads * PARTS.max(longest.div_ceil(PART_TOKENS));
    [parts * latent, parts * 2]
}

/// Queues it.
pub fn attend(device: &Device, pages: &Pages, layer: usize, a: Attend<'_>) -> Result<(), GpuError> {
    let (all_rows, parts) = (a.contexts.len(), a.longest.div_ceil(PART_TOKENS));
    let (heads, latent, width) = (a.heads, pages.latent, pages.latent + pages.rope);
    let at_once = (a.sums.len() / (heads * latent * parts)).max(1);
    for first in (0..all_rows).step_by(at_once) {
        let rows = at_once.min(all_rows - first);
        let sums = a.sums.of_len(rows * parts * heads * latent);
        let weights = a.weights.of_len(rows * parts * heads * 2);
        let contexts = a.contexts.from(first).of_len(rows);
        let call = AttendCall {
            q: a.q.from(first * heads * width).of_len(rows * heads * width),
            cache: pages.layer(layer),
            contexts,
            firsts: a.firsts.from(first).of_len(rows),
            pages: a.pages.of_len(0),
            rows: rows as u32,
            heads: heads as u32,
            latent: latent as u32,
            width: width as u32,
            parts: parts as u32,
            scale: a.scale,
            sums,
            weights,
        };
        let merge = MergeCall {
            sums,
            weights,
            contexts,
            rows: rows as u32,
            parts: parts as u32,
            heads: heads as u32,
            latent: latent as u32,
            all_rows: all_rows as u32,
            first: first as u32,
            o: a.o.of_len(heads * all_rows * latent),
        };
        // SAFETY: the views are as large as the kernels take them to be, if contexts have as many pages as they need, of the
        // cache's.
        unsafe {
            device.queue_launch(ATTEND, &call)?;
            device.queue_launch(MERGE, &merge)?;
        }
    }
    Ok(())
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AppendCall {
    kv: u64,
    norm: u64,
    turns: u64,
    positions: u64,
    slots: u64,
    rows: u32,
    latent: u32,
    rope: u32,
    eps: f32,
    cache: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RotateCall {
    q: u64,
    turns: u64,
    positions: u64,
    rows: u32,
    heads: u32,
    nope: u32,
    rope: u32,
    latent: u32,
    _pad: u32,
    plain: u64,
    absorbed: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AttendCall {
    q: u64,
    cache: u64,
    contexts: u64,
    firsts: u64,
    pages: u64,
    rows: u32,
    heads: u32,
    latent: u32,
    width: u32,
    parts: u32,
    scale: f32,
    sums: u64,
    weights: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MergeCall {
    sums: u64,
    weights: u64,
    contexts: u64,
    rows: u32,
    parts: u32,
    heads: u32,
    latent: u32,
    all_rows: u32,
    first: u32,
    o: u64,
}

const APPEND: Kernel = Kernel { name: "append_rows", threads: 256, blocks_each: 4 };
const ROTATE: Kernel = Kernel { name: "rotate_queries", threads: 256, blocks_each: 4 };
const ATTEND: Kernel = Kernel { name: "attend_parts", threads: 256, blocks_each: 1 };
const MERGE: Kernel = Kernel { name: "merge_parts", threads: 256, blocks_each: 4 };
pub(super) const KERNELS: [Kernel; 4] = [APPEND, ROTATE, ATTEND, MERGE];
