//! RMS norm.
//!
//! ```text
//! sum = the squares of a row in 16 sums (value i into sum i % 16, ascending, by fma), added up halves onto halves
//! y   = (x * (1 / sqrt(sum / n + eps))) * weight
//! ```

use crate::math::{load_part, store_part, sum_lanes};
use crate::simd::{Isa, Kernel, LANES, Simd};

/// For each row of `weight.len()` values.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    rms_norm_on(Isa::best(), x, weight, eps, y);
}

pub(crate) fn rms_norm_on(isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "x and y are not of one length");
    let width = weight.len().max(1);
    assert_eq!(x.len() % width, 0, "x does not have whole rows");
    for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
        isa.run(Row { x, weight, eps, y });
    }
}

struct Row<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut squares = s.splat(0.0);
        for x in self.x.chunks(LANES) {
            let x = load_part(s, x, 0.0);
            squares = s.fma(x, x, squares);
        }
        let mean = sum_lanes(s, squares) / self.x.len() as f32;
        let factor = s.splat(1.0 / (mean + self.eps).sqrt());
        let rows = self.x.chunks(LANES).zip(self.weight.chunks(LANES)).zip(self.y.chunks_mut(LANES));
        for ((x, w), y) in rows {
            store_part(s, s.mul(s.mul(load_part(s, x, 0.0), factor), load_part(s, w, 0.0)), y);
        }
    }
}

#[cfg(test)]
mod tests;
