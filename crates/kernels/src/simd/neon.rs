//! Four NEON registers as one vector. Every 64-bit Arm processor has NEON, so nothing needs to be found at run time. Its own products of bf16 pairs round in
//! another way than x86's, and are not used.

use std::arch::aarch64::*;
use std::array::from_fn;

use super::{Kernel, LANES, Line, Simd, interleaved};

#[derive(Clone, Copy)]
pub(super) struct Neon;

type F = [float32x4_t; 4];
type Pairs = [uint32x4_t; 4];
type Quads = [uint8x16_t; 4];

/// `each!(i => value)`: the value for each of the four registers.
macro_rules! each {
    ($i:ident => $value:expr) => {
        // SAFETY: the processor has NEON; what is read is in the arrays that are borrowed.
        from_fn(|$i| unsafe { $value })
    };
}

/// The f32 of e4m3 codes in the low bytes of the lanes.
/// Seven bits of a code, where an f32 has the low end of its exponent and the start of its fraction, are 2^-120 of the value, denormals too.
#[inline]
#[target_feature(enable = "neon")]
fn decode(code: uint32x4_t) -> uint32x4_t {
    let magnitude = vandq_u32(code, vdupq_n_u32(0x7f));
    let value = vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32::<20>(magnitude)), vdupq_n_f32(f32::from_bits(247 << 23)));
    let is_nan = vceqq_u32(magnitude, vdupq_n_u32(0x7f));
    let value = vbslq_u32(is_nan, vdupq_n_u32(f32::NAN.to_bits()), vreinterpretq_u32_f32(value));
    vorrq_u32(value, vshlq_n_u32::<24>(vandq_u32(code, vdupq_n_u32(0x80))))
}

/// A function of its own, as [`Simd::apart`] asks.
#[inline(never)]
fn run_apart<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Neon)
}

impl Simd for Neon {
    type F = F;
    type Pairs = Pairs;
    type Quads = Quads;
    const WIDE: bool = false;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Out {
        run_apart(kernel)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        each!(_i => vdupq_n_f32(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F {
        each!(i => vld1q_f32(x.as_ptr().add(4 * i)))
    }
    #[inline(always)]
    fn store(self, v: F, to: &mut [f32; LANES]) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: 16 values are there to be written.
            unsafe { vst1q_f32(to.as_mut_ptr().add(4 * i), v) };
        }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        each!(i => vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        each!(i => vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        each!(i => vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        each!(i => vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        each!(i => vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        each!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        each!(i => vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn zero_below(self, x: F, limit: F, v: F) -> F {
        each!(i => vbslq_f32(vcltq_f32(x[i], limit[i]), vdupq_n_f32(0.0), v[i]))
    }
    #[inline(always)]
    fn zero_where_small(self, v: F, measure: F, limit: f32) -> F {
        each!(i => {
            let sign = vandq_u32(vreinterpretq_u32_f32(v[i]), vdupq_n_u32(1 << 31));
            let small = vcaltq_f32(measure[i], vdupq_n_f32(limit));
            vbslq_f32(small, vreinterpretq_f32_u32(sign), v[i])
        })
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        each!(i => vrndnq_f32(a[i]))
    }
    #[inline(always)]
    fn scale(self, a: F, n: F) -> F {
        each!(i => {
            let exponent = vaddq_s32(vcvtq_s32_f32(n[i]), vdupq_n_s32(127));
            vmulq_f32(a[i], vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
        })
    }
    #[inline(always)]
    fn swap_pairs(self, a: F) -> F {
        each!(i => vrev64q_f32(a[i]))
    }
    #[inline(always)]
    fn prefetch<T>(self, at: &T) {
        let at = std::ptr::from_ref(at);
        // SAFETY: a hint about an address that is borrowed, and so valid.
        unsafe { std::arch::asm!("prfm pldl2keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly)) };
    }
    #[inline(always)]
    fn pairs_bf16(self, x: &[u32; LANES]) -> Pairs {
        each!(i => vld1q_u32(x.as_ptr().add(4 * i)))
    }
    #[inline(always)]
    fn pairs_bf16_again(self, x: &[u32; LANES]) -> Pairs {
        self.pairs_bf16(x)
    }
    #[inline(always)]
    fn halves(self, v: Pairs) -> [F; 2] {
        let high = each!(i => vreinterpretq_f32_u32(vandq_u32(v[i], vdupq_n_u32(0xffff_0000))));
        [high, each!(i => vreinterpretq_f32_u32(vshlq_n_u32::<16>(v[i])))]
    }
    #[inline(always)]
    fn store_pairs(self, v: Pairs, to: &mut [u32; LANES]) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: 16 values are there to be written.
            unsafe { vst1q_u32(to.as_mut_ptr().add(4 * i), v) };
        }
    }
    #[inline(always)]
    fn quads(self, w: &[u32; LANES]) -> Quads {
        each!(i => vreinterpretq_u8_u32(vld1q_u32(w.as_ptr().add(4 * i))))
    }
    #[inline(always)]
    fn dot_quads(self, x: u32, w: Quads, acc: F) -> F {
        each!(i => {
            let x = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(x)));
            // 255 * 127 is a word.
            let lower = vmulq_s16(x, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(w[i]))));
            let upper = vmulq_s16(x, vreinterpretq_s16_u16(vmovl_high_u8(w[i])));
            let sums = vpaddq_s32(vpaddlq_s16(lower), vpaddlq_s16(upper));
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(acc[i]), sums))
        })
    }
    #[inline(always)]
    fn integers(self, v: F) -> F {
        each!(i => vcvtq_f32_s32(vreinterpretq_s32_f32(v[i])))
    }
    #[inline(always)]
    fn pairs_e4m3<const V: usize>(self, x: &Line) -> Pairs {
        each!(i => {
            let pairs = vmovl_u16(vreinterpret_u16_u8(vld1_u8(x.as_ptr().add(interleaved::<V>(8 * i)))));
            // A widened e4m3 has at most 4 significant bits, so the upper half of the f32 is all of it.
            vsriq_n_u32::<16>(decode(vshrq_n_u32::<8>(pairs)), decode(pairs))
        })
    }
}
