//! Matrices as they are stored: reading them, cutting them, and refusing data of another size.

use proptest::prelude::*;

use super::*;
use crate::samples::{Samples, Stored, any_stored, assert_bits};
use crate::{Dtype, Linear, Numerics};

/// Value by value, from the format's definition.
fn value(m: &Matrix<'_>, row: usize, col: usize) -> f32 {
    let i = row * m.cols + col;
    match &m.data {
        MatrixData::F32(b) => f32::from_le_bytes(b[4 * i..][..4].try_into().unwrap()),
        MatrixData::F16(b) => f16::from_le_bytes(b[2 * i..][..2].try_into().unwrap()).to_f32(),
        MatrixData::Bf16(b) => bf16::from_le_bytes(b[2 * i..][..2].try_into().unwrap()).to_f32(),
        MatrixData::Fp8 { q, scales, block } => {
            let scale = scales[row / block[0] * m.cols.div_ceil(block[1]) + col / block[1]];
            e4m3_to_f32(q[i]) * scale
        }
    }
}

proptest! {
    #[test]
    fn reads_every_value(stored in any_stored(), rows in 0..50usize, cols in 0..50usize, seed in any::<u64>()) {
        let m = Samples::new(seed).matrix(rows, cols, stored, 1.0);
        let m = m.matrix();
        m.check();
        let expected: Vec<f32> = (0..rows * cols).map(|i| value(&m, i / cols, i % cols)).collect();
        assert_bits(&m.to_f32(), &expected, format_args!("the whole"));
    }

    #[test]
    fn a_slice_has_its_rows(
        stored in any_stored(),
        (rows, cols) in (1..300usize, 1..20usize),
        (a, b) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        seed in any::<u64>(),
    ) {
        let height = if let Stored::Fp8(block) = stored { block[0] } else { 1 };
        let (a, b) = (a.index(rows + 1), b.index(rows + 1));
        let range = a.min(b) / height * height..a.max(b);
        let m = Samples::new(seed).matrix(rows, cols, stored, 1.0);
        let m = m.matrix();
        let slice = m.rows_slice(range.clone());
        slice.check();
        prop_assert_eq!((slice.rows, slice.cols), (range.len(), cols));
        assert_bits(&slice.to_f32(), &m.to_f32()[range.start * cols..range.end * cols], format_args!("{range:?}"));
    }
}

#[test]
#[should_panic(expected = "an FP8 matrix is cut between its blocks")]
fn a_block_is_not_cut() {
    Samples::new(0).matrix(8, 4, Stored::Fp8([4, 4]), 1.0).matrix().rows_slice(2..8);
}

fn pack(rows: usize, cols: usize, data: MatrixData<'_>) {
    Linear::pack(&Matrix { rows, cols, data }, Numerics::portable(Dtype::F32));
}

#[test]
#[should_panic(expected = "bytes of a [2, 3] matrix")]
fn bytes_have_to_be_there() {
    pack(2, 3, MatrixData::Bf16(&[0; 11]));
}

#[test]
#[should_panic(expected = "scales of a [3, 3] matrix in blocks of [2, 2]")]
fn scales_have_to_be_there() {
    pack(3, 3, MatrixData::Fp8 { q: &[0; 9], scales: Cow::Borrowed(&[1.0; 3]), block: [2, 2] });
}
