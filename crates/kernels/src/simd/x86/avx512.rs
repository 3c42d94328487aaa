//! One zmm register as one vector. With `DOT`, the dot product of pairs is `vdpbf16ps`, and that of quads `vpdpbusd`.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::simd::{Kernel, LANES, Line, Simd, Words, tight_words};

/// Proof that AVX512F and AVX512BW (and with `DOT` AVX512BF16, AVX512VBMI and AVX512VNNI) are there.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const DOT: bool>(());

impl<const DOT: bool> Avx512<DOT> {
    /// # Safety
    /// * The processor must have AVX512F and AVX512BW, and with `DOT` AVX512BF16, AVX512VBMI and AVX512VNNI.
    #[inline(always)]
    pub unsafe fn new() -> Self {
        Self(())
    }
}

/// The 128 e4m3 magnitudes as bf16: four registers that `vpermi2w` reads from.
static MAGNITUDES: [u16; 128] = {
    let mut table = [0; 128];
    let mut code = 0;
    while code < 128 {
        table[code] = (crate::fp8::e4m3_bits(code as u8) >> 16) as u16;
        code += 1;
    }
    table
};

/// Their upper and their lower bytes: each two registers for `vpermi2b`.
static MAGNITUDE_BYTES: [[Line; 2]; 2] = {
    let mut bytes = [[[0; 64]; 2]; 2];
    let mut code = 0;
    while code < 128 {
        bytes[0][code / 64][code % 64] = (MAGNITUDES[code] >> 8) as u8;
        bytes[1][code / 64][code % 64] = MAGNITUDES[code] as u8;
        code += 1;
    }
    bytes
};

/// In memory at any address.
#[repr(C, packed)]
struct Unaligned<T>(T);

/// # Safety
/// * The processor must have AVX512F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn loaded(line: &Line) -> __m512i {
    // SAFETY: 64 bytes are there to be read.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

