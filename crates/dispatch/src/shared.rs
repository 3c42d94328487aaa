//! Numbers in a reference-counted buffer: made from a `Vec` without a copy, sent as `Bytes` without a copy, and read
//! out of a received message without a copy wherever that message happens to be aligned.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use bytemuck::Pod;
use bytes::Bytes;

#[cfg(target_endian = "big")]
compile_error!("frames are little-endian and are read in place");

/// A shared `[T]`; clones are cheap.
pub struct Shared<T> {
    /// Aligned for `T`, and a whole number of them.
    bytes: Bytes,
    of: PhantomData<fn() -> T>,
}

impl<T: Pod + Send + Sync> Shared<T> {
    /// Borrows `bytes` if they are aligned, else copies them once. `None` if they are no whole number of `T`.
    pub fn from_bytes(bytes: Bytes) -> Option<Self> {
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return None;
        }
        if bytemuck::try_cast_slice::<u8, T>(&bytes).is_err() {
            let mut values = vec![T::zeroed(); bytes.len() / size_of::<T>()];
            bytemuck::cast_slice_mut(&mut values).copy_from_slice(&bytes);
            return Some(Self::from(values));
        }
        Some(Self { bytes, of: PhantomData })
    }

    pub fn bytes(&self) -> Bytes {
        self.bytes.clone()
    }
}

impl<T: Pod + Send + Sync> From<Vec<T>> for Shared<T> {
    fn from(values: Vec<T>) -> Self {
        Self { bytes: Bytes::from_owner(Owner(values)), of: PhantomData }
    }
}

impl<T: Pod> Deref for Shared<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.bytes)
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self { bytes: self.bytes.clone(), of: PhantomData }
    }
}

impl<T> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({} bytes)", self.bytes.len())
    }
}

struct Owner<T>(Vec<T>);

impl<T: Pod> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_is_shared_without_a_copy_and_read_back_in_place() {
        let values = vec![1.0f32, 2.0];
        let address = values.as_ptr();
        let shared = Shared::from(values);
        let received = Shared::<f32>::from_bytes(shared.bytes()).unwrap();
        assert_eq!((received.as_ptr(), &received[..]), (address, &[1.0, 2.0][..]));
    }

    #[test]
    fn bytes_at_any_alignment_are_read_and_a_torn_number_is_not() {
        let mut message = vec![0u8; 3];
        message.extend_from_slice(bytemuck::cast_slice(&[3.0f32, 4.0]));
        let message = Bytes::from(message);
        for start in 0..4 {
            let values = Shared::<f32>::from_bytes(message.slice(start..start + 8)).unwrap();
            assert_eq!(values[0].to_le_bytes()[..], message[start..start + 4]);
        }
        assert!(Shared::<f32>::from_bytes(message.slice(0..7)).is_none());
        assert!(Shared::<f32>::from_bytes(message.slice(1..1)).unwrap().is_empty());
    }
}
