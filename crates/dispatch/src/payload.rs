//! Rows of a frame on their way, wherever they lie.

use bytes::Bytes;
use moesaic_kernels::cuda::GpuBytes;
use moesaic_proto::v1;

use crate::shared::Shared;

/// A frame's rows, one after the other.
#[derive(Clone, Debug)]
pub enum Payload {
    /// In the processor's memory.
    Here(Bytes),
    /// On the worker's GPU, in pieces.
    There(Vec<GpuBytes>),
}

impl Payload {
    /// The rows of a message that came over a stream, which has none then.
    pub fn taken(frame: &mut v1::Frame) -> Self {
        Self::Here(std::mem::take(&mut frame.rows))
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Here(bytes) => bytes.len(),
            Self::There(pieces) => pieces.iter().map(GpuBytes::len).sum(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it, in the processor's memory.
    pub fn brought(self) -> Bytes {
        match self {
            Self::Here(bytes) => bytes,
            Self::There(pieces) => pieces.iter().map(read::<u8>).collect::<Vec<_>>().concat().into(),
        }
    }
}

/// A copy in the processor's memory: nothing, which no other side takes, if the GPU has failed, with which its worker ends.
pub(crate) fn read<T: bytemuck::Pod>(bytes: &GpuBytes) -> Vec<T> {
    bytes.read().unwrap_or_else(|error| {
        tracing::error!(%error, "rows cannot be read from the GPU");
        Vec::new()
    })
}

/// f32 that were answered, [outputs, hidden].
#[derive(Clone, Debug)]
pub enum Values {
    /// In the processor's memory.
    Here(Shared<f32>),
    /// On the worker's GPU.
    There(GpuBytes),
}

impl Values {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Here(values) => values.len(),
            Self::There(bytes) => bytes.len() / size_of::<f32>(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them, in the processor's memory.
    pub fn brought(self) -> Shared<f32> {
        match self {
            Self::Here(values) => values,
            Self::There(bytes) => read(&bytes).into(),
        }
    }

    pub(crate) fn payload(self) -> Payload {
        match self {
            Self::Here(values) => Payload::Here(values.bytes()),
            Self::There(bytes) => Payload::There(vec![bytes]),
        }
    }
}

impl From<Shared<f32>> for Values {
    fn from(values: Shared<f32>) -> Self {
        Self::Here(values)
    }
}

impl From<Vec<f32>> for Values {
    fn from(values: Vec<f32>) -> Self {
        Self::Here(values.into())
    }
}