impl<const DOT: bool> Simd for Avx512<DOT> {
    type F = __m512;
    type Pairs = __m512i;
    type Quads = __m512i;
    const WIDE: bool = true;
    const OPENS_TIGHT: bool = DOT;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `self` proves the features.
        unsafe { if DOT { super::run_avx512_bf16(kernel) } else { super::run_avx512(kernel) } }
    }
    #[inline(always)]
    fn by_itself<T>(self, at: &T) -> &T {
        let mut at = std::ptr::from_ref(at);
        // SAFETY: there is no instruction: the pointer stays as it is.
        unsafe {
            asm!("/* {0} */", inout(reg) at, options(pure, readonly, nostack, preserves_flags));
            &*at
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves the features; 16 values are there to be read.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; LANES]) {
        // SAFETY: `self` proves the features; 16 values are there to be written.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn zero_below(self, x: __m512, limit: __m512, v: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, limit), _mm512_setzero_ps()) }
    }
    #[inline(always)]
    fn zero_where_small(self, v: __m512, measure: __m512, limit: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(measure), _mm512_set1_ps(limit));
            let bits = _mm512_castps_si512(v);
            _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, small, bits, _mm512_set1_epi32(i32::MIN)))
        }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_mul_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    fn swap_pairs(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_permute_ps::<0b10_11_00_01>(a) }
    }
    #[inline(always)]
    fn prefetch<T>(self, at: &T) {
        // SAFETY: a hint about an address that is borrowed, and so valid.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(at).cast()) };
    }
    #[inline(always)]
    fn pairs_bf16(self, x: &[u32; LANES]) -> __m512i {
        // SAFETY: `self` proves the features; 16 values are there to be read.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn pairs_bf16_again(self, x: &[u32; LANES]) -> __m512i {
        // SAFETY: 16 values are there to be read, as bytes of any alignment.
        unsafe { std::ptr::from_ref(x).cast::<Unaligned<__m512i>>().read_volatile() }.0
    }
    #[inline(always)]
    fn halves(self, v: __m512i) -> [__m512; 2] {
        // SAFETY: `self` proves the features.
        unsafe {
            let high = _mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(high), _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v))]
        }
    }
    #[inline(always)]
    fn store_pairs(self, v: __m512i, to: &mut [u32; LANES]) {
        // SAFETY: `self` proves the features; 16 values are there to be written.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) };
    }
    #[inline(always)]
    fn pairs_tight<const V: usize>(self, codes: &Line, lowers: &Line, uppers: &Line) -> __m512i {
        if !DOT {
            return self.pairs_bf16(&bytemuck::cast(tight_words::<V>(codes, lowers, uppers)));
        }
        // SAFETY: `self` proves the features; 64 bytes of each are there to be read.
        unsafe {
            // The upper two of an index's six bits are of another code: the table is there four times.
            let codes = if V < 2 { loaded(codes) } else { _mm512_srli_epi16::<4>(loaded(codes)) };
            let (lowers, uppers) = (loaded(lowers), _mm512_permutexvar_epi8(codes, loaded(uppers)));
            if V.is_multiple_of(2) {
                _mm512_unpacklo_epi8(lowers, uppers)
            } else {
                _mm512_unpackhi_epi8(lowers, uppers)
            }
        }
    }
    #[inline(always)]
    fn interleave(self, even: &Words, odd: &Words) -> Line {
        // SAFETY: `self` proves the features; the casts between types of 512 bits keep every bit.
        unsafe {
            let (even, odd) = (loaded(bytemuck::cast_ref(even)), loaded(bytemuck::cast_ref(odd)));
            std::mem::transmute::<__m512i, Line>(_mm512_packus_epi16(even, odd))
        }
    }
    #[inline(always)]
    fn quads(self, w: &[u32; LANES]) -> __m512i {
        self.pairs_bf16(w)
    }
    #[inline(always)]
    fn dot_quads(self, x: u32, w: __m512i, acc: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let (x, acc) = (_mm512_set1_epi32(x as i32), _mm512_castps_si512(acc));
            if DOT {
                return _mm512_castsi512_ps(_mm512_dpbusd_epi32(acc, w, x));
            }
            let even = _mm512_and_si512(w, _mm512_set1_epi16(0xff));
            let even = _mm512_madd_epi16(even, _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x)));
            let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(w), _mm512_srai_epi16::<8>(x));
            _mm512_castsi512_ps(_mm512_add_epi32(acc, _mm512_add_epi32(even, odd)))
        }
    }
    #[inline(always)]
    fn integers(self, v: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(v)) }
    }
    #[inline(always)]
    fn pairs_e4m3<const V: usize>(self, x: &Line) -> __m512i {
        // SAFETY: `self` proves the features; 64 bytes of `x` and of each table are there to be read.
        unsafe {
            let x = loaded(x);
            if DOT {
                let [high, low] = &MAGNITUDE_BYTES;
                let high = _mm512_permutex2var_epi8(loaded(&high[0]), x, loaded(&high[1]));
                let low = _mm512_permutex2var_epi8(loaded(&low[0]), x, loaded(&low[1]));
                // high | (x & sign)
                let high = _mm512_ternarylogic_epi64::<0xf8>(high, x, _mm512_set1_epi8(i8::MIN));
                return if V == 0 { _mm512_unpacklo_epi8(low, high) } else { _mm512_unpackhi_epi8(low, high) };
            }
            let zero = _mm512_setzero_si512();
            let code = if V == 0 { _mm512_unpacklo_epi8(x, zero) } else { _mm512_unpackhi_epi8(x, zero) };
            let table = |i: usize| _mm512_loadu_si512(MAGNITUDES.as_ptr().add(32 * i).cast());
            let small = _mm512_permutex2var_epi16(table(0), code, table(1));
            let large = _mm512_permutex2var_epi16(table(2), code, table(3));
            let is_large = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
            let sign = _mm512_slli_epi16::<8>(_mm512_and_si512(code, _mm512_set1_epi16(0x80)));
            _mm512_or_si512(_mm512_mask_mov_epi16(small, is_large, large), sign)
        }
    }
    #[inline(always)]
    fn dot_pairs(self, x: u32, w: __m512i, acc: __m512) -> __m512 {
        if !DOT {
            return self.dot_pairs_by_steps(x, w, acc);
        }
        // SAFETY: `self` proves the features; the casts between 512-bit types keep every bit.
        unsafe {
            let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x as i32));
            _mm512_dpbf16_ps(acc, x, std::mem::transmute::<__m512i, __m512bh>(w))
        }
    }
}
