//! Weights packed in panels of 16 outputs.
//!
//! ```text
//! panel p holds outputs 16p .. 16p+16 (missing ones are zero); lanes[p][step] holds what one step of the chain over K needs for all 16
//! step of f32:   one k,           [w[16p][k], w[16p+1][k], ...]
//! step of bf16:  k = 2s, 2s + 1,  a u32 for each output, the lower k in the upper half
//! step of e4m3:  k = 4s .. 4s+4,  a byte in place of each half of two such steps, these interleaved as registers are
//! step of int8:  k = 4s .. 4s+4,  as [`super::quads`] says
//! ```
//! A forward pass then reads each panel from its first byte to its last. A pair is multiplied as it is, or by halves: one load and one
//! operation widen the lower k's sixteen, one more the higher k's, where sixteen values of a single k would take two each.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use bytes::Bytes;

use super::quads::{self, QuadLanes};
use super::tight::{GROUP_LINES, GROUP_STEPS, Tight, Tightening};
use crate::Matrix;
use crate::simd::{Isa, LANES, Line, Simd, Words, interleaved};

fn lines<T: Pod>(values: &[T]) -> &[Line] {
    bytemuck::cast_slice::<T, u8>(values).as_chunks().0
}

/// Values of a row that are read at a time: some cache lines.
const STRETCH: usize = 64;

/// One step's weights of a panel.
pub(crate) trait Weight: Pod + Send + Sync {
    /// One weight as it is stored.
    type Element: Copy + Default;
    /// What an activation row is made of.
    type X: Pod + Send + Sync;
    /// A part of a step's weights in registers.
    type Open<S: Simd>: Copy;
    /// Values of k in a step.
    const PER_STEP: usize;
    /// Elements of x in a step, one for each part of its weights.
    const PARTS: usize;
    /// The same weights opened once and for all, where opening costs as much as multiplying (else Self). They take the same
    /// x and give the same bits.
    type Wide: Weight<X = Self::X>;
    /// Whether that pays where there are many rows.
    const IS_WIDENED: bool;

    /// Whether a step is [`Words`] of bf16.
    const IS_BF16: bool;
    /// Steps of a block, where weights are packed together with the scales of their blocks, and rows of x have scales of theirs (as [`super::quads`] says).
    const ROW_BLOCK_STEPS: Option<usize> = None;

    /// Elements of a row of x of so many steps.
    fn x_len(steps: usize) -> usize {
        steps * Self::PARTS
    }

    /// A matrix [rows, cols] may be made tight. (Tiles of tight ones do not scale.)
    fn may_be_tight(rows: usize, cols: usize, scales: Option<Scales<'_>>) -> bool {
        let has_groups = rows > 0 && cols > 0 && cols.is_multiple_of(Self::PER_STEP * GROUP_STEPS);
        Self::IS_BF16 && scales.is_none() && has_groups
    }

    /// One output's weights of this step: PER_STEP of them.
    fn set(&mut self, lane: usize, w: &[Self::Element]);
    fn open<S: Simd>(&self, s: S, part: usize) -> Self::Open<S>;
    /// The same of pairs that are in registers.
    fn of_pairs<S: Simd>(s: S, pairs: S::Pairs, part: usize) -> Self::Open<S>;
    fn step<S: Simd>(s: S, x: Self::X, w: Self::Open<S>, acc: S::F) -> S::F;
    fn widen<S: Simd>(&self, s: S, to: &mut [Self::Wide]);
    /// A thread's scratch of any content, to be given back. (No closure: it would not be compiled for the instruction set.)
    fn take_wide() -> Vec<Self::Wide>;
    fn give_back_wide(scratch: Vec<Self::Wide>);
}

thread_local! {
    static WIDE_F32: Cell<Vec<F32Lanes>> = const { Cell::new(Vec::new()) };
    static WIDE_HALVES: Cell<Vec<Bf16Halves>> = const { Cell::new(Vec::new()) };
    static WIDE_PAIRS: Cell<Vec<Bf16Pairs>> = const { Cell::new(Vec::new()) };
}

