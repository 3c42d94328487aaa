//! Activation rows in the form that a linear's kernel wants: f32 as they are, f32 rounded to bf16, pairs of bf16, or quads of INT8.

use std::cell::Cell;

use half::bf16;

use super::quads::{PER_QUAD, Quantise, row_len};
use crate::pool::{Pool, Shared};
use crate::simd::{Isa, Kernel, Simd};

/// Activations, row-major.
#[derive(Clone, Copy, Debug)]
pub enum RowsRef<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> RowsRef<'a> {
    /// Number of values (rows * columns).
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn part(&self, range: std::ops::Range<usize>) -> RowsRef<'a> {
        match self {
            Self::F32(x) => RowsRef::F32(&x[range]),
            Self::Bf16(x) => RowsRef::Bf16(&x[range]),
        }
    }
}

/// What a kernel reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    Full,
    Rounded,
    Pairs,
    /// As [`super::quads`] lays a row out.
    Quads,
}

/// Rows in a form.
#[derive(Clone, Copy)]
pub(crate) enum Ready<'a> {
    F32(&'a [f32]),
    Pairs(&'a [u32]),
    Quads(&'a [u32]),
}

/// Elements to convert that cost about as much as one multiply-add of a linear.
const CONVERT_COST: usize = 8;

/// Calls `then` with the rows of `x` (`cols` values each) in `form`, converted into a scratch of this thread where they have to be.
pub(crate) fn with_rows<R>(
    pool: &Pool,
    isa: Isa,
    form: Form,
    x: RowsRef<'_>,
    cols: usize,
    then: impl FnOnce(Ready<'_>) -> R,
) -> R {
    let rows = x.len().checked_div(cols).unwrap_or(0);
    match (form, x) {
        (Form::Full, RowsRef::F32(x)) => then(Ready::F32(x)),
        (Form::Full | Form::Rounded, _) => with_scratch(&F32_SCRATCH, x.len(), |to: &mut [f32]| {
            convert(pool, x, cols, to, cols, |x, to| isa.run(Widen { x, to }));
            then(Ready::F32(to))
        }),
        (Form::Pairs, _) => {
            let steps = cols.div_ceil(2);
            with_scratch(&WORD_SCRATCH, rows * steps, |to: &mut [u32]| {
                convert(pool, x, cols, to, steps, |x, to| isa.run(Pair { x, to }));
                then(Ready::Pairs(to))
            })
        }
        (Form::Quads, _) => {
            let len = row_len(cols.div_ceil(PER_QUAD));
            with_scratch(&WORD_SCRATCH, rows * len, |to: &mut [u32]| {
                convert(pool, x, cols, to, len, |x, to| isa.run(Quantise { x, to }));
                then(Ready::Quads(to))
            })
        }
    }
}

/// Row by row, on several threads if there is much.
fn convert<T: Send>(
    pool: &Pool,
    x: RowsRef<'_>,
    cols: usize,
    to: &mut [T],
    stride: usize,
    row: impl Fn(RowsRef<'_>, &mut [T]) + Sync,
) {
    let rows = x.len().checked_div(cols).unwrap_or(0);
    let to = Shared::new(to);
    pool.each(rows, x.len() / CONVERT_COST, |r| {
        // SAFETY: each task has a row of its own.
        row(x.part(r * cols..(r + 1) * cols), unsafe { to.part(r * stride, stride) });
    });
}

thread_local! {
    static F32_SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static WORD_SCRATCH: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Lends `len` values of a thread's scratch, of any content. Taken out of its cell meanwhile: a nested call just finds none and makes its own.
pub(crate) fn with_scratch<T: Copy + Default, R>(
    scratch: &'static std::thread::LocalKey<Cell<Vec<T>>>,
    len: usize,
    then: impl FnOnce(&mut [T]) -> R,
) -> R {
    let mut values = scratch.take();
    if values.len() < len {
        values.resize(len, T::default());
    }
    let result = then(&mut values[..len]);
    scratch.set(values);
    result
}

/// To nearest, ties to even; a NaN stays one.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
    if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

/// f32 rounded to bf16 and widened again, or bf16 widened.
struct Widen<'a> {
    x: RowsRef<'a>,
    to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.x {
            RowsRef::F32(x) => {
                for (to, x) in self.to.iter_mut().zip(x) {
                    *to = f32::from_bits(bf16_bits(*x) << 16);
                }
            }
            RowsRef::Bf16(x) => {
                for (to, x) in self.to.iter_mut().zip(x) {
                    *to = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }
        }
    }
}

/// One row to pairs, the lower k in the upper half; an odd row ends with a zero.
struct Pair<'a> {
    x: RowsRef<'a>,
    to: &'a mut [u32],
}

impl Kernel for Pair<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.x {
            RowsRef::F32(x) => pair(x, self.to, |x| bf16_bits(*x)),
            RowsRef::Bf16(x) => pair(x, self.to, |x| u32::from(x.to_bits())),
        }
    }
}

#[inline(always)]
pub(crate) fn pair<T>(x: &[T], to: &mut [u32], bits: impl Fn(&T) -> u32) {
    let (whole, rest) = x.as_chunks::<2>();
    for (to, [high, low]) in to.iter_mut().zip(whole) {
        *to = bits(high) << 16 | bits(low);
    }
    if let ([x], Some(to)) = (rest, to.last_mut()) {
        *to = bits(x) << 16;
    }
}
