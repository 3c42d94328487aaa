//! The GPU's part of a channel: a stream, and buffers on both sides.
//!
//! By calls to the driver and not by cudarc's safe types: those wait for what runs on the GPU where a context gets its
//! first stream, and where pinned memory is read or dropped. Here, a kernel may run until it is aborted.

use std::ops::Range;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUcontext, CUdevice, CUdeviceptr, CUresult, CUstream};
use cudarc::driver::{DriverError, result, sys};

use super::poll;
use crate::error::Error;
use crate::memory::{DeviceSlice, DeviceSliceMut, Event, Stream};
use crate::rest::rest;
use crate::shared::State;

/// The smallest buffer.
const SMALLEST: usize = 64 << 10;

/// GPU `ordinal`. Nothing else here calls cudarc before this has answered: it panics where there is no driver.
pub(super) fn device(ordinal: usize) -> Result<CUdevice, Error> {
    // SAFETY: opens NVIDIA's library, and closes it.
    if !unsafe { sys::is_culib_present() } {
        return Err(failed(
            "looking for NVIDIA's driver",
            "libcuda.so is not found: install it, or give the container its GPUs (--gpus all)".into(),
        ));
    }
    result::init().map_err(driver("starting NVIDIA's driver"))?;
    let count = result::device::get_count().map_err(driver("counting GPUs"))?;
    match i32::try_from(ordinal) {
        Ok(number) if number < count => result::device::get(number).map_err(driver("finding the GPU")),
        _ => Err(failed("finding the GPU", format!("there is no GPU {ordinal}: the driver sees {count}"))),
    }
}

/// The primary context of GPU `ordinal`, current on this thread. It is kept to the end of the process: NCCL does so
/// too, and what is left behind needs it.
pub(super) fn open(ordinal: usize) -> Result<CUcontext, Error> {
    let device = device(ordinal)?;
    // SAFETY: the device is one, and the context is not given back.
    let opened = unsafe {
        result::primary_ctx::retain(device).and_then(|context| result::ctx::set_current(context).map(|()| context))
    };
    opened.map_err(driver("opening the GPU"))
}

fn failed(what: &'static str, detail: String) -> Error {
    Error::Gpu { what, detail }
}

fn driver(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        failed(what, text.unwrap_or_else(|_| format!("{:?}", error.0)))
    }
}

/// Without a destructor: dropping it leaves all of it behind.
pub(super) struct Gpu {
    context: CUcontext,
    stream: CUstream,
    /// The last one is in use. The others are too small, and stay.
    buffers: Vec<Buffer>,
}

/// Pinned memory, and as much of the GPU's.
struct Buffer {
    host: *mut u8,
    device: CUdeviceptr,
    bytes: usize,
}

// SAFETY: the driver's handles and the memory may be used on any thread, with the context current where it has to be.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Those of channels that have ended, with their contexts. None is freed: that waits for all that runs on the GPU, where other
    /// channels' receives may wait for messages.
    fn spare() -> MutexGuard<'static, Vec<(usize, Self)>> {
        static SPARE: Mutex<Vec<(usize, Buffer)>> = Mutex::new(Vec::new());
        SPARE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of just so many bytes: there are few sizes.
    fn take_spare(context: CUcontext, bytes: usize) -> Option<Self> {
        let mut spare = Self::spare();
        let at = spare.iter().position(|(place, buffer)| (*place, buffer.bytes) == (context as usize, bytes))?;
        Some(spare.swap_remove(at).1)
    }
}

impl Gpu {
    /// `context` is one that `open` made.
    pub fn new(context: CUcontext) -> Result<Self, Error> {
        let mut gpu = Self { context, stream: null_mut(), buffers: Vec::new() };
        // Messages go before what computes, where both would begin.
        gpu.stream = gpu.with("making a stream", || {
            let (_, highest) = result::stream::get_priority_range()?;
            result::stream::create_with_priority(result::stream::StreamKind::NonBlocking, highest)
        })?;
        Ok(gpu)
    }

    /// For tests that do not get to it.
    #[cfg(test)]
    pub fn nowhere() -> Self {
        Self { context: null_mut(), stream: null_mut(), buffers: Vec::new() }
    }

    /// Does something with the context current.
    fn with<T>(&self, what: &'static str, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T, Error> {
        // SAFETY: the context is kept to the end of the process.
        unsafe { result::ctx::set_current(self.context) }.and_then(|()| call()).map_err(driver(what))
    }

