//! y = x Wᵀ. Owns packed weights and the cutting of a call into tasks; never splits K.
//!
//! ```text
//! y[r, o] = one chain over k ascending from 0:                 acc = fma(x[r, k], w[o, k], acc)
//! FP8:      for each block b of K its own chain over the codes, then  acc = fma(chain_b, scale[o, b], acc), b ascending
//! bf16-fma: w rounded to bf16 first (FP8 codes are exact in it)
//! bf16-dp:  x too, and denormals flushed at every step (`Simd::dot_pairs`)
//! int8:     both in blocks of 128 values of K, each with its scale (`quads`)
//! ```

mod band;
mod generic;
mod panels;
mod quads;
mod rows;
mod sums;
#[cfg(test)]
mod tests;
pub(crate) mod tight;

use std::cell::Cell;
use std::ops::Range;

use bytes::Bytes;
use half::f16;

pub use panels::UnfitBytes;
pub use quads::int8_bytes;
pub use rows::RowsRef;

pub(crate) use generic::{Place, To, rows_of_tile};
pub(crate) use panels::{Bf16Pairs, F32Lanes, Weight};
pub(crate) use rows::{Form, Ready, bf16_bits, pair, with_rows, with_scratch};
pub(crate) use sums::{Fetch, Sums};

use crate::pool::{Pool, Shared};
use crate::simd::Isa;
use crate::{Dtype, Matrix, MatrixData, Numerics, e4m3_to_f32};
use band::{Bands, Fill};
use generic::Tiles;
use panels::{Bf16Halves, E4m3Halves, E4m3Pairs, Packed, Scales};
use quads::QuadLanes;

/// Packed weights of y = x Wᵀ.
pub struct Linear {
    panels: Panels,
    in_features: usize,
    numerics: Numerics,
}

enum Panels {
    F32(Packed<F32Lanes>),
    Bf16(Packed<Bf16Halves>),
    E4m3(Packed<E4m3Halves>),
    Bf16Pairs(Packed<Bf16Pairs>),
    E4m3Pairs(Packed<E4m3Pairs>),
    Quads(Packed<QuadLanes>),
}

/// Evaluates an expression on whichever panels these are.
macro_rules! on_panels {
    ($panels:expr, $packed:ident => $do:expr) => {
        match $panels {
            Panels::F32($packed) => $do,
            Panels::Bf16($packed) => $do,
            Panels::E4m3($packed) => $do,
            Panels::Bf16Pairs($packed) => $do,
            Panels::E4m3Pairs($packed) => $do,
            Panels::Quads($packed) => $do,
        }
    };
}

impl Linear {
    /// `m` is [out, in]. Panics where its data does not have the size that its shape says (`crates/model` checks files).
    pub fn pack(m: &Matrix<'_>, n: Numerics) -> Self {
        let tight = n.kernels().opens_tight();
        Self::of(m, n, &Source::Matrix { tight }).expect("only packed bytes can be unfit")
    }

    /// The same without packing: `packed` is what [`Linear::packed`] gave for the same matrix and numerics.
    pub fn mapped(m: &Matrix<'_>, n: Numerics, packed: Bytes) -> Result<Self, UnfitBytes> {
        Self::of(m, n, &Source::Packed(packed))
    }

    fn of(m: &Matrix<'_>, n: Numerics, source: &Source) -> Result<Self, UnfitBytes> {
        m.check();
        let panels = if n.quantises() { Panels::Quads(source.quantised(m, n)?) } else { source.as_it_is(m, n)? };
        Ok(Self { panels, in_features: m.cols, numerics: n })
    }

    /// `w` is row-major [rows = out, cols = in].
    pub fn pack_f32(rows: usize, cols: usize, w: &[f32], n: Numerics) -> Self {
        Self::pack(&Matrix { rows, cols, data: MatrixData::F32(bytemuck::cast_slice(w)) }, n)
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        on_panels!(&self.panels, p => p.outputs)
    }

    /// Bytes of the packed weights and their scales.
    pub fn bytes(&self) -> usize {
        on_panels!(&self.panels, p => p.size())
    }

    /// The packed weights, for [`Linear::mapped`].
    pub fn packed(&self) -> &[u8] {
        on_panels!(&self.panels, p => p.bytes())
    }

    /// x is [rows, in], y is [rows, out].
    pub fn forward(&self, pool: &Pool, x: RowsRef<'_>, y: &mut [f32]) {
        let rows = y.len().checked_div(self.out_features()).unwrap_or(0);
        assert_eq!(x.len(), rows * self.in_features, "x does not have as many rows as y");
        assert_eq!(y.len(), rows * self.out_features(), "y does not have whole rows");
        with_rows(pool, self.numerics.kernels(), self.form(), x, self.in_features, |x| {
            let to = To { y: Shared::new(y), stride: self.out_features(), offset: 0 };
            let job = Job { x, place: self.place(), linears: &[(self, to)] };
            let work = rows * self.in_features * self.out_features();
            let cut = Cut::new(pool, work, rows, self.panels());
            pool.each(cut.tasks(), work, |task| job.run(cut.rows(task), cut.panels(task)));
        });
    }

