//! exp and what is made of it, lane by lane, with the same bits everywhere.
//!
//! ```text
//! n = round(x / ln 2);  r = x - n ln 2, with ln 2 in two parts;  exp(x) = 2^n * (1 + r + r²/2! + ... + r^7/7!)
//! ```
//! |r| <= 0.35, so what is left out is below 6e-9 of the result. Below -86.6 the result is 0, above 88.73 infinite; NaN stays NaN.

use crate::simd::{LANES, Simd};

pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 with its last bits zero, so that n * LN2_HIGH is exact; and the rest.
#[allow(clippy::excessive_precision, reason = "the value is exact")]
pub(crate) const LN2_HIGH: f32 = 0.693_359_375;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
/// 1 / k! from 7 down to 0.
pub(crate) const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
/// Below: 0. (Down to here the power of two is a normal number, halved too.)
pub(crate) const EXP_ZERO_BELOW: f32 = -86.6;
/// Arguments are brought into this range first; the upper end is infinite already.
pub(crate) const EXP_RANGE: [f32; 2] = [-87.0, 89.0];

#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let inside = s.min(s.splat(EXP_RANGE[1]), s.max(s.splat(EXP_RANGE[0]), x));
    let n = s.round(s.mul(inside, s.splat(LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HIGH), inside);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(TAYLOR[0]);
    for c in &TAYLOR[1..] {
        p = s.fma(p, r, s.splat(*c));
    }
    // Doubled and then scaled by 2^(n-1), because 2^128 is not a number.
    let e = s.scale(s.add(p, p), s.sub(n, s.splat(1.0)));
    s.zero_below(x, s.splat(EXP_ZERO_BELOW), e)
}

/// 1 / (1 + exp(-x))
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    s.div(s.splat(1.0), s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

/// x / (1 + exp(-x))
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

/// Up to 16 values; the missing lanes are `fill`.
#[inline(always)]
pub(crate) fn load_part<S: Simd>(s: S, x: &[f32], fill: f32) -> S::F {
    if let Ok(x) = x.try_into() {
        return s.load(x);
    }
    let mut lanes = [fill; LANES];
    lanes[..x.len()].copy_from_slice(x);
    s.load(&lanes)
}

/// The first `to.len()` (up to 16) lanes.
#[inline(always)]
pub(crate) fn store_part<S: Simd>(s: S, v: S::F, to: &mut [f32]) {
    if let Ok(to) = <&mut [f32; LANES]>::try_from(&mut *to) {
        return s.store(v, to);
    }
    let mut lanes = [0.0; LANES];
    s.store(v, &mut lanes);
    to.copy_from_slice(&lanes[..to.len()]);
}

/// The one order in which lanes are added up: halves onto halves.
#[inline(always)]
pub(crate) fn sum_lanes<S: Simd>(s: S, v: S::F) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(v, &mut lanes);
    sum_16(lanes)
}

#[inline(always)]
pub(crate) fn sum_16(lanes: [f32; LANES]) -> f32 {
    fold_16(lanes, |a, b| a + b)
}

/// The largest lane, by `Simd::max`.
#[inline(always)]
pub(crate) fn max_lanes<S: Simd>(s: S, v: S::F) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(v, &mut lanes);
    fold_16(lanes, |a, b| if a > b { a } else { b })
}

/// Halves onto halves.
#[inline(always)]
fn fold_16(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests;