/// Opening is cheap: it stays as it is. (A tight matrix of it is opened into the same form.)
macro_rules! as_it_is {
    ($scratch:ident, is_bf16: $is_bf16:literal) => {
        wide!(Self, $scratch, is_widened: false, is_bf16: $is_bf16);

        #[inline(always)]
        fn widen<S: Simd>(&self, _: S, to: &mut [Self]) {
            to[0] = *self;
        }
    };
}

/// e4m3 as bf16.
macro_rules! widens {
    ($wide:ident, $scratch:ident) => {
        wide!($wide, $scratch, is_widened: true, is_bf16: false);

        #[inline(always)]
        fn widen<S: Simd>(&self, s: S, to: &mut [$wide]) {
            s.store_pairs(s.pairs_e4m3::<0>(&self.0), &mut to[0].0);
            s.store_pairs(s.pairs_e4m3::<1>(&self.0), &mut to[1].0);
        }
    };
}

macro_rules! wide {
    ($wide:ty, $scratch:ident, is_widened: $is_widened:literal, is_bf16: $is_bf16:literal) => {
        type Wide = $wide;
        const IS_WIDENED: bool = $is_widened;
        const IS_BF16: bool = $is_bf16;

        fn take_wide() -> Vec<$wide> {
            $scratch.take()
        }
        fn give_back_wide(scratch: Vec<$wide>) {
            $scratch.set(scratch);
        }
    };
}

/// A pair of k, as u32 of bf16.
macro_rules! paired_bf16 {
    ($name:ident, $($by:tt)*) => {
        #[repr(C, align(64))]
        #[derive(Clone, Copy, Default, Zeroable, Pod)]
        pub(crate) struct $name(pub [u32; LANES]);

        impl Weight for $name {
            type Element = u16;
            const PER_STEP: usize = 2;

            #[inline(always)]
            fn set(&mut self, lane: usize, w: &[u16]) {
                self.0[lane] = u32::from(w[0]) << 16 | u32::from(w[1]);
            }
            #[inline(always)]
            fn open<S: Simd>(&self, s: S, part: usize) -> Self::Open<S> {
                let pairs = if part == 0 { s.pairs_bf16(&self.0) } else { s.pairs_bf16_again(&self.0) };
                Self::of_pairs(s, pairs, part)
            }
            $($by)*
        }
    };
}

/// Two pairs of k.
macro_rules! paired_e4m3 {
    ($name:ident, $($by:tt)*) => {
        #[repr(C, align(64))]
        #[derive(Clone, Copy, Zeroable, Pod)]
        pub(crate) struct $name(pub Line);

        impl Weight for $name {
            type Element = u8;
            const PER_STEP: usize = 4;

            #[inline(always)]
            fn set(&mut self, lane: usize, w: &[u8]) {
                let (upper, lower) = (2 * lane + 1, 2 * lane);
                (self.0[interleaved::<0>(upper)], self.0[interleaved::<0>(lower)]) = (w[0], w[1]);
                (self.0[interleaved::<1>(upper)], self.0[interleaved::<1>(lower)]) = (w[2], w[3]);
            }
            #[inline(always)]
            fn open<S: Simd>(&self, s: S, part: usize) -> Self::Open<S> {
                let parts = Self::PARTS / 2;
                let pairs = if part < parts { s.pairs_e4m3::<0>(&self.0) } else { s.pairs_e4m3::<1>(&self.0) };
                Self::of_pairs(s, pairs, part % parts)
            }
            $($by)*
        }
    };
}

/// Multiplied as pairs of bf16.
macro_rules! by_pairs {
    ($parts:literal) => {
        type X = u32;
        type Open<S: Simd> = S::Pairs;
        const PARTS: usize = $parts;

        #[inline(always)]
        fn of_pairs<S: Simd>(_: S, pairs: S::Pairs, _: usize) -> S::Pairs {
            pairs
        }
        #[inline(always)]
        fn step<S: Simd>(s: S, x: u32, w: S::Pairs, acc: S::F) -> S::F {
            s.dot_pairs(x, w, acc)
        }
    };
}

