//! A matrix as a checkpoint stores it: bytes with a meaning, borrowed from wherever the file is mapped.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};

use crate::e4m3_to_f32;

/// A row-major matrix [rows, cols].
#[derive(Clone, Debug)]
pub struct Matrix<'a> {
    pub rows: usize,
    pub cols: usize,
    pub data: MatrixData<'a>,
}

/// Little-endian bytes at any alignment.
#[derive(Clone, Debug)]
pub enum MatrixData<'a> {
    F32(&'a [u8]),
    F16(&'a [u8]),
    Bf16(&'a [u8]),
    /// e4m3 codes; a weight is `code * scale`. `scales` is [ceil(rows / block[0]), ceil(cols / block[1])].
    Fp8 {
        q: &'a [u8],
        scales: Cow<'a, [f32]>,
        block: [usize; 2],
    },
}

impl<'a> Matrix<'a> {
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.row_to_f32(row, out);
        }
        out
    }

    /// `out` has `cols` values.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix with {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "out is not one row");
        let range = |size: usize| row * self.cols * size..(row + 1) * self.cols * size;
        match &self.data {
            MatrixData::F32(b) => read(&b[range(4)], out, f32::from_le_bytes),
            MatrixData::F16(b) => read(&b[range(2)], out, |b| f16::from_le_bytes(b).to_f32()),
            MatrixData::Bf16(b) => read(&b[range(2)], out, |b| bf16::from_le_bytes(b).to_f32()),
            MatrixData::Fp8 { q, scales, block } => {
                let scales = &scales[row / block[0] * self.cols.div_ceil(block[1])..];
                let blocks = q[range(1)].chunks(block[1]).zip(out.chunks_mut(block[1]));
                for ((q, out), scale) in blocks.zip(scales) {
                    read(q, out, |[q]: [u8; 1]| e4m3_to_f32(q) * scale);
                }
            }
        }
    }

    /// Rows `rows` as a matrix of their own. For FP8, `rows.start` must be a multiple of block[0].
    pub fn rows_slice(&self, rows: Range<usize>) -> Matrix<'_> {
        assert!(rows.end <= self.rows, "rows {rows:?} of a matrix with {} rows", self.rows);
        let range = |size: usize| rows.start * self.cols * size..rows.end * self.cols * size;
        let data = match &self.data {
            MatrixData::F32(b) => MatrixData::F32(&b[range(4)]),
            MatrixData::F16(b) => MatrixData::F16(&b[range(2)]),
            MatrixData::Bf16(b) => MatrixData::Bf16(&b[range(2)]),
            MatrixData::Fp8 { q, scales, block } => {
                assert_eq!(rows.start % block[0], 0, "an FP8 matrix is cut between its blocks");
                let across = self.cols.div_ceil(block[1]);
                let blocks = rows.start / block[0] * across..rows.end.div_ceil(block[0]) * across;
                MatrixData::Fp8 { q: &q[range(1)], scales: Cow::Borrowed(&scales[blocks]), block: *block }
            }
        };
        Matrix { rows: rows.len(), cols: self.cols, data }
    }

    /// Panics unless the data has the size that the shape says.
    pub(crate) fn check(&self) {
        let (values, size) = match &self.data {
            MatrixData::F32(b) => (b.len(), 4),
            MatrixData::F16(b) | MatrixData::Bf16(b) => (b.len(), 2),
            MatrixData::Fp8 { q, scales, block } => {
                assert!(block[0] > 0 && block[1] > 0, "a block of {block:?}");
                let blocks = self.rows.div_ceil(block[0]) * self.cols.div_ceil(block[1]);
                assert_eq!(
                    scales.len(),
                    blocks,
                    "scales of a [{}, {}] matrix in blocks of {block:?}",
                    self.rows,
                    self.cols
                );
                (q.len(), 1)
            }
        };
        assert_eq!(values, self.rows * self.cols * size, "bytes of a [{}, {}] matrix", self.rows, self.cols);
    }
}

fn read<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (values, _) = bytes.as_chunks::<N>();
    for (out, b) in out.iter_mut().zip(values) {
        *out = value(*b);
    }
}

#[cfg(test)]
mod tests;