    pub(crate) fn form(&self) -> Form {
        match (&self.panels, self.numerics.activations()) {
            (Panels::Bf16Pairs(_) | Panels::E4m3Pairs(_), _) => Form::Pairs,
            (Panels::Quads(_), _) => Form::Quads,
            (_, Dtype::Bf16) => Form::Rounded,
            (_, Dtype::F32) => Form::Full,
        }
    }

    pub(crate) fn numerics(&self) -> Numerics {
        self.numerics
    }

    pub(crate) fn panels(&self) -> usize {
        on_panels!(&self.panels, p => p.panels())
    }

    /// Elements of a row of x in this linear's form.
    pub(crate) fn x_len(&self) -> usize {
        on_panels!(&self.panels, p => p.x_len())
    }

    /// Dense rows of x.
    pub(crate) fn place<'a>(&self) -> Place<'a> {
        Place { pick: None, stride: self.x_len(), offset: 0 }
    }

    fn takes_bands(&self) -> bool {
        on_panels!(&self.panels, p => p.chain_lens()).into_iter().all(band::has_form)
    }
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Linear({} -> {}, {})", self.in_features, self.out_features(), self.numerics.name())
    }
}

/// Where a linear's panels come from.
enum Source {
    /// Bf16 is made `tight` where that can be.
    Matrix {
        tight: bool,
    },
    Packed(Bytes),
}

impl Source {
    fn as_it_is(&self, m: &Matrix<'_>, n: Numerics) -> Result<Panels, UnfitBytes> {
        let (rows, cols) = (m.rows, m.cols);
        Ok(match (&m.data, n.dtype()) {
            (MatrixData::F32(b), Dtype::F32) => {
                Panels::F32(self.panels(rows, cols, None, |i, to| read(b, i, to, f32::from_le_bytes))?)
            }
            (MatrixData::F16(b), Dtype::F32) => {
                Panels::F32(self.panels(rows, cols, None, |i, to| read(b, i, to, |b| f16::from_le_bytes(b).to_f32()))?)
            }
            (MatrixData::F32(b), Dtype::Bf16) => {
                self.bf16_panels(n, rows, cols, |i, to| read(b, i, to, |b| bf16_bits(f32::from_le_bytes(b)) as u16))?
            }
            (MatrixData::F16(b), Dtype::Bf16) => self.bf16_panels(n, rows, cols, |i, to| {
                read(b, i, to, |b| bf16_bits(f16::from_le_bytes(b).to_f32()) as u16)
            })?,
            (MatrixData::Bf16(b), _) => self.bf16_panels(n, rows, cols, |i, to| read(b, i, to, u16::from_le_bytes))?,
            (MatrixData::Fp8 { q, scales, block }, _) => {
                let scales = Some(Scales { values: scales, block: *block });
                let read = |i: usize, to: &mut [u8]| to.copy_from_slice(&q[i..i + to.len()]);
                match (block[1] % 4, cols % 4, n.by_pairs()) {
                    (0, 0, true) => Panels::E4m3Pairs(self.panels(rows, cols, scales, read)?),
                    (0, 0, false) => Panels::E4m3(self.panels(rows, cols, scales, read)?),
                    // Four values of k cannot lie across two blocks, nor end beyond a row of x.
                    (0 | 2, _, true) => Panels::Bf16Pairs(self.panels(rows, cols, scales, |i, to| {
                        to.iter_mut().zip(&q[i..]).for_each(|(to, code)| *to = bf16_bits(e4m3_to_f32(*code)) as u16)
                    })?),
                    _ => Panels::F32(self.panels(rows, cols, scales, |i, to| {
                        to.iter_mut().zip(&q[i..]).for_each(|(to, code)| *to = e4m3_to_f32(*code))
                    })?),
                }
            }
        })
    }

    fn quantised(&self, m: &Matrix<'_>, n: Numerics) -> Result<Packed<QuadLanes>, UnfitBytes> {
        match self {
            Self::Matrix { .. } => Ok(Packed::quantised(m, n.kernels())),
            Self::Packed(bytes) => Packed::mapped(m.rows, m.cols, None, bytes.clone()),
        }
    }

    fn panels<W: Weight>(
        &self,
        rows: usize,
        cols: usize,
        scales: Option<Scales<'_>>,
        read: impl Fn(usize, &mut [W::Element]),
    ) -> Result<Packed<W>, UnfitBytes> {
        match self {
            Self::Matrix { tight } => Ok(Packed::new(rows, cols, scales, *tight, read)),
            Self::Packed(bytes) => Packed::mapped(rows, cols, scales, bytes.clone()),
        }
    }

    fn bf16_panels(
        &self,
        n: Numerics,
        rows: usize,
        cols: usize,
        read: impl Fn(usize, &mut [u16]),
    ) -> Result<Panels, UnfitBytes> {
        Ok(match (n.by_pairs(), cols % 2) {
            (true, _) => Panels::Bf16Pairs(self.panels(rows, cols, None, read)?),
            (false, 0) => Panels::Bf16(self.panels(rows, cols, None, read)?),
            // The last pair would end beyond a row of x.
            _ => Panels::F32(self.panels(rows, cols, None, |i, to| {
                let mut bits = vec![0; to.len()];
                read(i, &mut bits);
                to.iter_mut().zip(bits).for_each(|(to, bits)| *to = f32::from_bits(u32::from(bits) << 16));
            })?),
        })
    }
}

