//! Typed views of device memory, and streams.

use std::ffi::c_int;
use std::marker::PhantomData;

use cudarc::driver::sys::{CUdeviceptr, CUevent, CUstream};
use cudarc::driver::{CudaEvent, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};
use half::{bf16, f16};

/// NCCL's element types, by its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u8)]
pub enum DataType {
    /// `i8`
    I8 = 0,
    /// `u8`
    U8 = 1,
    /// `i32`
    I32 = 2,
    /// `u32`
    U32 = 3,
    /// `i64`
    I64 = 4,
    /// `u64`
    U64 = 5,
    /// `half::f16`
    F16 = 6,
    /// `f32`
    F32 = 7,
    /// `f64`
    F64 = 8,
    /// `half::bf16`
    Bf16 = 9,
    /// [`E4m3`]; sums need compute capability 9.0.
    E4m3 = 10,
    /// [`E5m2`]; sums need compute capability 9.0.
    E5m2 = 11,
}

impl DataType {
    pub(crate) fn code(self) -> c_int {
        self as c_int
    }
}

/// What can be sent.
///
/// # Safety
///
/// The type is as large as `TYPE` says, and any bits of that size are one.
pub unsafe trait Element: Copy + 'static {
    /// NCCL's type.
    const TYPE: DataType;
}

macro_rules! elements {
    ($($type:ty = $name:ident),*) => {
        $(
            // SAFETY: the type is the one that is named.
            unsafe impl Element for $type {
                const TYPE: DataType = DataType::$name;
            }
        )*
    };
}

/// The bits of an 8-bit float with 4 bits of exponent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct E4m3(pub u8);

/// The bits of an 8-bit float with 5 bits of exponent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct E5m2(pub u8);

// SAFETY: bytes, which the driver may copy.
unsafe impl DeviceRepr for E4m3 {}
// SAFETY: as above.
unsafe impl DeviceRepr for E5m2 {}

elements!(i8 = I8, u8 = U8, i32 = I32, u32 = U32, i64 = I64, u64 = U64, f32 = F32, f64 = F64);
elements!(f16 = F16, bf16 = Bf16, E4m3 = E4m3, E5m2 = E5m2);

/// `len` values in a device's memory, to be read.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a, T> {
    pub(crate) address: CUdeviceptr,
    pub(crate) len: usize,
    values: PhantomData<&'a [T]>,
}

/// `len` values in a device's memory, to be written.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    pub(crate) address: CUdeviceptr,
    pub(crate) len: usize,
    values: PhantomData<&'a mut [T]>,
}

impl<'a, T: Element> DeviceSlice<'a, T> {
    /// By its address.
    ///
    /// # Safety
    ///
    /// For as long as `'a`, there are `len` values at `address` in the memory of one device, and nobody frees them.
    pub unsafe fn from_raw(address: CUdeviceptr, len: usize) -> Self {
        Self { address, len, values: PhantomData }
    }

    /// Memory of cudarc's (`CudaSlice`, `CudaView`), whose earlier writes `stream` waits for. To be given to an
    /// operation on this stream; the guard is to be dropped once that is queued, and makes later writes wait for it.
    pub fn new(memory: &'a impl DevicePtr<T>, stream: &'a CudaStream) -> (Self, SyncOnDrop<'a>) {
        let (address, guard) = memory.device_ptr(stream);
        (Self { address, len: memory.len(), values: PhantomData }, guard)
    }

    /// In values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<'a, T: Element> DeviceSliceMut<'a, T> {
    /// By its address.
    ///
    /// # Safety
    ///
    /// For as long as `'a`, there is room for `len` values at `address` in the memory of one device, nobody frees it,
    /// and there is no other view of it.
    pub unsafe fn from_raw(address: CUdeviceptr, len: usize) -> Self {
        Self { address, len, values: PhantomData }
    }

    /// Memory of cudarc's (`CudaSlice`, `CudaViewMut`), whose earlier uses `stream` waits for. To be given to an
    /// operation on this stream; the guard is to be dropped once that is queued, and makes later uses wait for it.
    pub fn new(memory: &'a mut impl DevicePtrMut<T>, stream: &'a CudaStream) -> (Self, SyncOnDrop<'a>) {
        let len = memory.len();
        let (address, guard) = memory.device_ptr_mut(stream);
        (Self { address, len, values: PhantomData }, guard)
    }

    /// In values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A queue of a device's work.
#[derive(Clone, Copy, Debug)]
pub struct Stream<'a> {
    pub(crate) raw: CUstream,
    alive: PhantomData<&'a CudaStream>,
}

impl Stream<'_> {
    /// By the driver's handle.
    ///
    /// # Safety
    ///
    /// The stream exists for as long as the lifetime that is chosen here.
    pub unsafe fn from_raw(raw: CUstream) -> Self {
        Self { raw, alive: PhantomData }
    }
}

impl<'a> From<&'a CudaStream> for Stream<'a> {
    fn from(stream: &'a CudaStream) -> Self {
        Self { raw: stream.cu_stream(), alive: PhantomData }
    }
}

/// A place in a stream, recorded there before it is given to anybody.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    pub(crate) raw: CUevent,
    alive: PhantomData<&'a CudaEvent>,
}

impl Event<'_> {
    /// By the driver's handle.
    ///
    /// # Safety
    ///
    /// The event exists for as long as the lifetime that is chosen here, and is of the context of whoever is to wait for it.
    pub unsafe fn from_raw(raw: CUevent) -> Self {
        Self { raw, alive: PhantomData }
    }
}

impl<'a> From<&'a CudaEvent> for Event<'a> {
    fn from(event: &'a CudaEvent) -> Self {
        Self { raw: event.cu_event(), alive: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use cudarc::nccl::sys::ncclDataType_t;

    use super::*;

    #[test]
    fn numbers_are_nccls_and_sizes_the_types() {
        fn check<T: Element>(theirs: ncclDataType_t, bytes: usize) {
            assert_eq!((T::TYPE.code(), size_of::<T>()), (theirs as c_int, bytes), "{:?}", T::TYPE);
        }
        check::<i8>(ncclDataType_t::ncclInt8, 1);
        check::<u8>(ncclDataType_t::ncclUint8, 1);
        check::<i32>(ncclDataType_t::ncclInt32, 4);
        check::<u32>(ncclDataType_t::ncclUint32, 4);
        check::<i64>(ncclDataType_t::ncclInt64, 8);
        check::<u64>(ncclDataType_t::ncclUint64, 8);
        check::<f16>(ncclDataType_t::ncclFloat16, 2);
        check::<f32>(ncclDataType_t::ncclFloat32, 4);
        check::<f64>(ncclDataType_t::ncclFloat64, 8);
        check::<bf16>(ncclDataType_t::ncclBfloat16, 2);
        check::<E4m3>(ncclDataType_t::ncclFloat8e4m3, 1);
        check::<E5m2>(ncclDataType_t::ncclFloat8e5m2, 1);
    }
}
