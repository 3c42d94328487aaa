//! Sixteen f32 lanes on every processor, and the one place where a kernel meets an instruction set.
//!
//! An operation is written once, as a [`Kernel`] over the trait [`Simd`]. [`Isa::run`] compiles it again for each instruction set (everything below a
//! `run` is `#[inline(always)]`, so it is generated with the features of the wrapper it ends up in) and picks one at run time.
//!
//! Tricks:
//! 1. The vector is always 16 lanes: one zmm, two ymm, four of NEON's, or an array. Each trait operation is exactly defined for one lane, so a kernel gives the same bits
//!    everywhere and no kernel needs a test of its own against every instruction set to be believed; the tests do it all the same.
//! 2. A `Simd` value is a proof: it can only be made (unsafely) where its features were found, so kernels over it are safe code.
//! 3. `bf16` pairs: see [`Simd::dot_pairs`].

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

/// Lanes of a vector; outputs of a panel of weights; heads of an attention task.
pub(crate) const LANES: usize = 16;

/// Sixteen pairs of bf16.
pub(crate) type Words = [u16; 2 * LANES];

/// A line of the processor's caches.
pub(crate) type Line = [u8; 64];

/// The V-th of four steps of tight weights (see `linear::tight`): upper bytes from a table by codes of 4 bits, of which two are in a byte.
#[inline(always)]
pub(crate) fn tight_words<const V: usize>(codes: &Line, lowers: &Line, uppers: &Line) -> Words {
    std::array::from_fn(|word| {
        let byte = interleaved::<V>(word);
        let upper = uppers[usize::from(codes[byte] >> (V / 2 * 4) & 0xf)];
        u16::from_be_bytes([upper, lowers[byte]])
    })
}

/// Where a word of the V-th of two vectors (the V-th of four: of the V / 2-th two) has its byte in 64: as registers are interleaved, 16 bytes by 16.
#[inline(always)]
pub(crate) fn interleaved<const V: usize>(word: usize) -> usize {
    word / 8 * 16 + V % 2 * 8 + word % 8
}

/// What the factors of a sum are multiplied by before it is asked whether it is denormal; the sum is lifted by its square.
const LIFT: f32 = (1u64 << 32) as f32;
/// A lifted sum below this is denormal.
const LIFTED_MIN: f32 = f32::MIN_POSITIVE * LIFT * LIFT;

/// Sixteen values where a vector can be loaded from in one access.
#[repr(align(64))]
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Lanes(pub [f32; LANES]);

/// An operation with its arguments, ready to be run on any instruction set.
pub(crate) trait Kernel {
    type Out;
    /// Must be `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// Instruction sets, slowest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Isa {
    Portable,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// The last of [`Isa::available`].
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().into_iter().max().unwrap_or(Self::Portable))
    }

    /// What this processor can run.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "aarch64")]
        found.push(Self::Neon);
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            let bytes = is_x86_feature_detected!("avx512vbmi");
            let quads = is_x86_feature_detected!("avx512vnni");
            let bf16 = avx512 && bytes && quads && is_x86_feature_detected!("avx512bf16");
            let all = [(avx2, Self::Avx2), (avx512, Self::Avx512), (bf16, Self::Avx512Bf16)];
            found.extend(all.into_iter().filter_map(|(has, isa)| has.then_some(isa)));
        }
        found
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512-bf16",
        }
    }

    /// Whether [`Simd::dot_pairs`] is one instruction.
    pub fn has_dot_pairs(self) -> bool {
        self.name() == "avx512-bf16"
    }

    /// Whether it is faster than two multiply-adds of f32: twice on AMD's processors, half on Intel's.
    pub fn has_fast_dot_pairs(self) -> bool {
        self.has_dot_pairs() && !vendor_is_intel()
    }

    /// [`Simd::WIDE`].
    pub fn is_wide(self) -> bool {
        self.name().starts_with("avx512")
    }

    /// Whether tight weights are opened in registers ([`Simd::OPENS_TIGHT`]), so that they are read faster than others and not only smaller.
    pub fn opens_tight(self) -> bool {
        self.name() == "avx512-bf16"
    }

    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self {
            Self::Portable => kernel.run(portable::Portable),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => kernel.run(neon::Neon),
            // SAFETY: these variants are made by `available` alone, which found the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { x86::run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => unsafe { x86::run_avx512_bf16(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vendor_is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn vendor_is_intel() -> bool {
    false
}

