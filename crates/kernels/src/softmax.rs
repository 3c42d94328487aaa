//! softmax and log-softmax of one row of logits, in place.
//!
//! ```text
//! m = max x;  e = exp(x - m), sums as in the norm: 16 of them, then halves onto halves
//! softmax: e / sum        log-softmax: (x - m) - ln sum
//! ```

use crate::math::{exp, load_part, max_lanes, store_part, sum_lanes};
use crate::simd::{Isa, Kernel, LANES, Simd};

/// In place; the same bits on every machine.
pub fn softmax(x: &mut [f32]) {
    softmax_on(Isa::best(), x);
}

/// In place; the same bits on every machine.
pub fn log_softmax(x: &mut [f32]) {
    log_softmax_on(Isa::best(), x);
}

/// exp of each, in place; the same bits on every machine.
pub(crate) fn exponentials(x: &mut [f32]) {
    Isa::best().run(Exponentials { x, max: 0.0, keep: true });
}

pub(crate) fn softmax_on(isa: Isa, x: &mut [f32]) {
    let max = largest(isa, x);
    let sum = isa.run(Exponentials { x, max, keep: true });
    isa.run(Divide { x, by: sum });
}

pub(crate) fn log_softmax_on(isa: Isa, x: &mut [f32]) {
    let max = largest(isa, x);
    let log_sum = ln(isa.run(Exponentials { x, max, keep: false }));
    for x in x {
        *x = (*x - max) - log_sum;
    }
}

/// NaN is passed over.
pub(crate) fn largest(isa: Isa, x: &[f32]) -> f32 {
    isa.run(Largest(x))
}

struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut max = s.splat(f32::NEG_INFINITY);
        for x in self.0.chunks(LANES) {
            max = s.max(load_part(s, x, f32::NEG_INFINITY), max);
        }
        max_lanes(s, max)
    }
}

/// The sum of exp(x - max), and x replaced by them if `keep`.
struct Exponentials<'a> {
    x: &'a mut [f32],
    max: f32,
    keep: bool,
}

impl Kernel for Exponentials<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let max = s.splat(self.max);
        let mut sum = s.splat(0.0);
        for x in self.x.chunks_mut(LANES) {
            let e = exp(s, s.sub(load_part(s, x, f32::NEG_INFINITY), max));
            sum = s.add(sum, e);
            if self.keep {
                store_part(s, e, x);
            }
        }
        sum_lanes(s, sum)
    }
}

struct Divide<'a> {
    x: &'a mut [f32],
    by: f32,
}

impl Kernel for Divide<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for x in self.x {
            *x /= self.by;
        }
    }
}

/// The natural logarithm of a positive normal number, by our own arithmetic: system libraries differ in last bits.
///
/// x = 2^k m with m in [0.7, 1.4]; ln m = 2 artanh(t) with t = (m - 1) / (m + 1), |t| < 0.172, as a series to t^19.
pub(crate) fn ln(x: f32) -> f32 {
    if !(f32::MIN_POSITIVE..f32::INFINITY).contains(&x) {
        // A sum that no sane logits have: 0, infinity or NaN.
        return if x == f32::INFINITY { x } else { f32::NAN };
    }
    let bits = f64::from(x).to_bits();
    let (mut k, mut m) = ((bits >> 52) as i64 - 1023, f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        (k, m) = (k + 1, m / 2.0);
    }
    let t = (m - 1.0) / (m + 1.0);
    let mut series = 0.0;
    for power in (0..10).rev() {
        series = series * (t * t) + 1.0 / f64::from(2 * power + 1);
    }
    (k as f64 * std::f64::consts::LN_2 + 2.0 * t * series) as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reference;
    use crate::samples::{Samples, assert_bits};

    #[test]
    fn logarithm_is_rounded_right() {
        let mut x = 1e-30f32;
        while x < 1e30 {
            assert_eq!(ln(x), f64::from(x).ln() as f32, "ln {x}");
            x *= 1.0137;
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn agrees_with_f64() {
        let logits: Vec<f32> = (0..1003).map(|i| ((i * 7919) % 1003) as f32 * 0.02 - 8.0).collect();
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        let (mut p, mut log_p) = (logits.clone(), logits.clone());
        softmax(&mut p);
        log_softmax(&mut log_p);
        for ((p, log_p), x) in p.iter().zip(&log_p).zip(&logits) {
            let expect = f64::from(*x) - sum.ln();
            assert!((f64::from(*log_p) - expect).abs() < 3e-6, "{log_p} {expect}");
            assert!((f64::from(*p) / expect.exp() - 1.0).abs() < 3e-6);
        }
    }

    proptest! {
        #[test]
        fn equals_the_plain_loop(len in 0..200usize, magnitude in prop_oneof![Just(5.0f32), Just(300.0), Just(3e38)], seed in any::<u64>()) {
            let mut s = Samples::new(seed);
            let mut x = s.values(len, magnitude);
            // Masked logits, as the sampler makes them.
            x.iter_mut().for_each(|x| *x = if s.below(10) == 0 { f32::NEG_INFINITY } else { *x });
            for isa in Isa::available() {
                let (mut p, mut log_p) = (x.clone(), x.clone());
                softmax_on(isa, &mut p);
                log_softmax_on(isa, &mut log_p);
                assert_bits(&p, &reference::softmax(&x), format_args!("{isa:?}, {x:?}"));
                assert_bits(&log_p, &reference::log_softmax(&x), format_args!("{isa:?}, {x:?}"));
            }
        }
    }

    #[test]
    fn special_rows() {
        const MINUS: f32 = f32::NEG_INFINITY;
        let cases: [([f32; 3], [f32; 3]); 5] = [
            ([7.0, MINUS, MINUS], [1.0, 0.0, 0.0]),
            ([3e38, -3e38, 3e38], [0.5, 0.0, 0.5]),
            ([MINUS; 3], [f32::NAN; 3]),
            ([0.0, f32::NAN, 1.0], [f32::NAN; 3]),
            ([0.0, f32::INFINITY, 1.0], [f32::NAN; 3]),
        ];
        for (x, expected) in cases {
            for isa in Isa::available() {
                let mut p = x;
                softmax_on(isa, &mut p);
                assert_bits(&p, &expected, format_args!("{isa:?}, {x:?}"));
            }
        }
    }
}
