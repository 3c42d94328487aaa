//! A linear for each head against the plain loop.

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::{Samples, any_magnitude, assert_bits, on_all_numerics, pools};
use crate::{Dtype, Matrix, MatrixData};

/// Dimensions of a call.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    heads: usize,
    out: usize,
    in_: usize,
    /// Values of a head behind those that are taken, and behind those that are written.
    x_rest: usize,
    y_rest: usize,
}

fn expected(shape: Shape, w: &[f32], n: Numerics, x: &[f32]) -> Vec<f32> {
    let Shape { heads, out, in_, x_rest, y_rest, .. } = shape;
    let head = |(i, x): (usize, &[f32])| {
        let w = bytemuck::cast_slice(&w[i % heads * out * in_..][..out * in_]);
        let mut y = reference::linear(&Matrix { rows: out, cols: in_, data: MatrixData::F32(w) }, n, &x[..in_]);
        y.extend(vec![f32::NAN; y_rest]);
        y
    };
    x.chunks_exact(in_ + x_rest).enumerate().flat_map(head).collect()
}

fn check(shape: Shape, magnitude: f32, seed: u64) {
    let Shape { rows, heads, out, in_, x_rest, y_rest } = shape;
    let (x_width, y_width) = (in_ + x_rest, out + y_rest);
    let mut s = Samples::new(seed);
    let (w, x) = (s.values(heads * out * in_, magnitude), s.values(rows * heads * x_width, magnitude));
    on_all_numerics(
        |n| expected(shape, &w, n.unquantised(), &x),
        |n, expected| {
            let linears = PerHead::pack_f32(heads, out, in_, &w, n);
            for pool in pools() {
                let mut y = vec![f32::NAN; rows * heads * y_width];
                linears.forward(pool, &x, x_width, &mut y, y_width);
                assert_bits(&y, expected, format_args!("{n:?}, {} threads", pool.threads()));
            }
            for (x, expected) in x.chunks_exact(heads * x_width).zip(expected.chunks_exact(heads * y_width)) {
                let mut y = vec![f32::NAN; heads * y_width];
                linears.forward(&pools()[0], x, x_width, &mut y, y_width);
                assert_bits(&y, expected, format_args!("{n:?}, a row alone"));
            }
        },
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn equals_the_plain_loop(
        (rows, heads, out, in_) in (0..14usize, 1..8usize, 1..40usize, 1..40usize),
        (x_rest, y_rest) in (0..20usize, 0..20usize),
        magnitude in any_magnitude(),
        seed in any::<u64>(),
    ) {
        // An odd head's last pair takes in what lies behind it, times zero: equal but for the sign of a zero.
        let x_rest = if in_ % 2 == 0 { x_rest } else { 0 };
        check(Shape { rows, heads, out, in_, x_rest, y_rest }, magnitude, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn equals_the_plain_loop_on_threads(
        (heads, out, in_) in (2..20usize, 20..100usize, 20..100usize),
        seed in any::<u64>(),
    ) {
        let rows = (1usize << 20).div_ceil(heads * out * in_);
        prop_assert!(!pools()[1].is_inline(rows * heads * out * in_));
        check(Shape { rows, heads, out, in_, x_rest: 0, y_rest: 3 }, 1.0, seed);
    }
}

#[test]
fn says_its_bytes() {
    let n = Numerics::portable(Dtype::F32);
    // Each head fills two panels of 16 outputs.
    assert_eq!(PerHead::pack_f32(3, 17, 5, &[0.0; 255], n).bytes(), 3 * 2 * 16 * 5 * size_of::<f32>());
}

#[test]
#[should_panic(expected = "weights of 3 heads of [17, 5]")]
fn weights_have_to_be_there() {
    PerHead::pack_f32(3, 17, 5, &[0.0; 254], Numerics::portable(Dtype::F32));
}
