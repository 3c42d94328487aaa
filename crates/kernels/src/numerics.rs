use std::str::FromStr;
/// The type that weights and activations are rounded to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    F32,
    Bf16,
}
#[derive(Debug, thiserror::Error)]
#[error("dtype `{0}` is neither f32 nor bf16")]
pub struct UnknownDtype(String);
impl FromStr for Dtype {
    type Err = UnknownDtype;
    fn from_str(s: &str) -> Result<Self, UnknownDtype> {
        match s {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => Err(UnknownDtype(other.to_owned())),
        }
    }
}
/// A dtype with the kernel set chosen for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Numerics {
    dtype: Dtype,
}
impl Numerics {
    pub fn detect(dtype: Dtype) -> Self {
        Self { dtype }
    }
    pub fn portable(dtype: Dtype) -> Self {
        Self { dtype }
    }
    /// The same kernel set with full precision: for the gate.
    pub fn as_f32(self) -> Self {
        Self { dtype: Dtype::F32 }
    }
    pub fn name(&self) -> &'static str {
        "f32"
    }
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    pub fn isa(&self) -> &'static str {
        "portable"
    }
}
