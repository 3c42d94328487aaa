//! Which device a worker computes on.

use std::str::FromStr;

use super::device::{Missing, is_present, open};
use super::gpu::Device;
use crate::DtypeChoice;

/// Of a GPU's free memory, what a worker takes if it is not told: the rest is for the driver and for kernels.
const MEMORY_TENTHS: usize = 9;

/// `--device`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceChoice {
    /// The first GPU if there is one.
    Auto,
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
}

#[derive(Debug, thiserror::Error)]
#[error("device `{0}` is none of `auto`, `cpu` and `cuda:N`")]
pub struct UnknownDevice(String);

impl FromStr for DeviceChoice {
    type Err = UnknownDevice;
    fn from_str(s: &str) -> Result<Self, UnknownDevice> {
        match s.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(number)) => Ok(Self::Cuda(number)),
            None if s == "auto" => Ok(Self::Auto),
            None if s == "cpu" => Ok(Self::Cpu),
            _ => Err(UnknownDevice(s.to_owned())),
        }
    }
}

impl DeviceChoice {
    /// Of the GPU that is taken, if one is.
    pub fn number(self) -> usize {
        if let Self::Cuda(number) = self { number } else { 0 }
    }

    /// The GPU with an arena of `memory` bytes (nine tenths of what is free if not said), or nothing where the processor is
    /// to compute. GPUs compute bf16 in their own way: every other choice is the processor's.
    pub fn open(self, dtype: DtypeChoice, memory: Option<usize>) -> Result<Option<Device>, Missing> {
        let number = match (self, dtype) {
            (Self::Cpu, _) => return Ok(None),
            (Self::Auto, DtypeChoice::Bf16) if is_present() => 0,
            (Self::Auto, _) => return Ok(None),
            (Self::Cuda(number), DtypeChoice::Bf16) => number,
            (Self::Cuda(_), _) => return Err(Missing::Dtype),
        };
        let gpu = open(number)?;
        let memory = memory.unwrap_or(gpu.properties().memory_free / 10 * MEMORY_TENTHS);
        Ok(Some(Device::new(gpu, memory)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_or_refused_by_name() {
        let table = [
            ("auto", Some(DeviceChoice::Auto)),
            ("cpu", Some(DeviceChoice::Cpu)),
            ("cuda:0", Some(DeviceChoice::Cuda(0))),
            ("cuda:11", Some(DeviceChoice::Cuda(11))),
            ("cuda", None),
            ("cuda:", None),
            ("cuda:-1", None),
            ("gpu", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(text.parse::<DeviceChoice>().ok(), expected, "{text:?}");
        }
    }
}