    /// Alive as long as this.
    pub fn stream(&self) -> Stream<'_> {
        // SAFETY: the stream is destroyed in `release` alone, which nobody calls while this is borrowed.
        unsafe { Stream::from_raw(self.stream) }
    }

    /// Sees to a buffer of so many bytes, and answers its place on the GPU.
    pub fn room(&mut self, bytes: usize) -> Result<CUdeviceptr, Error> {
        if let Some(buffer) = self.buffers.last().filter(|buffer| buffer.bytes >= bytes) {
            return Ok(buffer.device);
        }
        // Checked to be no longer than a slice, so that there is a next power of two.
        let bytes = bytes.next_power_of_two().max(SMALLEST);
        if let Some(buffer) = Buffer::take_spare(self.context, bytes) {
            self.buffers.push(buffer);
            return Ok(self.buffer(bytes).device);
        }
        // SAFETY: asks for memory, which is written before it is read.
        let device = self.with("taking memory on the GPU", || unsafe { result::malloc_sync(bytes) })?;
        // SAFETY: as above.
        let host = self.with("taking pinned memory", || unsafe { result::malloc_host(bytes, 0) });
        let host = host.inspect_err(|_| {
            // SAFETY: nobody has used it.
            let _ = self.with("giving memory back", || unsafe { result::free_sync(device) });
        });
        self.buffers.push(Buffer { host: host?.cast(), device, bytes });
        Ok(device)
    }

    /// The buffer in use, where it has room for so many bytes.
    fn buffer(&self, bytes: usize) -> &Buffer {
        let buffer = self.buffers.last().filter(|buffer| buffer.bytes >= bytes);
        buffer.expect("room was seen to")
    }

    /// Puts `bytes` into the buffer, from byte `at` on, and queues the copy to the GPU.
    ///
    /// # Safety
    ///
    /// The stream is through, but for other bytes of the buffer, and nobody writes to these until it is so again.
    pub unsafe fn queue_write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Error> {
        let Buffer { host, device, .. } = *self.buffer(at + bytes.len());
        // SAFETY: there is as much room on both sides, which nobody uses; pinned memory and a slice do not overlap.
        self.with("copying to the GPU", || unsafe {
            let host = host.add(at);
            host.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            sys::cuMemcpyHtoDAsync_v2(device + at as u64, host.cast(), bytes.len(), self.stream).result()
        })
    }

    /// Has what is queued from now on wait for the event.
    pub fn queue_wait(&mut self, event: Event<'_>) -> Result<(), Error> {
        // SAFETY: both are alive, and of this context.
        self.with("waiting on the GPU", || unsafe {
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.stream, event.raw, flags)
        })
    }

    /// Queues a copy into the GPU's side of the buffer, from byte `at` on.
    ///
    /// # Safety
    ///
    /// That of `queue_write`.
    pub unsafe fn queue_copy_in(&mut self, at: usize, from: DeviceSlice<'_, u8>) -> Result<(), Error> {
        let Buffer { device, .. } = *self.buffer(at + from.len);
        // SAFETY: there is as much room, which nobody uses; what is copied is memory of the caller's.
        self.with("copying on the GPU", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(device + at as u64, from.address, from.len, self.stream).result()
        })
    }

    /// Queues a copy from the GPU's side of the buffer, from byte `at` on.
    ///
    /// # Safety
    ///
    /// What is queued before it writes as many bytes to the GPU's side.
    pub unsafe fn queue_copy_out(&mut self, at: usize, to: DeviceSliceMut<'_, u8>) -> Result<(), Error> {
        let Buffer { device, .. } = *self.buffer(at + to.len);
        // SAFETY: there is as much; it is copied to memory of the caller's.
        self.with("copying on the GPU", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(to.address, device + at as u64, to.len, self.stream).result()
        })
    }

    /// Queues the copy of bytes from the GPU into the buffer.
    ///
    /// # Safety
    ///
    /// What is queued before it writes as many to the GPU's side, and nobody uses the host's until the stream is
    /// through.
    pub unsafe fn queue_read(&mut self, bytes: Range<usize>) -> Result<(), Error> {
        let Buffer { host, device, .. } = *self.buffer(bytes.end);
        // SAFETY: there is as much room on both sides, which nobody uses.
        self.with("copying from the GPU", || unsafe {
            let (to, from) = (host.add(bytes.start), device + bytes.start as u64);
            sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes.len(), self.stream).result()
        })
    }

    /// Copies from the buffer, from byte `at` on.
    ///
    /// # Safety
    ///
    /// The bytes were read from the GPU, and the stream is through.
    pub unsafe fn take(&self, at: usize, bytes: &mut [u8]) {
        let from = self.buffer(at + bytes.len()).host;
        // SAFETY: the bytes are there, says the caller; pinned memory and a slice do not overlap.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(from.add(at), bytes.len()) }
    }

    /// Whether the stream has nothing more to do. An error where something on it has failed.
    pub fn is_through(&self) -> Result<bool, Error> {
        // SAFETY: the stream is alive.
        self.with("working on the GPU", || match unsafe { sys::cuStreamQuery(self.stream) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true),
        })
    }

    /// Whether the GPU has come by the event.
    pub fn is_past(&self, event: Event<'_>) -> Result<bool, Error> {
        // SAFETY: the event is alive.
        self.with("asking for an event", || match unsafe { sys::cuEventQuery(event.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true),
        })
    }

    /// Gives the buffers to the channels to come, once the stream is through. What is not through in time, or cannot be asked, is
    /// left behind. The communicator is aborted.
    pub fn release(self, timeout: Duration) {
        let start = Instant::now();
        if poll(|| self.is_through(), || State::Ready, Some(timeout), || start.elapsed(), rest) != Ok(true) {
            return;
        }
        // SAFETY: nobody can queue anything more. Where it fails, the context is lost.
        let _ = self.with("ending a stream", || unsafe { result::stream::destroy(self.stream) });
        let place = self.context as usize;
        Buffer::spare().extend(self.buffers.into_iter().map(|buffer| (place, buffer)));
    }
}
