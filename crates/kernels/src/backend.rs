//! What computes: this processor or a GPU.

use crate::cuda::{Device, DeviceChoice, Missing};
use crate::{Dtype, DtypeChoice, Numerics, Pool};

#[derive(Clone, Debug)]
pub enum Backend {
    Cpu(Numerics, Pool),
    /// In bf16.
    Gpu(Device),
}

impl Backend {
    /// `memory`: bytes of a GPU's memory to take; see [`DeviceChoice::open`].
    pub fn open(
        device: DeviceChoice,
        dtype: DtypeChoice,
        memory: Option<usize>,
        pool: impl FnOnce() -> Pool,
    ) -> Result<Self, Missing> {
        Ok(match device.open(dtype, memory)? {
            Some(gpu) => Self::Gpu(gpu),
            None => Self::Cpu(dtype.numerics(), pool()),
        })
    }

    /// Peers compare this: equal names, equal bits.
    pub fn numerics(&self) -> String {
        match self {
            Self::Cpu(numerics, _) => numerics.name().to_owned(),
            Self::Gpu(device) => device.numerics(),
        }
    }

    /// As [`Numerics::activations`].
    pub fn activations(&self) -> Dtype {
        match self {
            Self::Cpu(numerics, _) => numerics.activations(),
            Self::Gpu(_) => Dtype::Bf16,
        }
    }

    /// As [`Numerics::dtype`].
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Cpu(numerics, _) => numerics.dtype(),
            Self::Gpu(_) => Dtype::Bf16,
        }
    }

    /// The GPU, if it is one.
    pub fn gpu(&self) -> Option<&Device> {
        match self {
            Self::Cpu(..) => None,
            Self::Gpu(device) => Some(device),
        }
    }

    /// For logs.
    pub fn device(&self) -> String {
        match self {
            Self::Cpu(numerics, _) => numerics.isa().to_owned(),
            Self::Gpu(device) => device.to_string(),
        }
    }

    /// Bytes of a GPU's arena, and those of them that are free.
    pub fn gpu_memory(&self) -> Option<(usize, usize)> {
        self.gpu().map(Device::memory)
    }

    /// The caller is the thread that computes.
    pub fn pin_caller(&self) {
        if let Self::Cpu(_, pool) = self {
            pool.pin_caller();
        }
    }
}