/// Multiplied one by one, in f32.
macro_rules! by_halves {
    ($parts:literal) => {
        type X = f32;
        type Open<S: Simd> = S::F;
        const PARTS: usize = $parts;

        #[inline(always)]
        fn of_pairs<S: Simd>(s: S, pairs: S::Pairs, part: usize) -> S::F {
            s.halves(pairs)[part]
        }
        #[inline(always)]
        fn step<S: Simd>(s: S, x: f32, w: S::F, acc: S::F) -> S::F {
            s.fma(s.splat(x), w, acc)
        }
    };
}

paired_bf16!(Bf16Pairs, by_pairs!(1); as_it_is!(WIDE_PAIRS, is_bf16: true););
paired_bf16!(Bf16Halves, by_halves!(2); as_it_is!(WIDE_HALVES, is_bf16: true););
paired_e4m3!(E4m3Pairs, by_pairs!(2); widens!(Bf16Pairs, WIDE_PAIRS););
paired_e4m3!(E4m3Halves, by_halves!(4); widens!(Bf16Halves, WIDE_HALVES););

#[repr(C, align(64))]
#[derive(Clone, Copy, Default, Zeroable, Pod)]
pub(crate) struct F32Lanes(pub [f32; LANES]);

impl Weight for F32Lanes {
    type Element = f32;
    type X = f32;
    type Open<S: Simd> = S::F;
    const PER_STEP: usize = 1;
    const PARTS: usize = 1;

    #[inline(always)]
    fn set(&mut self, lane: usize, w: &[f32]) {
        self.0[lane] = w[0];
    }
    #[inline(always)]
    fn open<S: Simd>(&self, s: S, _: usize) -> S::F {
        s.load(&self.0)
    }
    fn of_pairs<S: Simd>(_: S, _: S::Pairs, _: usize) -> S::F {
        unreachable!("only bf16 is tight")
    }
    #[inline(always)]
    fn step<S: Simd>(s: S, x: f32, w: S::F, acc: S::F) -> S::F {
        s.fma(s.splat(x), w, acc)
    }
    as_it_is!(WIDE_F32, is_bf16: false);
}

/// All panels of a matrix.
pub(crate) struct Packed<W> {
    /// Packed here, or earlier and now in a mapped file.
    bytes: Bytes,
    is_tight: bool,
    kind: PhantomData<W>,
    /// For each panel and block of K the factor of its 16 outputs, as [`F32Lanes`]; none where weights have no scales. A part of `bytes` if these have them.
    scales: Bytes,
    pub outputs: usize,
    /// Steps of a panel.
    pub steps: usize,
    /// Steps that have a chain of their own; all of them where weights have no scales.
    pub block_steps: usize,
}

/// What [`Packed::bytes`] gave does not fit the matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given} packed bytes for a matrix [{rows}, {cols}]: expected {expected}, or those of a tight one, from a multiple of 64 in memory on"
)]
pub struct UnfitBytes {
    given: usize,
    expected: usize,
    rows: usize,
    cols: usize,
}

/// Block scales of an FP8 matrix: [ceil(rows / block[0]), ceil(cols / block[1])].
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    pub values: &'a [f32],
    pub block: [usize; 2],
}

impl<W: Weight> Packed<W> {
    /// `read(i, to)` reads values of the checkpoint's matrix [rows, cols] from its i-th on.
    pub fn new(
        rows: usize,
        cols: usize,
        scales: Option<Scales<'_>>,
        tight: bool,
        read: impl Fn(usize, &mut [W::Element]),
    ) -> Self {
        let steps = cols.div_ceil(W::PER_STEP);
        let tight = if tight && W::may_be_tight(rows, cols, scales) { Self::tighten(rows, cols, &read) } else { None };
        let is_tight = tight.is_some();
        let panels = tight.unwrap_or_else(|| {
            let mut panels: Vec<W> = Vec::with_capacity(rows.div_ceil(LANES) * steps);
            (0..rows).step_by(LANES).for_each(|first| pack_panel(first..rows, cols, &read, &mut panels));
            AlignedBytes::new(panels)
        });
        Self::of(rows, cols, scales, panels.0, is_tight)
    }

