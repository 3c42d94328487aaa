//! Sums of vectors: the residual, and the weighted results of experts. One operation for each value, so plain loops are the whole of it.

use crate::simd::{Isa, Kernel, Simd};

/// y = y + x
pub fn add(y: &mut [f32], x: &[f32]) {
    Isa::best().run(Update { y, x, with: |y, x| y + x });
}

/// y = w * x
pub fn combine_first(y: &mut [f32], w: f32, x: &[f32]) {
    Isa::best().run(Update { y, x, with: |_, x| w * x });
}

/// y = fma(w, x, y)
pub fn combine_next(y: &mut [f32], w: f32, x: &[f32]) {
    Isa::best().run(Update { y, x, with: |y, x| w.mul_add(x, y) });
}

struct Update<'a, F> {
    y: &'a mut [f32],
    x: &'a [f32],
    with: F,
}

impl<F: Fn(f32, f32) -> f32> Kernel for Update<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        assert_eq!(self.y.len(), self.x.len(), "y and x are not of one length");
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = (self.with)(*y, *x);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::samples::{Samples, assert_bits};

    #[test]
    fn sums_round_once() {
        let x: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 * 1e-7).collect();
        let mut y = vec![f32::NAN; 37];
        combine_first(&mut y, 0.3, &x);
        combine_next(&mut y, -0.3, &x);
        add(&mut y, &x);
        for (y, x) in y.iter().zip(&x) {
            assert_eq!(y.to_bits(), ((-0.3f32).mul_add(*x, 0.3 * x) + x).to_bits());
        }
    }

    proptest! {
        #[test]
        fn equal_the_plain_loop_everywhere(len in 0..100usize, w in -3.0f32..3.0, seed in any::<u64>()) {
            let mut s = Samples::new(seed);
            let (y, x) = (s.values(len, 1.0), s.values(len, 1.0));
            let plain = |f: fn(f32, f32, f32) -> f32| -> Vec<f32> { y.iter().zip(&x).map(|(y, x)| f(*y, w, *x)).collect() };
            let (sums, firsts, nexts) = (plain(|y, _, x| y + x), plain(|_, w, x| w * x), plain(|y, w, x| w.mul_add(x, y)));
            for isa in Isa::available() {
                let (mut sum, mut first, mut next) = (y.clone(), y.clone(), y.clone());
                isa.run(Update { y: &mut sum, x: &x, with: |y, x| y + x });
                isa.run(Update { y: &mut first, x: &x, with: |_, x| w * x });
                isa.run(Update { y: &mut next, x: &x, with: |y, x| w.mul_add(x, y) });
                for (got, expected) in [(&sum, &sums), (&first, &firsts), (&next, &nexts)] {
                    assert_bits(got, expected, format_args!("{isa:?}"));
                }
            }
            let mut sum = y.clone();
            add(&mut sum, &x);
            assert_bits(&sum, &sums, format_args!("by default"));
        }
    }

    #[test]
    #[should_panic(expected = "y and x are not of one length")]
    fn lengths_have_to_be_equal() {
        add(&mut [0.0; 3], &[0.0; 4]);
    }
}
