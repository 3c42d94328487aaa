//! The vector as an array: what each operation of [`Simd`] means, and the fall-back for every processor.

use super::{Kernel, LANES, Line, Simd, interleaved};
use crate::fp8::e4m3_to_f32;

#[derive(Clone, Copy)]
pub(super) struct Portable;

type F = [f32; LANES];

#[inline(always)]
fn map(a: F, f: impl Fn(f32) -> f32) -> F {
    a.map(f)
}

#[inline(always)]
fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// What is slow here anyway, sixteen calls where the processor has no such instruction, is a function of its own: else the kernels
/// have it hundreds of times, which was half of all code and of the time to compile it.
impl Simd for Portable {
    type F = F;
    type Pairs = [u32; LANES];
    type Quads = [u32; LANES];
    const WIDE: bool = false;

    #[inline(never)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.run(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &F) -> F {
        *x
    }
    #[inline(always)]
    fn store(self, v: F, to: &mut F) {
        *to = v;
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(never)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn zero_below(self, x: F, limit: F, v: F) -> F {
        std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { v[i] })
    }
    #[inline(always)]
    fn zero_where_small(self, v: F, measure: F, limit: f32) -> F {
        zip(v, measure, |v, measure| if measure.abs() < limit { 0f32.copysign(v) } else { v })
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        map(a, f32::round_ties_even)
    }
    #[inline(always)]
    fn scale(self, a: F, n: F) -> F {
        zip(a, n, |a, n| a * f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    fn swap_pairs(self, a: F) -> F {
        std::array::from_fn(|i| a[i ^ 1])
    }
    #[inline(always)]
    fn prefetch<T>(self, _: &T) {}
    #[inline(always)]
    fn pairs_bf16(self, x: &[u32; LANES]) -> [u32; LANES] {
        *x
    }
    #[inline(always)]
    fn pairs_bf16_again(self, x: &[u32; LANES]) -> [u32; LANES] {
        *x
    }
    #[inline(always)]
    fn halves(self, v: [u32; LANES]) -> [F; 2] {
        [v.map(|pair| f32::from_bits(pair & 0xffff_0000)), v.map(|pair| f32::from_bits(pair << 16))]
    }
    #[inline(always)]
    fn store_pairs(self, v: [u32; LANES], to: &mut [u32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn quads(self, w: &[u32; LANES]) -> [u32; LANES] {
        *w
    }
    #[inline(never)]
    fn dot_quads(self, x: u32, w: [u32; LANES], acc: F) -> F {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|i| {
            let products = w[i].to_le_bytes().into_iter().zip(x).map(|(w, x)| i32::from(w) * x);
            f32::from_bits((acc[i].to_bits() as i32 + products.sum::<i32>()) as u32)
        })
    }
    #[inline(always)]
    fn integers(self, v: F) -> F {
        map(v, |v| v.to_bits() as i32 as f32)
    }
    #[inline(always)]
    fn pairs_e4m3<const V: usize>(self, x: &Line) -> [u32; LANES] {
        // A widened e4m3 has at most 4 significant bits, so the upper half of the f32 is all of it.
        let word = |w: usize| e4m3_to_f32(x[interleaved::<V>(w)]).to_bits();
        std::array::from_fn(|i| word(2 * i + 1) | word(2 * i) >> 16)
    }
}
