//! Two ymm registers as one vector. Pairs are kept widened, since the dot product of pairs is two FMA here.

use std::arch::x86_64::*;

use crate::simd::{Kernel, LANES, Line, Simd};

/// Proof that AVX2 and FMA are there.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// * The processor must have AVX2 and FMA.
    #[inline(always)]
    pub unsafe fn new() -> Self {
        Self(())
    }
}

type F = [__m256; 2];

/// `each!(name(a, b))`: one intrinsic on both halves.
macro_rules! each {
    ($op:ident($($v:expr),*)) => {
        // SAFETY: an `Avx2` exists, so the processor has the features; no memory is touched.
        unsafe { [$op($($v[0]),*), $op($($v[1]),*)] }
    };
}

/// e4m3 codes in the low bytes of u32 lanes.
/// The exponent is moved by 120; a denormal is read as 2^-6 * (1 + m/8) and loses its 2^-6; the NaN code is put in at the end.
#[inline(always)]
fn decode(code: __m256i) -> __m256 {
    // SAFETY: as in `each`.
    unsafe {
        let magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
        let denormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
        let bits = _mm256_add_epi32(_mm256_slli_epi32::<20>(magnitude), _mm256_set1_epi32(120 << 23));
        let lifted =
            _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_and_si256(denormal, _mm256_set1_epi32(1 << 23))));
        let excess = _mm256_and_ps(_mm256_castsi256_ps(denormal), _mm256_set1_ps(1.0 / 64.0));
        let value = _mm256_sub_ps(lifted, excess);
        let nan = _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)));
        let value = _mm256_blendv_ps(value, _mm256_set1_ps(f32::NAN), nan);
        let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(code, _mm256_set1_epi32(0x80)));
        _mm256_or_ps(value, _mm256_castsi256_ps(sign))
    }
}

impl Simd for Avx2 {
    type F = F;
    /// The high halves and the low halves, widened.
    type Pairs = [F; 2];
    /// Bytes 0 and 2 of each quad, and bytes 1 and 3, as words.
    type Quads = [[__m256i; 2]; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `self` proves the features.
        unsafe { super::run_avx2(kernel) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        // SAFETY: as in `each`.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F {
        // SAFETY: 16 values are there to be read.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, v: F, to: &mut [f32; LANES]) {
        // SAFETY: 16 values are there to be written.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        each!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        each!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        each!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        each!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        each!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        each!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        each!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn zero_below(self, x: F, limit: F, v: F) -> F {
        // SAFETY: as in `each`.
        let half = |i: usize| unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x[i], limit[i]), v[i]) };
        [half(0), half(1)]
    }
    #[inline(always)]
    fn zero_where_small(self, v: F, measure: F, limit: f32) -> F {
        // SAFETY: as in `each`.
        let half = |v: __m256, measure: __m256| unsafe {
            let sign = _mm256_set1_ps(-0.0);
            let small = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_andnot_ps(sign, measure), _mm256_set1_ps(limit));
            _mm256_blendv_ps(v, _mm256_and_ps(v, sign), small)
        };
        [half(v[0], measure[0]), half(v[1], measure[1])]
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        // SAFETY: as in `each`.
        let half = |a: __m256| unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) };
        [half(a[0]), half(a[1])]
    }
    #[inline(always)]
    fn scale(self, a: F, n: F) -> F {
        // SAFETY: as in `each`.
        let half = |a: __m256, n: __m256| unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        };
        [half(a[0], n[0]), half(a[1], n[1])]
    }
    #[inline(always)]
    fn swap_pairs(self, a: F) -> F {
        // SAFETY: as in `each`.
        let half = |a: __m256| unsafe { _mm256_permute_ps::<0b10_11_00_01>(a) };
        [half(a[0]), half(a[1])]
    }
    #[inline(always)]
    fn prefetch<T>(self, at: &T) {
        // SAFETY: a hint about an address that is borrowed, and so valid.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(at).cast()) };
    }
    #[inline(always)]
    fn pairs_bf16(self, x: &[u32; LANES]) -> [F; 2] {
        // SAFETY: 16 values are there to be read.
        let x = unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())] };
        // SAFETY: as in `each`.
        let high =
            |x: __m256i| unsafe { _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000_u32 as i32))) };
        // SAFETY: as in `each`.
        let low = |x: __m256i| unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)) };
        [[high(x[0]), high(x[1])], [low(x[0]), low(x[1])]]
    }
    #[inline(always)]
    fn pairs_bf16_again(self, x: &[u32; LANES]) -> [F; 2] {
        self.pairs_bf16(x)
    }
    #[inline(always)]
    fn halves(self, v: [F; 2]) -> [F; 2] {
        v
    }
    #[inline(always)]
    fn store_pairs(self, v: [F; 2], to: &mut [u32; LANES]) {
        let (mut high, mut low) = ([0.0; LANES], [0.0; LANES]);
        self.store(v[0], &mut high);
        self.store(v[1], &mut low);
        for (to, (high, low)) in to.iter_mut().zip(high.iter().zip(&low)) {
            *to = high.to_bits() | low.to_bits() >> 16;
        }
    }
    #[inline(always)]
    fn quads(self, w: &[u32; LANES]) -> [[__m256i; 2]; 2] {
        // SAFETY: 16 values are there to be read.
        let w = unsafe { [_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w.as_ptr().add(8).cast())] };
        // SAFETY: as in `each`.
        let even = |w: __m256i| unsafe { _mm256_and_si256(w, _mm256_set1_epi16(0xff)) };
        // SAFETY: as in `each`.
        let odd = |w: __m256i| unsafe { _mm256_srli_epi16::<8>(w) };
        [[even(w[0]), even(w[1])], [odd(w[0]), odd(w[1])]]
    }
    #[inline(always)]
    fn dot_quads(self, x: u32, [even, odd]: [[__m256i; 2]; 2], acc: F) -> F {
        // SAFETY: as in `each`.
        let half = |i: usize| unsafe {
            let x = _mm256_set1_epi32(x as i32);
            let even = _mm256_madd_epi16(even[i], _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)));
            let odd = _mm256_madd_epi16(odd[i], _mm256_srai_epi16::<8>(x));
            let sum = _mm256_add_epi32(_mm256_castps_si256(acc[i]), _mm256_add_epi32(even, odd));
            _mm256_castsi256_ps(sum)
        };
        [half(0), half(1)]
    }
    #[inline(always)]
    fn integers(self, v: F) -> F {
        // SAFETY: as in `each`.
        let half = |v: __m256| unsafe { _mm256_cvtepi32_ps(_mm256_castps_si256(v)) };
        [half(v[0]), half(v[1])]
    }
    #[inline(always)]
    fn pairs_e4m3<const V: usize>(self, x: &Line) -> [F; 2] {
        // SAFETY: 64 bytes are there to be read.
        let sixteen = |i: usize| unsafe { _mm_loadu_si128(x.as_ptr().add(16 * i).cast()) };
        let half = |i: usize| {
            let [a, b] = [sixteen(2 * i), sixteen(2 * i + 1)];
            // SAFETY: as in `each`.
            unsafe { _mm256_cvtepu16_epi32(if V == 0 { _mm_unpacklo_epi64(a, b) } else { _mm_unpackhi_epi64(a, b) }) }
        };
        // SAFETY: as in `each`.
        let high = |x: __m256i| unsafe { decode(_mm256_srli_epi32::<8>(x)) };
        [[high(half(0)), high(half(1))], [decode(half(0)), decode(half(1))]]
    }
}
