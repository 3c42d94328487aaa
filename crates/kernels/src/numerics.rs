//! Which arithmetic a process runs: the dtype it was asked for, and the kernels that the processor allows.
//!
//! Two processes with the same [`Numerics::name`] produce the same bits whatever their instruction sets.

use std::str::FromStr;

use crate::simd::Isa;

/// What values are rounded to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    /// Of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::Bf16 => size_of::<half::bf16>(),
        }
    }
}

/// `--dtype`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DtypeChoice {
    F32,
    /// By a GPU, or the faster of the next two on this processor.
    Bf16,
    /// `bf16-fma`, `bf16-dp`: for clusters whose processors would not choose the same.
    Bf16Fma,
    Bf16Dp,
}

#[derive(Debug, thiserror::Error)]
#[error("dtype `{0}` is none of `f32`, `bf16`, `bf16-fma` and `bf16-dp`")]
pub struct UnknownDtype(String);

impl FromStr for DtypeChoice {
    type Err = UnknownDtype;
    fn from_str(s: &str) -> Result<Self, UnknownDtype> {
        match s {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "bf16-fma" => Ok(Self::Bf16Fma),
            "bf16-dp" => Ok(Self::Bf16Dp),
            other => Err(UnknownDtype(other.to_owned())),
        }
    }
}

impl DtypeChoice {
    /// As they are written.
    pub const NAMES: [&str; 4] = ["f32", "bf16", "bf16-fma", "bf16-dp"];

    /// What this processor computes.
    pub fn numerics(self) -> Numerics {
        match self {
            Self::F32 => Numerics::detect(Dtype::F32),
            Self::Bf16 => Numerics::detect(Dtype::Bf16),
            Self::Bf16Fma | Self::Bf16Dp => {
                Numerics { dtype: Dtype::Bf16, pairs: self == Self::Bf16Dp, isa: Isa::best() }
            }
        }
    }
}

/// A dtype with the kernel set chosen for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Numerics {
    dtype: Dtype,
    /// Products are of pairs of bf16, with denormals flushed: `bf16-dp`; else of f32, with weights in bf16: `bf16-fma`.
    pairs: bool,
    isa: Isa,
}

impl Numerics {
    /// The fastest that this processor has: bf16 as `bf16-dp` where the instruction is faster than f32.
    pub fn detect(dtype: Dtype) -> Self {
        let isa = Isa::best();
        Self { dtype, pairs: dtype == Dtype::Bf16 && isa.has_fast_dot_pairs(), isa }
    }

    /// What every processor has.
    pub fn portable(dtype: Dtype) -> Self {
        Self { dtype, pairs: false, isa: Isa::Portable }
    }

    /// Every numerics on every instruction set that this processor can run, `bf16-dp` emulated where it has to be. For tests and benchmarks.
    pub fn all() -> Vec<Self> {
        let kinds = [(Dtype::F32, false), (Dtype::Bf16, false), (Dtype::Bf16, true)];
        let on = |isa| kinds.map(|(dtype, pairs)| Self { dtype, pairs, isa });
        Isa::available().into_iter().flat_map(on).collect()
    }

    /// The same kernel set in full precision: what the gate is computed in.
    pub fn as_f32(self) -> Self {
        Self { dtype: Dtype::F32, pairs: false, ..self }
    }

    /// Peers compare this: equal names, equal bits.
    pub fn name(&self) -> &'static str {
        match (self.dtype, self.pairs) {
            (Dtype::F32, _) => "f32",
            (Dtype::Bf16, false) => "bf16-fma",
            (Dtype::Bf16, true) => "bf16-dp",
        }
    }

    /// Weights: of those that a checkpoint has in more.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows, queries and the latent cache.
    pub fn activations(&self) -> Dtype {
        if self.pairs { Dtype::Bf16 } else { Dtype::F32 }
    }

    /// The name of the instruction set, for logs.
    pub fn isa(&self) -> &'static str {
        self.isa.name()
    }

    pub(crate) fn kernels(&self) -> Isa {
        self.isa
    }

    pub(crate) fn by_pairs(&self) -> bool {
        self.pairs
    }
}

#[cfg(test)]
mod tests;
