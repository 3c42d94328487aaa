//! A linear for each head: out[r, h, :] = Linear_h(x[r, h, :]), as the absorbed form of attention needs before and after it attends.

use crate::Numerics;
use crate::linear::{Form, Job, Linear, Place, RowsRef, To, with_rows};
use crate::pool::{Pool, Shared};
use crate::simd::Isa;

#[derive(Debug)]
pub struct PerHead {
    heads: Vec<Linear>,
    in_features: usize,
    out_features: usize,
    numerics: Numerics,
}

impl PerHead {
    /// `w` is [heads, out, in_]; never quantised.
    pub fn pack_f32(heads: usize, out: usize, in_: usize, w: &[f32], n: Numerics) -> Self {
        assert_eq!(w.len(), heads * out * in_, "weights of {heads} heads of [{out}, {in_}]");
        let n = n.unquantised();
        let head = |h: usize| Linear::pack_f32(out, in_, &w[h * out * in_..(h + 1) * out * in_], n);
        Self { heads: (0..heads).map(head).collect(), in_features: in_, out_features: out, numerics: n }
    }

    pub fn bytes(&self) -> usize {
        self.heads.iter().map(Linear::bytes).sum()
    }

    pub(crate) fn heads(&self) -> usize {
        self.heads.len()
    }

    pub(crate) fn head(&self, head: usize) -> &Linear {
        &self.heads[head]
    }

    pub(crate) fn out_features(&self) -> usize {
        self.out_features
    }

    pub(crate) fn isa(&self) -> Isa {
        self.numerics.kernels()
    }

    /// The form of its rows of x.
    pub(crate) fn form(&self) -> Form {
        self.heads.first().map_or(Form::Full, Linear::form)
    }

    /// x is [rows, heads, x_width], of which the first `in` values of each head are taken; y is [rows, heads, y_width], of
    /// which the first `out` values of each head are written.
    pub fn forward(&self, pool: &Pool, x: &[f32], x_width: usize, y: &mut [f32], y_width: usize) {
        let heads = self.heads.len();
        assert!(x_width >= self.in_features && y_width >= self.out_features, "heads are cut");
        let rows = y.len().checked_div(heads * y_width).unwrap_or(0);
        assert_eq!(x.len(), rows * heads * x_width, "x does not have as many rows as y");
        assert_eq!(y.len(), rows * heads * y_width, "y does not have whole rows");
        let form = self.form();
        // Each head's values are a row of their own.
        with_rows(pool, self.isa(), form, RowsRef::F32(x), x_width, |x| {
            let steps = if form == Form::Pairs { x_width.div_ceil(2) } else { x_width };
            let y = Shared::new(y);
            let run = |h: usize| {
                let linear = &self.heads[h];
                let place = Place { pick: None, stride: heads * steps, offset: h * steps };
                let to = To { y, stride: heads * y_width, offset: h * y_width };
                Job { x, place, linears: &[(linear, to)] }.run(0..rows, 0..linear.panels());
            };
            let work = rows * heads * self.in_features * self.out_features;
            pool.each(heads, work, run);
        });
    }
}

#[cfg(test)]
mod tests;
