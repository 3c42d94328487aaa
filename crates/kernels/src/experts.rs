use crate::{Linear, Matrix, Numerics, Pool, RowsRef};
/// y = down(silu(gate x) * up x)
#[derive(Debug)]
pub struct Ffn {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}
impl Ffn {
    pub fn pack(gate: &Matrix<'_>, up: &Matrix<'_>, down: &Matrix<'_>, n: Numerics) -> Self {
        Self { gate: Linear::pack(gate, n), up: Linear::pack(up, n), down: Linear::pack(down, n) }
    }
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
    pub fn forward(&self, _pool: &Pool, _x: RowsRef<'_>, _y: &mut [f32]) {
        unimplemented!()
    }
}
/// One call for a layer: group i runs its expert on rows `groups[i].1` of x; y has one row for each (i, j), in that order.
pub fn grouped_experts(_pool: &Pool, _groups: &[(&Ffn, &[u32])], _x: RowsRef<'_>, _y: &mut [f32]) {
    unimplemented!()
}
