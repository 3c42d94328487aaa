use std::borrow::Cow;
/// A row-major matrix [rows, cols] as a checkpoint stores it, borrowed.
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
    /// `scales` is [ceil(rows / block[0]), ceil(cols / block[1])]; a weight is `q * scale`.
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
    pub fn row_to_f32(&self, _row: usize, _out: &mut [f32]) {
        unimplemented!()
    }
    /// Rows `rows` as a matrix of their own. For FP8 `rows.start` must be a multiple of block[0].
    pub fn rows_slice(&self, _rows: std::ops::Range<usize>) -> Matrix<'_> {
        unimplemented!()
    }
}