    /// None where too many weights are outliers, or nothing is saved. (Its length tells a tight matrix from another.)
    fn tighten(rows: usize, cols: usize, read: &impl Fn(usize, &mut [W::Element])) -> Option<AlignedBytes> {
        let panels = rows.div_ceil(LANES);
        let mut panel = Vec::with_capacity(cols / W::PER_STEP);
        pack_panel(panels / 2 * LANES..rows, cols, read, &mut panel);
        let mut tight = Tightening::new(panels, bytemuck::cast_slice::<W, Words>(&panel), !rows.is_multiple_of(LANES));
        for first in (0..rows).step_by(LANES) {
            panel.clear();
            pack_panel(first..rows, cols, read, &mut panel);
            if !tight.push(bytemuck::cast_slice::<W, Words>(&panel)) {
                return None;
            }
        }
        let plain = panels * cols / W::PER_STEP * size_of::<W>();
        Some(tight.finish()).filter(|tight| tight.0.len() < plain)
    }

    /// Bytes of a matrix that is not tight: its panels, and the scales that are packed with them.
    pub fn plain_len(rows: usize, cols: usize) -> usize {
        let steps = cols.div_ceil(W::PER_STEP);
        let scales = W::ROW_BLOCK_STEPS.map_or(0, |block| steps.div_ceil(block) * size_of::<F32Lanes>());
        rows.div_ceil(LANES) * (steps * size_of::<W>() + scales)
    }

    /// Of what [`Packed::bytes`] gave for the same matrix.
    pub fn mapped(rows: usize, cols: usize, scales: Option<Scales<'_>>, bytes: Bytes) -> Result<Self, UnfitBytes> {
        let (panels, steps) = (rows.div_ceil(LANES), cols.div_ceil(W::PER_STEP));
        let expected = Self::plain_len(rows, cols);
        let is_aligned = bytes.as_ptr().addr().is_multiple_of(align_of::<W>());
        let is_plain = is_aligned && bytes.len() == expected;
        let is_tight =
            || W::may_be_tight(rows, cols, scales) && Tight::of(&bytes, panels, steps).is_some_and(|t| t.is_sound());
        if !is_plain && !is_tight() {
            return Err(UnfitBytes { given: bytes.len(), expected, rows, cols });
        }
        Ok(Self::of(rows, cols, scales, bytes, !is_plain))
    }

    fn of(rows: usize, cols: usize, scales: Option<Scales<'_>>, bytes: Bytes, is_tight: bool) -> Self {
        let steps = cols.div_ceil(W::PER_STEP);
        let (block_steps, scales) = match (W::ROW_BLOCK_STEPS, scales) {
            (Some(block), _) => (block, bytes.slice(rows.div_ceil(LANES) * steps * size_of::<W>()..)),
            (None, Some(s)) => (s.block[1] / W::PER_STEP, AlignedBytes::new(pack_scales(rows, cols, s)).0),
            (None, None) => (steps, Bytes::new()),
        };
        Self { bytes, is_tight, kind: PhantomData, scales, outputs: rows, steps, block_steps: block_steps.max(1) }
    }

    pub fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Elements of a row of x.
    pub fn x_len(&self) -> usize {
        W::x_len(self.steps)
    }

    /// How many of them each chain takes that a row has: all of them, or those of the last block and of the others.
    pub fn chain_lens(&self) -> [usize; 2] {
        [self.steps, self.block_steps].map(|steps| steps * W::PARTS)
    }

    pub fn view(&self) -> View<'_, W> {
        let Self { bytes, outputs, steps, block_steps, .. } = self;
        let tight = if self.is_tight { Tight::of(bytes, self.panels(), self.steps) } else { None };
        let lanes = if self.is_tight { &[] } else { bytemuck::cast_slice(bytes) };
        // Nothing may lie at any address.
        let scales = if self.scales.is_empty() { &[] } else { bytemuck::cast_slice(&self.scales) };
        View { lanes, tight, first: 0, scales, outputs: *outputs, steps: *steps, block_steps: *block_steps }
    }

    /// The panels, without scales that the matrix has.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// In memory, scales too.
    pub fn size(&self) -> usize {
        self.bytes.len() + if W::ROW_BLOCK_STEPS.is_some() { 0 } else { self.scales.len() }
    }
}

impl Packed<QuadLanes> {
    pub fn quantised(m: &Matrix<'_>, isa: Isa) -> Self {
        Self::of(m.rows, m.cols, None, AlignedBytes::new(quads::packed(m, isa)).0, false)
    }
}

