//! Rotary embedding, with YaRN.
//!
//! ```text
//! base_i  = theta^(-2i/d), i < d/2
//! YaRN:   dim(n) = d ln(L / 2πn) / (2 ln theta);  low = floor(dim(beta_fast)), high = ceil(dim(beta_slow)), both within 0..d
//!         keep_i = 1 - clamp((i - low) / (high - low), 0, 1);  freq_i = base_i / factor * (1 - keep_i) + base_i * keep_i
//!         cos and sin are multiplied by mscale(mscale) / mscale(mscale_all_dim), mscale(m) = 0.1 m ln(factor) + 1 (1 if factor <= 1)
//! (a, b) = (x[2i], x[2i+1])  ->  (fma(a, cos, b * -sin), fma(b, cos, a * sin))      angle = position * freq_i
//! ```
//! Angles and their cosines are computed in f64 and rounded once.

use std::f64::consts::PI;

use crate::simd::{Isa, Kernel, LANES, Lanes, Simd};

/// Rotary embedding of `dim` values (even); `yarn` is the config's rope_scaling.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RopeParams {
    pub dim: usize,
    pub theta: f64,
    pub yarn: Option<Yarn>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Yarn {
    pub factor: f64,
    pub original_positions: usize,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub mscale: f64,
    pub mscale_all_dim: f64,
}

/// Cosines and sines of every position.
#[derive(Clone, Debug)]
pub struct RopeTable {
    dim: usize,
    /// [positions, dim / 2]: (cos, sin)
    turns: Vec<[f32; 2]>,
}

impl RopeTable {
    /// Panics if `dim` is odd.
    pub fn new(p: &RopeParams, positions: usize) -> Self {
        assert!(p.dim.is_multiple_of(2), "rope over {} values, an odd number", p.dim);
        let (frequencies, magnitude) = (frequencies(p), magnitude(p));
        let mut turns = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            turns.extend(frequencies.iter().map(|f| {
                let (sin, cos) = (position as f64 * f).sin_cos();
                [(cos * magnitude) as f32, (sin * magnitude) as f32]
            }));
        }
        Self { dim: p.dim, turns }
    }

    /// [positions, dim / 2]: (cos, sin)
    pub fn turns(&self) -> &[[f32; 2]] {
        &self.turns
    }

    pub fn positions(&self) -> usize {
        self.turns.len().checked_div(self.dim / 2).unwrap_or(0)
    }

    /// Rotates the interleaved pairs (2i, 2i+1) of any number of consecutive heads of `dim`, in place.
    pub fn apply(&self, position: usize, x: &mut [f32]) {
        self.apply_on(Isa::best(), position, x);
    }

    pub(crate) fn apply_on(&self, isa: Isa, position: usize, x: &mut [f32]) {
        assert!(position < self.positions(), "position {position} of {}", self.positions());
        let pairs = self.dim / 2;
        isa.run(Rotate { turns: &self.turns[position * pairs..][..pairs], x });
    }
}

/// head_dim^-0.5, under YaRN times mscale(mscale_all_dim)².
pub fn softmax_scale(head_dim: usize, p: &RopeParams) -> f32 {
    let mscale = p.yarn.map_or(1.0, |y| mscale(y.factor, y.mscale_all_dim));
    ((head_dim as f64).powf(-0.5) * mscale * mscale) as f32
}

fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

/// What cos and sin are multiplied by.
fn magnitude(p: &RopeParams) -> f64 {
    p.yarn.map_or(1.0, |y| mscale(y.factor, y.mscale) / mscale(y.factor, y.mscale_all_dim))
}

fn frequencies(p: &RopeParams) -> Vec<f64> {
    let d = p.dim as f64;
    let base = (0..p.dim / 2).map(|i| p.theta.powf(-2.0 * i as f64 / d));
    let Some(y) = p.yarn else { return base.collect() };
    let dim = |turns: f64| d * (y.original_positions as f64 / (turns * 2.0 * PI)).ln() / (2.0 * p.theta.ln());
    let low = dim(y.beta_fast).floor().max(0.0);
    let high = dim(y.beta_slow).ceil().min(d - 1.0);
    let width = if high == low { 0.001 } else { high - low };
    let keep = |i: usize| 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0);
    base.enumerate().map(|(i, f)| f / y.factor * (1.0 - keep(i)) + f * keep(i)).collect()
}

struct Rotate<'a> {
    turns: &'a [[f32; 2]],
    x: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Out = ();

    /// Eight pairs at a time over all heads; what is left of a head goes one by one.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let dim = 2 * self.turns.len();
        let (eights, rest) = self.turns.as_chunks::<{ LANES / 2 }>();
        for (block, turns) in eights.iter().enumerate() {
            let (mut cos, mut sin) = (Lanes::default(), Lanes::default());
            for (pair, [c, si]) in turns.iter().enumerate() {
                cos.0[2 * pair..2 * pair + 2].copy_from_slice(&[*c, *c]);
                sin.0[2 * pair..2 * pair + 2].copy_from_slice(&[-si, *si]);
            }
            let (cos, sin) = (s.load(&cos.0), s.load(&sin.0));
            for head in self.x.chunks_exact_mut(dim) {
                if let Some(x) = head[block * LANES..].first_chunk_mut() {
                    let v = s.load(x);
                    s.store(s.fma(v, cos, s.mul(s.swap_pairs(v), sin)), x);
                }
            }
        }
        for head in self.x.chunks_exact_mut(dim) {
            for ([c, si], x) in rest.iter().zip(head[eights.len() * LANES..].as_chunks_mut::<2>().0) {
                let [a, b] = *x;
                *x = [a.mul_add(*c, b * -si), b.mul_add(*c, a * si)];
            }
        }
    }
}

#[cfg(test)]
mod tests;