/// Values of N bytes, from the i-th on.
#[inline(always)]
fn read<const N: usize, T>(bytes: &[u8], i: usize, to: &mut [T], value: impl Fn([u8; N]) -> T) {
    for (to, bytes) in to.iter_mut().zip(bytes[i * N..].as_chunks::<N>().0) {
        *to = value(*bytes);
    }
}

thread_local! {
    static BANDS: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Linears over the same rows of x, to be run piece by piece.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub x: Ready<'a>,
    pub place: Place<'a>,
    /// One at least, all of the same form and numerics.
    pub linears: &'a [(&'a Linear, To<'a>)],
}

impl Job<'_> {
    /// Writes the columns of `panels`, as far as a linear has them, of `rows` of every y. No other call may be at work on them.
    pub fn run(&self, rows: Range<usize>, panels: Range<usize>) {
        let Self { x, place, linears } = *self;
        let (isa, elements) = (linears[0].0.numerics.kernels(), linears[0].0.x_len());
        let has_bands = isa.is_wide() && rows.len() > band::ROWS_BELOW && linears.iter().all(|(l, _)| l.takes_bands());
        if !has_bands {
            return self.tiles(isa, rows, panels, None);
        }
        let together = band::rows_together(rows.len(), elements);
        with_scratch(&BANDS, band::scratch_len(together, elements), |to| {
            for first in rows.clone().step_by(together) {
                let rows = first..rows.end.min(first + together);
                let bands = match x {
                    Ready::F32(x) => isa.run(Fill { x, place, rows: rows.clone(), elements, to }),
                    Ready::Pairs(x) | Ready::Quads(x) => isa.run(Fill { x, place, rows: rows.clone(), elements, to }),
                };
                self.tiles(isa, rows, panels.clone(), Some(bands));
            }
        });
    }

    fn tiles(&self, isa: Isa, rows: Range<usize>, panels: Range<usize>, bands: Option<Bands<'_>>) {
        let Self { place, .. } = *self;
        macro_rules! run {
            ($weights:ident, $x:ident, $to:ident) => {{
                let (rows, panels) = (rows.clone(), panels.start..panels.end.min($weights.panels()));
                isa.run(Tiles { weights: $weights.view(), x: $x, place, to: *$to, rows, panels, bands })
            }};
        }
        for (linear, to) in self.linears {
            match (&linear.panels, self.x) {
                (Panels::F32(weights), Ready::F32(x)) => run!(weights, x, to),
                (Panels::Bf16(weights), Ready::F32(x)) => run!(weights, x, to),
                (Panels::E4m3(weights), Ready::F32(x)) => run!(weights, x, to),
                (Panels::Bf16Pairs(weights), Ready::Pairs(x)) => run!(weights, x, to),
                (Panels::E4m3Pairs(weights), Ready::Pairs(x)) => run!(weights, x, to),
                (Panels::Quads(weights), Ready::Quads(x)) => run!(weights, x, to),
                _ => unreachable!("rows are made in the form of the linear they are for"),
            }
        }
    }
}

/// A call cut into tasks: ranges of panels, and of rows where panels alone are too few.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    rows: usize,
    panels: usize,
    rows_each: usize,
    panels_each: usize,
    across: usize,
}

/// A task takes whole groups of panels and, if it must share rows, enough of them to be worth reading the weights for.
const PANELS_EACH_MIN: usize = 8;
const ROWS_EACH_MIN: usize = 24;
/// So many rows are worth it: they stay in the second-level cache, and fewer tasks bring the same rows into bands.
const ROWS_EACH_MANY: usize = 120;

impl Cut {
    pub fn new(pool: &Pool, work: usize, rows: usize, panels: usize) -> Self {
        Self::into(pool.parts(work), rows, panels)
    }

    /// Into about so many tasks.
    pub fn into(parts: usize, rows: usize, panels: usize) -> Self {
        let down_min = (rows / ROWS_EACH_MANY).clamp(1, parts);
        let across_max = parts.div_ceil(down_min);
        let panels_each = panels.div_ceil(across_max).next_multiple_of(PANELS_EACH_MIN).max(PANELS_EACH_MIN);
        let across = panels.div_ceil(panels_each);
        let down = parts.div_ceil(across.max(1));
        Self { rows, panels, rows_each: rows.div_ceil(down).max(ROWS_EACH_MIN), panels_each, across }
    }

    pub fn tasks(&self) -> usize {
        self.across * self.rows.div_ceil(self.rows_each)
    }

    pub fn rows(&self, task: usize) -> Range<usize> {
        let first = task / self.across * self.rows_each;
        first..self.rows.min(first + self.rows_each)
    }

    pub fn panels(&self, task: usize) -> Range<usize> {
        let first = task % self.across * self.panels_each;
        first..self.panels.min(first + self.panels_each)
    }
}