/// A stretch of each of the first 16 of `rows` at a time, turned where it fits the first-level cache and then written once, in order.
fn pack_panel<W: Weight>(
    rows: Range<usize>,
    cols: usize,
    read: &impl Fn(usize, &mut [W::Element]),
    panel: &mut Vec<W>,
) {
    for k in (0..cols).step_by(STRETCH) {
        let mut tile = [W::zeroed(); STRETCH];
        let len = STRETCH.min(cols - k);
        for (lane, row) in rows.clone().take(LANES).enumerate() {
            let mut values = [W::Element::default(); STRETCH];
            let at = row * cols + k;
            if len == STRETCH {
                read(at, &mut values);
            } else {
                read(at, &mut values[..len]);
            }
            for (step, w) in tile.iter_mut().zip(values.chunks_exact(W::PER_STEP)) {
                step.set(lane, w);
            }
        }
        panel.extend_from_slice(&tile[..len.div_ceil(W::PER_STEP)]);
    }
}

/// Weights made here, aligned as they are.
pub(super) struct AlignedBytes(Bytes);

impl AlignedBytes {
    pub fn new<T: Pod + Send + Sync>(values: Vec<T>) -> Self {
        struct Owner<T>(Vec<T>);
        impl<T: Pod> AsRef<[u8]> for Owner<T> {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        Self(Bytes::from_owner(Owner(values)))
    }
}

/// Panels from `first` on, as a kernel reads them.
pub(crate) struct View<'a, W> {
    /// None of a tight matrix.
    lanes: &'a [W],
    tight: Option<Tight<'a>>,
    first: usize,
    /// Of all panels.
    scales: &'a [F32Lanes],
    pub outputs: usize,
    pub steps: usize,
    pub block_steps: usize,
}

impl<W> Clone for View<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for View<'_, W> {}

impl<'a, W: Weight> View<'a, W> {
    /// Panels from `first` on in another form.
    pub fn of<V: Weight>(self, lanes: &'a [V], first: usize) -> View<'a, V> {
        let Self { scales, outputs, .. } = self;
        let [steps, block_steps] = [self.steps, self.block_steps].map(|steps| steps * W::PER_STEP / V::PER_STEP);
        View { lanes, tight: None, first, scales, outputs, steps, block_steps }
    }

    #[inline(always)]
    pub(super) fn tight(&self) -> Option<Tight<'a>> {
        self.tight
    }

    /// Of one panel in memory.
    pub fn panel_lines(&self) -> usize {
        self.tight.map_or(self.steps * size_of::<W>() / size_of::<Line>(), |tight| tight.panel_groups * GROUP_LINES)
    }

    /// The lines that some panels take in memory, in order.
    pub fn lines(&self, panels: Range<usize>) -> &'a [Line] {
        match self.tight {
            Some(tight) => lines(tight.groups(panels)),
            None => lines(self.panels(panels)),
        }
    }

    #[inline(always)]
    pub fn panel(&self, panel: usize) -> &'a [W] {
        &self.lanes[(panel - self.first) * self.steps..][..self.steps]
    }

    /// Some panels, one after the other.
    pub fn panels(&self, panels: Range<usize>) -> &'a [W] {
        let start = panels.start - self.first;
        &self.lanes[start * self.steps..(start + panels.len()) * self.steps]
    }

    /// The factors of each block of a panel; empty where weights have no scales.
    #[inline(always)]
    pub fn scales(&self, panel: usize) -> &'a [F32Lanes] {
        let blocks = if self.scales.is_empty() { 0 } else { self.steps.div_ceil(self.block_steps) };
        &self.scales[panel * blocks..][..blocks]
    }
}

fn pack_scales(rows: usize, cols: usize, s: Scales<'_>) -> Vec<F32Lanes> {
    let blocks = cols.div_ceil(s.block[1]);
    let mut packed = vec![F32Lanes::zeroed(); rows.div_ceil(LANES) * blocks];
    for row in 0..rows {
        for block in 0..blocks {
            packed[row / LANES * blocks + block].set(row % LANES, &s.values[row / s.block[0] * blocks + block..][..1]);
        }
    }
    packed
}
