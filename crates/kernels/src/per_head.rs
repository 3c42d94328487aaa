use crate::{Numerics, Pool};
/// out[r, h, :] = Linear_h(x[r, h, :])
#[derive(Debug)]
pub struct PerHead {}
impl PerHead {
    /// `w` is [heads, out, in_].
    pub fn pack_f32(_heads: usize, _out: usize, _in_: usize, _w: &[f32], _n: Numerics) -> Self {
        Self {}
    }
    pub fn bytes(&self) -> usize {
        unimplemented!()
    }
    /// x [rows, heads, in], y [rows, heads, out]
    pub fn forward(&self, _pool: &Pool, _x: &[f32], _y: &mut [f32]) {
        unimplemented!()
    }
}
