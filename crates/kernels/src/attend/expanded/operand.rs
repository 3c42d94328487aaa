//! The two forms of keys and values: f32 as it is, and pairs of bf16.

use std::cell::Cell;
use std::ops::Range;
use std::thread::LocalKey;

use crate::linear::{Bf16Pairs, F32Lanes, Ready, Weight, bf16_bits, pair};
use crate::pages::Page;
use crate::simd::LANES;

/// A weight that keys and values can be made into.
pub(super) trait Operand: Weight<X: Default + 'static> + Default + 'static {
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>>;
    fn x_scratch() -> &'static LocalKey<Cell<Vec<Self::X>>>;
    fn ready(x: &[Self::X]) -> Ready<'_>;
    /// A row of x, with a zero behind an odd end.
    fn steps(row: &[f32], to: &mut [Self::X]);
    /// The same of what a page holds.
    fn page_steps(page: Page<'_>, at: Range<usize>, to: &mut [Self::X]);
    fn set_step(&mut self, lane: usize, x: Self::X);
    /// A step of sixteen outputs: of each PER_STEP rows, `stride` apart.
    fn stack(rows: &[f32], stride: usize) -> Self;
    /// What a step makes of a value.
    fn rounded(x: f32) -> f32;
}

thread_local! {
    static F32_X: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static PAIRS_X: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    static F32_PANELS: Cell<Vec<F32Lanes>> = const { Cell::new(Vec::new()) };
    static PAIRS_PANELS: Cell<Vec<Bf16Pairs>> = const { Cell::new(Vec::new()) };
}

impl Operand for F32Lanes {
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>> {
        &F32_PANELS
    }
    fn x_scratch() -> &'static LocalKey<Cell<Vec<f32>>> {
        &F32_X
    }
    fn ready(x: &[f32]) -> Ready<'_> {
        Ready::F32(x)
    }
    #[inline(always)]
    fn steps(row: &[f32], to: &mut [f32]) {
        to.copy_from_slice(row);
    }
    #[inline(always)]
    fn page_steps(page: Page<'_>, at: Range<usize>, to: &mut [f32]) {
        match page {
            Page::F32(values) => to.copy_from_slice(&values[at]),
            Page::Bf16(values) => {
                to.iter_mut().zip(&values[at]).for_each(|(to, x)| *to = f32::from_bits(u32::from(*x) << 16))
            }
        }
    }
    #[inline(always)]
    fn set_step(&mut self, lane: usize, x: f32) {
        self.0[lane] = x;
    }
    #[inline(always)]
    fn stack(rows: &[f32], _: usize) -> Self {
        let mut step = Self::default();
        step.0.copy_from_slice(&rows[..LANES]);
        step
    }
    #[inline(always)]
    fn rounded(x: f32) -> f32 {
        x
    }
}

impl Operand for Bf16Pairs {
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>> {
        &PAIRS_PANELS
    }
    fn x_scratch() -> &'static LocalKey<Cell<Vec<u32>>> {
        &PAIRS_X
    }
    fn ready(x: &[u32]) -> Ready<'_> {
        Ready::Pairs(x)
    }
    #[inline(always)]
    fn steps(row: &[f32], to: &mut [u32]) {
        pair(row, to, |x| bf16_bits(*x));
    }
    #[inline(always)]
    fn page_steps(page: Page<'_>, at: Range<usize>, to: &mut [u32]) {
        match page {
            Page::F32(values) => pair(&values[at], to, |x| bf16_bits(*x)),
            Page::Bf16(values) => pair(&values[at], to, |x| u32::from(*x)),
        }
    }
    #[inline(always)]
    fn set_step(&mut self, lane: usize, x: u32) {
        self.0[lane] = x;
    }
    #[inline(always)]
    fn stack(rows: &[f32], stride: usize) -> Self {
        let mut step = Self::default();
        let (first, second) = (&rows[..LANES], &rows[stride..][..LANES]);
        for ((to, first), second) in step.0.iter_mut().zip(first).zip(second) {
            *to = bf16_bits(*first) << 16 | bf16_bits(*second);
        }
        step
    }
    #[inline(always)]
    fn rounded(x: f32) -> f32 {
        f32::from_bits(bf16_bits(x) << 16)
    }
}
