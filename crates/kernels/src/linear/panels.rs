//! Weights packed in panels of 16 outputs.
//!
//! ```text
//! panel p holds outputs 16p .. 16p+16 (missing ones are zero); lanes[p][step] holds what one step of the chain over K needs for all 16
//! step of f32:         one k,            [w[16p][k], w[16p+1][k], ...]
//! step of bf16, e4m3:  k = 2s, 2s + 1,   a u32 or two bytes for each output, the lower k in the upper half
//! ```
//! A forward pass then reads each panel from its first byte to its last. A pair is multiplied as it is, or by halves: one load and one
//! operation widen the lower k's sixteen, one more the higher k's, where sixteen values of a single k would take two each.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use bytes::Bytes;

use crate::simd::{LANES, Simd};

/// Values of a row that are read at a time: some cache lines.
const STRETCH: usize = 64;

/// One step's weights of a panel.
pub(crate) trait Weight: Pod + Send + Sync {
    /// One weight as it is stored.
    type Element: Copy + Default;
    /// What an activation row is made of.
    type X: Copy + Send + Sync;
    /// A part of a step's weights in registers.
    type Open<S: Simd>: Copy;
    /// Values of k in a step.
    const PER_STEP: usize;
    /// Elements of x in a step, one for each part of its weights.
    const PARTS: usize;
    /// The same weights opened once and for all, where opening costs as much as multiplying (else Self). They take the same
    /// x and give the same bits.
    type Wide: Weight<X = Self::X>;
    /// Rows from which that pays.
    const WIDEN_ROWS_MIN: usize;

    /// One output's weights of this step: PER_STEP of them.
    fn set(&mut self, lane: usize, w: &[Self::Element]);
    fn open<S: Simd>(&self, s: S, part: usize) -> Self::Open<S>;
    fn step<S: Simd>(s: S, x: Self::X, w: Self::Open<S>, acc: S::F) -> S::F;
    fn widen<S: Simd>(&self, s: S) -> Self::Wide;
    /// A thread's scratch of any content, to be given back. (No closure: it would not be compiled for the instruction set.)
    fn take_wide() -> Vec<Self::Wide>;
    fn give_back_wide(scratch: Vec<Self::Wide>);
}

thread_local! {
    static WIDE_HALVES: Cell<Vec<Bf16Halves>> = const { Cell::new(Vec::new()) };
    static WIDE_PAIRS: Cell<Vec<Bf16Pairs>> = const { Cell::new(Vec::new()) };
}

/// Opening is cheap: it stays as it is.
macro_rules! as_it_is {
    () => {
        type Wide = Self;
        const WIDEN_ROWS_MIN: usize = usize::MAX;

        #[inline(always)]
        fn widen<S: Simd>(&self, _: S) -> Self {
            *self
        }
        fn take_wide() -> Vec<Self> {
            Vec::new()
        }
        fn give_back_wide(_: Vec<Self>) {}
    };
}

/// e4m3 as bf16.
macro_rules! widens {
    ($wide:ident, $scratch:ident, $rows_min:literal) => {
        type Wide = $wide;
        const WIDEN_ROWS_MIN: usize = $rows_min;

        #[inline(always)]
        fn widen<S: Simd>(&self, s: S) -> $wide {
            let mut wide = $wide::default();
            s.store_pairs(s.pairs_e4m3(&self.0), &mut wide.0);
            wide
        }
        fn take_wide() -> Vec<$wide> {
            $scratch.take()
        }
        fn give_back_wide(scratch: Vec<$wide>) {
            $scratch.set(scratch);
        }
    };
}

/// A weight whose step is a pair of k, kept as `$kept`.
macro_rules! paired {
    ($name:ident, $align:literal, [$element:ty; $len:expr] of $kept:ty, $set:expr, $($by:tt)*) => {
        #[repr(C, align($align))]
        #[derive(Clone, Copy, Default, Zeroable, Pod)]
        pub(crate) struct $name(pub [$kept; $len]);

        impl Weight for $name {
            type Element = $element;
            const PER_STEP: usize = 2;

            #[inline(always)]
            fn set(&mut self, lane: usize, w: &[$element]) {
                let set: fn(&mut [$kept; $len], usize, $element, $element) = $set;
                set(&mut self.0, lane, w[0], w[1]);
            }
            $($by)*
        }
    };
}

/// u32 of bf16.
macro_rules! paired_bf16 {
    ($name:ident, $($by:tt)*) => {
        paired!($name, 64, [u16; LANES] of u32, |to, lane, a, b| to[lane] = u32::from(a) << 16 | u32::from(b), $($by)*);
    };
}

/// Two bytes of e4m3.
macro_rules! paired_e4m3 {
    ($name:ident, $($by:tt)*) => {
        paired!($name, 32, [u8; 2 * LANES] of u8, |to, lane, a, b| (to[2 * lane + 1], to[2 * lane]) = (a, b), $($by)*);
    };
}

/// Multiplied as pairs of bf16.
macro_rules! by_pairs {
    ($load:ident) => {
        type X = u32;
        type Open<S: Simd> = S::Pairs;
        const PARTS: usize = 1;

        #[inline(always)]
        fn open<S: Simd>(&self, s: S, _: usize) -> S::Pairs {
            s.$load(&self.0)
        }
        #[inline(always)]
        fn step<S: Simd>(s: S, x: u32, w: S::Pairs, acc: S::F) -> S::F {
            s.dot_pairs(x, w, acc)
        }
    };
}

