//! The additions of rule 1(c): groups ascending, experts of a group ascending, f32.

/// The three elementwise operations of a combine, `y` and `x` of the same length. Given by the owner of the dispatcher
/// (`moesaic_kernels::{combine_first, combine_next, add}`), so that an attention worker's additions and an expert
/// worker's are the same code.
#[derive(Clone, Copy)]
pub struct CombineOps {
    /// y = w * x
    pub first: fn(y: &mut [f32], w: f32, x: &[f32]),
    /// y = fma(w, x, y)
    pub next: fn(y: &mut [f32], w: f32, x: &[f32]),
    /// y = y + x
    pub add: fn(y: &mut [f32], x: &[f32]),
}