/// Sixteen f32 lanes. Every operation is IEEE 754 with round to nearest even, lane by lane.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen pairs of bf16.
    type Pairs: Copy;
    /// Sixteen quads of bytes.
    type Quads: Copy;
    /// Whether there are 32 registers of a whole vector (else 16 of half a vector).
    const WIDE: bool;
    /// Whether [`Simd::pairs_tight`] takes less time than memory takes to bring what it saves.
    const OPENS_TIGHT: bool = false;

    /// Runs a kernel, on x86 as a function of its own: the compiler does better with a small hot loop than with one in the middle of a large function.
    fn apart<K: Kernel>(self, kernel: K) -> K::Out;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, to: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a * b + c, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a > b ? a : b, so `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// a < b ? a : b, so `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// x < limit ? 0 : v.
    fn zero_below(self, x: Self::F, limit: Self::F, v: Self::F) -> Self::F;
    /// |measure| < limit ? a zero of v's sign : v.
    fn zero_where_small(self, v: Self::F, measure: Self::F, limit: f32) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// a * 2^n for an integer n in -126..=127; anything where n is NaN and a is NaN too.
    fn scale(self, a: Self::F, n: Self::F) -> Self::F;
    /// Lanes 1 0 3 2 5 4 ...
    fn swap_pairs(self, a: Self::F) -> Self::F;

    /// The same reference, but a compiler no longer knows what it is a part of: it addresses from it, and not from the whole with an index.
    #[inline(always)]
    fn by_itself<T>(self, at: &T) -> &T {
        at
    }

    /// Asks for the memory at `at` to be brought near; changes nothing.
    fn prefetch<T>(self, at: &T);

    /// A pair is a u32: the high half is the lower k.
    fn pairs_bf16(self, x: &[u32; LANES]) -> Self::Pairs;
    /// The same from memory, even if it has been read before: a compiler would keep it in a register, and lack that for sums.
    fn pairs_bf16_again(self, x: &[u32; LANES]) -> Self::Pairs;
    /// The high halves and the low halves, widened.
    fn halves(self, v: Self::Pairs) -> [Self::F; 2];
    /// What `pairs_bf16` reads back.
    fn store_pairs(self, v: Self::Pairs, to: &mut [u32; LANES]);
    /// [`tight_words`].
    #[inline(always)]
    fn pairs_tight<const V: usize>(self, codes: &Line, lowers: &Line, uppers: &Line) -> Self::Pairs {
        self.pairs_bf16(&bytemuck::cast(tight_words::<V>(codes, lowers, uppers)))
    }
    /// Words below 256 as bytes, [`interleaved`].
    #[inline(always)]
    fn interleave(self, even: &Words, odd: &Words) -> Line {
        let mut bytes = [0; size_of::<Line>()];
        for (word, (even, odd)) in even.iter().zip(odd).enumerate() {
            (bytes[interleaved::<0>(word)], bytes[interleaved::<1>(word)]) = (*even as u8, *odd as u8);
        }
        bytes
    }
    /// The V-th of the two that lie [`interleaved`] in `x`.
    fn pairs_e4m3<const V: usize>(self, x: &Line) -> Self::Pairs;
    /// A quad is a u32: its lowest byte is the lowest k.
    fn quads(self, w: &[u32; LANES]) -> Self::Quads;
    /// In each lane's bits an i32: acc + the sum of four products, of bytes of `w` (0 to 255) and bytes of `x` (-127 to 127).
    fn dot_quads(self, x: u32, w: Self::Quads, acc: Self::F) -> Self::F;
    /// The i32 in each lane's bits as a value; exact up to 2^24.
    fn integers(self, v: Self::F) -> Self::F;
    /// What `vdpbf16ps` does (found by comparing 160 million inputs, denormals, infinities and cancellations among them):
    /// ```text
    /// z(v)           = v with denormals replaced by a zero of the same sign
    /// zfma(a, b, c)  = fma(a, b, c), or a zero of its sign if a * b + c, rounded to 24 bits with an unbounded exponent, is below the smallest normal number
    /// t              = zfma(z(x.high), z(w.high), z(acc))
    /// acc'           = zfma(z(x.low),  z(w.low),  t)
    /// ```
    /// zfma is not z(fma): a sum that only rounding to a denormal's fewer bits brings up to the smallest normal number is flushed, too. Where there is no
    /// such instruction, what is asked is the fma of operands lifted by [`LIFT`]: it has all 24 bits. (Where lifting overflows, nothing is lost by rounding.)
    ///
    /// so with the lower k in the high half it is the one ascending chain of the other kernels, but for the flushed denormals.
    #[inline(always)]
    fn dot_pairs(self, x: u32, w: Self::Pairs, acc: Self::F) -> Self::F {
        self.dot_pairs_by_steps(x, w, acc)
    }

    /// The same without such an instruction.
    #[inline(always)]
    fn dot_pairs_by_steps(self, x: u32, w: Self::Pairs, acc: Self::F) -> Self::F {
        let [high, low] = self.halves(w);
        let x_high = flush(self, self.splat(f32::from_bits(x & 0xffff_0000)));
        let x_low = flush(self, self.splat(f32::from_bits(x << 16)));
        let sum = zfma(self, x_high, flush(self, high), flush(self, acc));
        zfma(self, x_low, flush(self, low), sum)
    }
}

/// Denormals to zeros of the same sign: z, as at [`Simd::dot_pairs`].
#[inline(always)]
fn flush<S: Simd>(s: S, v: S::F) -> S::F {
    s.zero_where_small(v, v, f32::MIN_POSITIVE)
}

/// As at [`Simd::dot_pairs`].
#[inline(always)]
fn zfma<S: Simd>(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
    let lift = s.splat(LIFT);
    let lifted = s.fma(s.mul(a, lift), s.mul(b, lift), s.mul(c, s.splat(LIFT * LIFT)));
    s.zero_where_small(s.fma(a, b, c), lifted, LIFTED_MIN)
}
