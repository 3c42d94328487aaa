use crate::{Matrix, Numerics, Pool, bf16};
/// Activations, row-major.
#[derive(Clone, Copy, Debug)]
pub enum RowsRef<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}
impl RowsRef<'_> {
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
}
/// Packed weights of y = x Wᵀ.
#[derive(Debug)]
pub struct Linear {
    in_features: usize,
    out_features: usize,
}
impl Linear {
    pub fn pack(m: &Matrix<'_>, _n: Numerics) -> Self {
        Self { in_features: m.cols, out_features: m.rows }
    }
    /// `w` is row-major [rows = out, cols = in].
    pub fn pack_f32(rows: usize, cols: usize, _w: &[f32], _n: Numerics) -> Self {
        Self { in_features: cols, out_features: rows }
    }
    pub fn in_features(&self) -> usize {
        self.in_features
    }
    pub fn out_features(&self) -> usize {
        self.out_features
    }
    pub fn bytes(&self) -> usize {
        0
    }
    /// y [rows, out], rows = x.len() / in
    pub fn forward(&self, _pool: &Pool, _x: RowsRef<'_>, _y: &mut [f32]) {
        unimplemented!()
    }
}
