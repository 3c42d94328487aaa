//! Weights packed in panels of 16 outputs.
//!
//! ```text
//! panel p holds outputs 16p .. 16p+16 (missing ones are zero); lanes[p][step] holds what one step of the chain over K needs for all 16
//! step of f32, bf16, e4m3:  one k,          [w[16p][k], w[16p+1][k], ...]
//! step of pairs:            k = 2s, 2s + 1, a u32 or two bytes for each output, the lower k in the upper half
//! ```
//! A forward pass then reads each panel from its first byte to its last.

use crate::simd::{LANES, Simd};

/// One step's weights of a panel.
pub(crate) trait Weight: Copy + Send + Sync {
    /// One weight as it is stored.
    type Element: Copy;
    /// What an activation row is made of: one step's worth of x.
    type X: Copy + Send + Sync;
    /// The weights in registers.
    type Open<S: Simd>: Copy;
    /// Values of k in a step.
    const PER_STEP: usize;
    const ZERO: Self;

    fn set(&mut self, lane: usize, k: usize, w: Self::Element);
    fn open<S: Simd>(&self, s: S) -> Self::Open<S>;
    fn step<S: Simd>(s: S, x: Self::X, w: Self::Open<S>, acc: S::F) -> S::F;
}

/// A weight whose step is one k, widened to f32.
macro_rules! widened {
    ($(#[$align:meta])* $name:ident, $element:ty, $zero:expr, $load:ident) => {
        $(#[$align])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name([$element; LANES]);

        impl Weight for $name {
            type Element = $element;
            type X = f32;
            type Open<S: Simd> = S::F;
            const PER_STEP: usize = 1;
            const ZERO: Self = Self([$zero; LANES]);

            fn set(&mut self, lane: usize, _k: usize, w: $element) {
                self.0[lane] = w;
            }
            #[inline(always)]
            fn open<S: Simd>(&self, s: S) -> S::F {
                s.$load(&self.0)
            }
            #[inline(always)]
            fn step<S: Simd>(s: S, x: f32, w: S::F, acc: S::F) -> S::F {
                s.fma(s.splat(x), w, acc)
            }
        }
    };
}

/// A weight whose step is a pair of k, multiplied as bf16.
macro_rules! paired {
    ($(#[$align:meta])* $name:ident, $element:ty, $store:ty, $len:expr, $set:expr, $load:ident) => {
        $(#[$align])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name([$store; $len]);

        impl Weight for $name {
            type Element = $element;
            type X = u32;
            type Open<S: Simd> = S::Pairs;
            const PER_STEP: usize = 2;
            const ZERO: Self = Self([0; $len]);

            fn set(&mut self, lane: usize, k: usize, w: $element) {
                let set: fn(&mut [$store; $len], usize, usize, $element) = $set;
                set(&mut self.0, lane, k, w);
            }
            #[inline(always)]
            fn open<S: Simd>(&self, s: S) -> S::Pairs {
                s.$load(&self.0)
            }
            #[inline(always)]
            fn step<S: Simd>(s: S, x: u32, w: S::Pairs, acc: S::F) -> S::F {
                s.dot_pairs(x, w, acc)
            }
        }
    };
}

widened!(
    #[repr(align(64))]
    F32Lanes,
    f32,
    0.0,
    load
);
widened!(
    #[repr(align(32))]
    Bf16Lanes,
    u16,
    0,
    widen_bf16
);
widened!(
    #[repr(align(16))]
    E4m3Lanes,
    u8,
    0,
    widen_e4m3
);
paired!(
    #[repr(align(64))]
    Bf16Pairs,
    u16,
    u32,
    LANES,
    |to, lane, k, w| to[lane] |= u32::from(w) << (16 * (1 - k % 2)),
    pairs_bf16
);
paired!(
    #[repr(align(32))]
    E4m3Pairs,
    u8,
    u8,
    2 * LANES,
    |to, lane, k, w| to[2 * lane + 1 - k % 2] = w,
    pairs_e4m3
);

/// All panels of a matrix.
pub(crate) struct Packed<W> {
    lanes: Vec<W>,
    /// For each panel and block of K the factor of its 16 outputs; none where weights have no scales.
    scales: Vec<F32Lanes>,
    pub outputs: usize,
    /// Steps of a panel.
    pub steps: usize,
    /// Steps that have a chain of their own; all of them where weights have no scales.
    pub block_steps: usize,
}

/// Block scales of an FP8 matrix: [ceil(rows / block[0]), ceil(cols / block[1])].
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    pub values: &'a [f32],
    pub block: [usize; 2],
}

impl<W: Weight> Packed<W> {
    /// `get(row, k)` reads the checkpoint's matrix [rows, cols].
    pub fn new(rows: usize, cols: usize, scales: Option<Scales<'_>>, get: impl Fn(usize, usize) -> W::Element) -> Self {
        let steps = cols.div_ceil(W::PER_STEP);
        let panels = rows.div_ceil(LANES);
        let mut lanes = vec![W::ZERO; panels * steps];
        for (panel, lanes) in lanes.chunks_exact_mut(steps.max(1)).enumerate() {
            let first = panel * LANES;
            let live = LANES.min(rows - first);
            for k in 0..cols {
                for lane in 0..live {
                    lanes[k / W::PER_STEP].set(lane, k, get(first + lane, k));
                }
            }
        }
        let block_steps = scales.map_or(steps, |s| s.block[1] / W::PER_STEP).max(1);
        let scales = scales.map_or_else(Vec::new, |s| pack_scales(rows, cols, s));
        Self { lanes, scales, outputs: rows, steps, block_steps }
    }

    pub fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    #[inline(always)]
    pub fn panel(&self, panel: usize) -> &[W] {
        &self.lanes[panel * self.steps..][..self.steps]
    }

    /// The factors of each block of a panel; empty where weights have no scales.
    #[inline(always)]
    pub fn scales(&self, panel: usize) -> &[F32Lanes] {
        let blocks = if self.scales.is_empty() { 0 } else { self.steps.div_ceil(self.block_steps) };
        &self.scales[panel * blocks..][..blocks]
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&self.lanes[..]) + size_of_val(&self.scales[..])
    }
}

fn pack_scales(rows: usize, cols: usize, s: Scales<'_>) -> Vec<F32Lanes> {
    let blocks = cols.div_ceil(s.block[1]);
    let mut packed = vec![F32Lanes::ZERO; rows.div_ceil(LANES) * blocks];
    for row in 0..rows {
        for block in 0..blocks {
            packed[row / LANES * blocks + block].set(row % LANES, 0, s.values[row / s.block[0] * blocks + block]);
        }
    }
    packed
}