/// Multiplied one by one, in f32.
macro_rules! by_halves {
    ($load:ident, $load_again:ident) => {
        type X = f32;
        type Open<S: Simd> = S::F;
        const PARTS: usize = 2;

        #[inline(always)]
        fn open<S: Simd>(&self, s: S, part: usize) -> S::F {
            if part == 0 { s.halves(s.$load(&self.0))[0] } else { s.halves(s.$load_again(&self.0))[1] }
        }
        #[inline(always)]
        fn step<S: Simd>(s: S, x: f32, w: S::F, acc: S::F) -> S::F {
            s.fma(s.splat(x), w, acc)
        }
    };
}

paired_bf16!(Bf16Pairs, by_pairs!(pairs_bf16); as_it_is!(););
paired_bf16!(Bf16Halves, by_halves!(pairs_bf16, pairs_bf16_again); as_it_is!(););
paired_e4m3!(E4m3Pairs, by_pairs!(pairs_e4m3); widens!(Bf16Pairs, WIDE_PAIRS, 18););
paired_e4m3!(E4m3Halves, by_halves!(pairs_e4m3, pairs_e4m3); widens!(Bf16Halves, WIDE_HALVES, 9););

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
    #[inline(always)]
    fn step<S: Simd>(s: S, x: f32, w: S::F, acc: S::F) -> S::F {
        s.fma(s.splat(x), w, acc)
    }
    as_it_is!();
}

/// All panels of a matrix.
pub(crate) struct Packed<W> {
    lanes: Storage<W>,
    /// For each panel and block of K the factor of its 16 outputs; none where weights have no scales.
    scales: Vec<F32Lanes>,
    pub outputs: usize,
    /// Steps of a panel.
    pub steps: usize,
    /// Steps that have a chain of their own; all of them where weights have no scales.
    pub block_steps: usize,
}

/// Packed here, or earlier and now in a mapped file.
enum Storage<W> {
    Own(Vec<W>),
    Mapped(Bytes, PhantomData<W>),
}

impl<W: Weight> Storage<W> {
    fn lanes(&self) -> &[W] {
        match self {
            Self::Own(lanes) => lanes,
            Self::Mapped(bytes, _) => bytemuck::cast_slice(bytes),
        }
    }
}

/// What [`Packed::bytes`] gave does not fit the matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given} packed bytes for a matrix [{rows}, {cols}] of {expected}, or not at a multiple of 64 in memory")]
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
    /// `read(i, to)` reads values of the checkpoint's matrix [rows, cols] from its i-th on. A stretch of each of 16 rows at a
    /// time, turned where it fits the first-level cache and then written once, in order.
    pub fn new(rows: usize, cols: usize, scales: Option<Scales<'_>>, read: impl Fn(usize, &mut [W::Element])) -> Self {
        let steps = cols.div_ceil(W::PER_STEP);
        let mut lanes = Vec::with_capacity(rows.div_ceil(LANES) * steps);
        for first in (0..rows).step_by(LANES) {
            for k in (0..cols).step_by(STRETCH) {
                let mut tile = [W::zeroed(); STRETCH];
                let len = STRETCH.min(cols - k);
                for lane in 0..LANES.min(rows - first) {
                    let mut values = [W::Element::default(); STRETCH];
                    let at = (first + lane) * cols + k;
                    if len == STRETCH {
                        read(at, &mut values);
                    } else {
                        read(at, &mut values[..len]);
                    }
                    for (step, w) in tile.iter_mut().zip(values.chunks_exact(W::PER_STEP)) {
                        step.set(lane, w);
                    }
                }
                lanes.extend_from_slice(&tile[..len.div_ceil(W::PER_STEP)]);
            }
        }
        Self::of(rows, cols, scales, Storage::Own(lanes))
    }

    /// Of what [`Packed::bytes`] gave for the same matrix.
    pub fn mapped(rows: usize, cols: usize, scales: Option<Scales<'_>>, bytes: Bytes) -> Result<Self, UnfitBytes> {
        let expected = rows.div_ceil(LANES) * cols.div_ceil(W::PER_STEP) * size_of::<W>();
        if bytes.len() != expected || !bytes.as_ptr().addr().is_multiple_of(align_of::<W>()) {
            return Err(UnfitBytes { given: bytes.len(), expected, rows, cols });
        }
        Ok(Self::of(rows, cols, scales, Storage::Mapped(bytes, PhantomData)))
    }

    fn of(rows: usize, cols: usize, scales: Option<Scales<'_>>, lanes: Storage<W>) -> Self {
        let steps = cols.div_ceil(W::PER_STEP);
        let block_steps = scales.map_or(steps, |s| s.block[1] / W::PER_STEP).max(1);
        let scales = scales.map_or_else(Vec::new, |s| pack_scales(rows, cols, s));
        Self { lanes, scales, outputs: rows, steps, block_steps }
    }

    pub fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Elements of a row of x.
    pub fn x_len(&self) -> usize {
        self.steps * W::PARTS
    }

    pub fn view(&self) -> View<'_, W> {
        let Self { lanes, scales, outputs, steps, block_steps } = self;
        View { lanes: lanes.lanes(), first: 0, scales, outputs: *outputs, steps: *steps, block_steps: *block_steps }
    }

    /// The panels, without scales.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self.lanes.lanes())
    }

    /// In memory, scales too.
    pub fn size(&self) -> usize {
        size_of_val(self.lanes.lanes()) + size_of_val(&self.scales[..])
    }
}

/// Panels from `first` on, as a kernel reads them.
pub(crate) struct View<'a, W> {
    lanes: &'a [W],
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

impl<'a, W> View<'a, W> {
    /// Panels from `first` on in another form.
    pub fn of<V>(self, lanes: &'a [V], first: usize) -> View<'a, V> {
        let Self { scales, outputs, steps, block_steps, .. } = self;
        View { lanes, first, scales, outputs, steps, block_steps }
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
