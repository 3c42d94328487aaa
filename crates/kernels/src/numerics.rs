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
    /// Linears of layers in blocks of INT8 (see `linear::quads`), all else as `bf16-fma`.
    Int8,
}

#[derive(Debug, thiserror::Error)]
#[error("dtype `{0}` is none of `f32`, `bf16`, `bf16-fma`, `bf16-dp` and `int8`")]
pub struct UnknownDtype(String);

impl FromStr for DtypeChoice {
    type Err = UnknownDtype;
    fn from_str(s: &str) -> Result<Self, UnknownDtype> {
        match s {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "bf16-fma" => Ok(Self::Bf16Fma),
            "bf16-dp" => Ok(Self::Bf16Dp),
            "int8" => Ok(Self::Int8),
            other => Err(UnknownDtype(other.to_owned())),
        }
    }
}

impl DtypeChoice {
    /// As they are written.
    pub const NAMES: [&str; 5] = ["f32", "bf16", "bf16-fma", "bf16-dp", "int8"];

    /// What this processor computes.
    pub fn numerics(self) -> Numerics {
        match self {
            Self::F32 => Numerics::detect(Dtype::F32),
            Self::Bf16 => Numerics::detect(Dtype::Bf16),
            Self::Bf16Fma => Numerics { kind: Kind::Bf16Fma, isa: Isa::best() },
            Self::Bf16Dp => Numerics { kind: Kind::Bf16Dp, isa: Isa::best() },
            Self::Int8 => Numerics { kind: Kind::Int8, isa: Isa::best() },
        }
    }
}

/// What is computed; not how fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    F32,
    /// Products are of f32, with weights in bf16.
    Bf16Fma,
    /// Products are of pairs of bf16, with denormals flushed.
    Bf16Dp,
    Int8,
}

/// A dtype with the kernel set chosen for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Numerics {
    kind: Kind,
    isa: Isa,
}

impl Numerics {
    /// The fastest that this processor has: bf16 as `bf16-dp` where the instruction is faster than f32.
    pub fn detect(dtype: Dtype) -> Self {
        let isa = Isa::best();
        let kind = match dtype {
            Dtype::F32 => Kind::F32,
            Dtype::Bf16 if isa.has_fast_dot_pairs() => Kind::Bf16Dp,
            Dtype::Bf16 => Kind::Bf16Fma,
        };
        Self { kind, isa }
    }

    /// What every processor has.
    pub fn portable(dtype: Dtype) -> Self {
        let kind = if dtype == Dtype::F32 { Kind::F32 } else { Kind::Bf16Fma };
        Self { kind, isa: Isa::Portable }
    }

    /// Every numerics on every instruction set that this processor can run, `bf16-dp` emulated where it has to be. For tests and benchmarks.
    pub fn all() -> Vec<Self> {
        let kinds = [Kind::F32, Kind::Bf16Fma, Kind::Bf16Dp, Kind::Int8];
        Isa::available().into_iter().flat_map(|isa| kinds.map(|kind| Self { kind, isa })).collect()
    }

    /// The same kernel set in full precision: what the gate is computed in.
    #[must_use]
    pub fn as_f32(self) -> Self {
        Self { kind: Kind::F32, ..self }
    }

    /// The same, but for INT8 what it is beside linears of layers: what attention itself and the head are computed in.
    #[must_use]
    pub fn unquantised(self) -> Self {
        if self.quantises() { Self { kind: Kind::Bf16Fma, ..self } } else { self }
    }

    /// Peers compare this: equal names, equal bits.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::F32 => "f32",
            Kind::Bf16Fma => "bf16-fma",
            Kind::Bf16Dp => "bf16-dp",
            Kind::Int8 => "int8",
        }
    }

    /// Weights that are not quantised: of those that a checkpoint has in more.
    pub fn dtype(&self) -> Dtype {
        if self.kind == Kind::F32 { Dtype::F32 } else { Dtype::Bf16 }
    }

    /// Rows, queries and the latent cache.
    pub fn activations(&self) -> Dtype {
        if self.by_pairs() { Dtype::Bf16 } else { Dtype::F32 }
    }

    /// Whether linears of layers are INT8, and the rows that they read.
    pub fn quantises(&self) -> bool {
        self.kind == Kind::Int8
    }

    /// The name of the instruction set, for logs.
    pub fn isa(&self) -> &'static str {
        self.isa.name()
    }

    pub(crate) fn kernels(&self) -> Isa {
        self.isa
    }

    pub(crate) fn by_pairs(&self) -> bool {
        self.kind == Kind::Bf16Dp
    }
}

#[cfg(test)]
mod tests;
