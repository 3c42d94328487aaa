//! INT8: weights and rows of x in blocks of 128 values of K, each with a scale of its own, as DeepSeek-V3 blocks its FP8 (its technical report, 3.3: rows of
//! x by 1 x 128), but for weights, which have a scale for each output.
//!
//! ```text
//! block v:  scale = max|v| / 127;  code = v * (127 / max|v|) to the nearest integer, ties to even: -127 to 127
//! y     = one chain over the blocks:  acc = fma(f32(sum of x code * w code) * x scale, w scale, acc)
//!
//! row of x:    u32 of 4 codes of k, the lowest in the lowest byte; then for each block the bits of its scale, and -128 * the sum of its codes; both parts
//!              filled up with zeros to a multiple of four
//! panel of W:  for each such four of k a u32 of 16 outputs, of codes + 128: the instruction takes one factor without a sign, and a row's -128 * sum is what
//!              its sums begin with
//! ```
//! Sums of codes are exact, so that an instruction which adds up four products gives the same bits as one product after the other.
//! A block with an infinity or a NaN has no codes, and a scale that makes a NaN of whatever it meets. One too small for 127 / max|v| is zeros.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::panels::{Packed, Weight};
use super::rows::RowsRef;
use crate::Matrix;
use crate::simd::{Isa, Kernel, LANES, Simd};

/// Values of k.
pub(super) const PER_QUAD: usize = 4;
pub(super) const PER_BLOCK: usize = 128;
const QUADS_PER_BLOCK: usize = PER_BLOCK / PER_QUAD;
/// Both parts of a row come in multiples of so many, as bands want them.
const TOGETHER: usize = 4;
/// A scale, and what sums begin with.
const PER_END: usize = 2;

/// Bytes of a packed matrix [outputs, inputs].
pub fn int8_bytes(outputs: usize, inputs: usize) -> usize {
    Packed::<QuadLanes>::plain_len(outputs, inputs)
}

/// Elements of a row of x of so many quads.
pub(super) fn row_len(quads: usize) -> usize {
    scale_at(quads, 0) + (PER_END * quads.div_ceil(QUADS_PER_BLOCK)).next_multiple_of(TOGETHER)
}

/// Where a row has a block's scale; what the block's sums begin with is behind it.
#[inline(always)]
pub(super) fn scale_at(quads: usize, block: usize) -> usize {
    quads.next_multiple_of(TOGETHER) + PER_END * block
}

/// One row.
pub(super) struct Quantise<'a> {
    pub x: RowsRef<'a>,
    /// [`row_len`] of them.
    pub to: &'a mut [u32],
}

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.x {
            RowsRef::F32(x) => quantise(x, self.to, |x| *x),
            RowsRef::Bf16(x) => quantise(x, self.to, |x| f32::from_bits(u32::from(bf16::to_bits(*x)) << 16)),
        }
    }
}

/// Added to a small number, it leaves the nearest integer (ties to even) in the lowest bits.
const ROUNDS: f32 = (3 << 22) as f32;

#[inline(always)]
fn quantise<T>(x: &[T], to: &mut [u32], value: impl Fn(&T) -> f32) {
    let (codes, ends) = to.split_at_mut(scale_at(x.len().div_ceil(PER_QUAD), 0));
    codes.fill(0);
    ends.fill(0);
    let blocks = x.chunks(PER_BLOCK).zip(codes.chunks_mut(QUADS_PER_BLOCK));
    for ((x, codes), end) in blocks.zip(ends.as_chunks_mut::<PER_END>().0) {
        let mut values = [0.0; PER_BLOCK];
        for (to, x) in values.iter_mut().zip(x) {
            *to = value(x);
        }
        // Magnitudes are in order as integers, too, NaN above all.
        let bits = values.iter().fold(0, |max: u32, x| max.max(x.to_bits() & !(1 << 31)));
        let max = f32::from_bits(bits);
        let factor = 127.0 / max;
        let factor = if factor.is_finite() { factor } else { 0.0 };
        let mut bytes = [0; PER_BLOCK];
        let mut sum = 0;
        for (to, x) in bytes.iter_mut().zip(values) {
            let code = (x * factor + ROUNDS).to_bits() as i8;
            *to = code as u8;
            sum += i32::from(code);
        }
        for (to, quad) in codes.iter_mut().zip(bytes.as_chunks().0) {
            *to = u32::from_le_bytes(*quad);
        }
        *end = [(max / 127.0).to_bits(), (-128 * sum) as u32];
    }
}

/// The panels of a matrix, and behind them, for each panel and block, the scales of its outputs.
pub(super) fn packed(m: &Matrix<'_>, isa: Isa) -> Vec<QuadLanes> {
    let (panels, quads) = (m.rows.div_ceil(LANES), m.cols.div_ceil(PER_QUAD));
    let blocks = quads.div_ceil(QUADS_PER_BLOCK);
    let mut packed = vec![QuadLanes::zeroed(); panels * (quads + blocks)];
    let (codes, scales) = packed.split_at_mut(panels * quads);
    let (mut x, mut row) = (vec![0.0; m.cols], vec![0; row_len(quads)]);
    for output in 0..m.rows {
        let (panel, lane) = (output / LANES, output % LANES);
        m.row_to_f32(output, &mut x);
        isa.run(Quantise { x: RowsRef::F32(&x), to: &mut row });
        for (to, quad) in codes[panel * quads..].iter_mut().zip(&row[..quads]) {
            // Of a byte's code, that is 128 more.
            to.0[lane] = quad ^ 0x8080_8080;
        }
        let ends = row[scale_at(quads, 0)..].as_chunks::<PER_END>().0;
        for (to, [scale, _]) in scales[panel * blocks..][..blocks].iter_mut().zip(ends) {
            to.0[lane] = *scale;
        }
    }
    packed
}

/// Four values of k.
#[repr(C, align(64))]
#[derive(Clone, Copy, Default, Zeroable, Pod)]
pub(crate) struct QuadLanes(pub [u32; LANES]);

impl Weight for QuadLanes {
    /// Packed row by row, never alone.
    type Element = u8;
    type X = u32;
    type Open<S: Simd> = S::Quads;
    type Wide = Self;
    const PER_STEP: usize = PER_QUAD;
    const PARTS: usize = 1;
    const IS_WIDENED: bool = false;
    const IS_BF16: bool = false;
    const ROW_BLOCK_STEPS: Option<usize> = Some(QUADS_PER_BLOCK);

    fn x_len(steps: usize) -> usize {
        row_len(steps)
    }
    fn set(&mut self, _: usize, _: &[u8]) {
        unreachable!("a code needs its block's scale")
    }
    #[inline(always)]
    fn open<S: Simd>(&self, s: S, _: usize) -> S::Quads {
        s.quads(&self.0)
    }
    fn of_pairs<S: Simd>(_: S, _: S::Pairs, _: usize) -> S::Quads {
        unreachable!("only bf16 is tight")
    }
    #[inline(always)]
    fn step<S: Simd>(s: S, x: u32, w: S::Quads, acc: S::F) -> S::F {
        s.dot_quads(x, w, acc)
    }
    #[inline(always)]
    fn widen<S: Simd>(&self, _: S, to: &mut [Self]) {
        to[0] = *self;
    }
    fn take_wide() -> Vec<Self> {
        Vec::new()
    }
    fn give_back_wide(_: Vec<Self>) {}
}
