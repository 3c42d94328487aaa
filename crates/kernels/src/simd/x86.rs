//! The x86 instruction sets: a `#[target_feature]` wrapper for each, around whatever kernel it is given.

mod avx2;
mod avx512;

use super::Kernel;
use avx2::Avx2;
use avx512::Avx512;

/// # Safety
/// * The processor must have AVX2 and FMA.
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller found the features.
    kernel.run(unsafe { Avx2::new() })
}

/// # Safety
/// * The processor must have AVX2, FMA, AVX512F and AVX512BW.
#[inline(never)]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller found the features.
    kernel.run(unsafe { Avx512::<false>::new() })
}

/// # Safety
/// * The processor must have AVX2, FMA, AVX512F, AVX512BW, AVX512BF16, AVX512VBMI and AVX512VNNI.
#[inline(never)]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512bf16,avx512vbmi,avx512vnni")]
pub(super) unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller found the features.
    kernel.run(unsafe { Avx512::<true>::new() })
}
