//! The name of a communicator that is about to be.

use std::ffi::c_char;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use cudarc::nccl::sys::ncclUniqueId;

use crate::error::Error;
use crate::library::api;

/// What all ranks of a communicator give to connect. One process makes it and sends its bytes to the others.
///
/// The process that makes it also listens for the others, on the interface that `NCCL_SOCKET_IFNAME` chooses, until
/// they are connected: it has to live as long. Whoever has the bytes can join, so they are not printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; Self::BYTES]);

impl UniqueId {
    /// Of an identifier.
    pub const BYTES: usize = 128;

    /// A new one. Opens a socket and does not wait for anybody.
    pub fn new() -> Result<Self, Error> {
        let api = api()?;
        let mut id = ncclUniqueId { internal: [0; Self::BYTES] };
        // SAFETY: writes the identifier.
        let code = unsafe { (api.unique_id)(&mut id) };
        api.check("ncclGetUniqueId", code)?;
        Ok(Self(id.internal.map(|byte| byte as u8)))
    }

    /// One that came from another process. Bytes that no process made fail to connect, or never do.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// To be sent to the other ranks.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    pub(crate) fn raw(&self) -> ncclUniqueId {
        ncclUniqueId { internal: self.0.map(|byte| byte as c_char) }
    }
}

/// A checksum, by which two can be told apart.
impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut hash = DefaultHasher::new();
        self.0.hash(&mut hash);
        write!(f, "UniqueId(#{:08x})", hash.finish() as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_and_are_not_printed() {
        let bytes = std::array::from_fn(|i| i as u8 + 100);
        let id = UniqueId::from_bytes(bytes);
        assert_eq!(id.as_bytes(), &bytes);
        assert_eq!(id.raw().internal.map(|byte| byte as u8), bytes);
        let (printed, other) = (format!("{id:?}"), format!("{:?}", UniqueId::from_bytes([0; UniqueId::BYTES])));
        assert_eq!(printed.len(), "UniqueId(#00000000)".len());
        assert_ne!(printed, other);
    }
}
