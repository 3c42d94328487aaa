//! What is asked of a GPU, and its memory.
//!
//! All of the memory that a worker may use is one arena, taken at start; buffers are parts of it and go back to it when they are
//! dropped. Work is queued and done in the order in which it was queued; nothing but [`Device::finish`] waits for it, and
//! [`Mark::wait`](super::mark::Mark::wait) for a part.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;

use super::late::Late;
use super::pinned::{Pinned, Staging};

/// Of a byte in a GPU's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address(pub u64);

#[derive(Clone, Debug, thiserror::Error)]
pub enum GpuError {
    #[error("{what}: {reason}")]
    Failed { what: &'static str, reason: String },
    #[error("{asked} bytes are asked of the GPU's arena of {arena}, of which {free} are free ({largest} in one piece)")]
    Full { asked: usize, arena: usize, free: usize, largest: usize },
}

impl GpuError {
    /// Nothing where the arena has no room for it, which somebody else may have.
    pub fn if_room<T>(result: Result<T, Self>) -> Result<Option<T>, Self> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Self::Full { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Properties {
    pub name: String,
    /// "sm_90a": what its kernels are compiled for.
    pub architecture: &'static str,
    pub multiprocessors: u32,
    /// Bytes of memory that nobody uses.
    pub memory_free: usize,
}

/// A kernel and the blocks that it runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kernel {
    pub name: &'static str,
    /// Of a block.
    pub threads: u32,
    /// Blocks that a multiprocessor holds at a time.
    pub blocks_each: u32,
}

impl Kernel {
    /// Dynamic shared memory of a block, where one can have `most`: all of it, or an even part less a kilobyte, which the
    /// driver takes of each block.
    pub fn shared_bytes(&self, most: usize) -> usize {
        if self.blocks_each == 1 { most } else { most / self.blocks_each as usize - 1024 }
    }
}

/// A kernel on so many blocks, and its argument.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Launch {
    pub kernel: Kernel,
    pub blocks: u32,
    pub call: Vec<u8>,
}

/// A GPU with one queue, or what tests put in its place. `Device` is the safe way to it.
///
/// # Safety
///
/// Addresses have to be of memory that [`Gpu::allocate`] gave, and what they point to may not be used otherwise before the
/// queue is through with it. `call` is the kernel's argument, byte for byte, with addresses that hold what the kernel expects.
/// Host memory that is queued has to stay until [`Gpu::finish`].
#[allow(clippy::missing_safety_doc, reason = "one contract for all")]
pub unsafe trait Gpu: Send + Sync + fmt::Debug {
    fn properties(&self) -> &Properties;
    /// Aligned to 256 bytes; lasts as long as the GPU.
    fn allocate(&self, bytes: usize) -> Result<Address, GpuError>;
    /// Zeroed host memory that the GPU reads and writes at full speed.
    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, GpuError>;
    /// What `allocate_host` gave for so many bytes, after `finish`.
    unsafe fn free_host(&self, at: *mut u8, bytes: usize);
    /// Is done when it returns, whatever is queued.
    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<(), GpuError>;
    /// The same: of memory that nothing queued writes to.
    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<(), GpuError>;
    unsafe fn queue_write(&self, to: Address, from: &[u8]) -> Result<(), GpuError>;
    unsafe fn queue_read(&self, from: Address, to: &mut [u8]) -> Result<(), GpuError>;
    unsafe fn queue_fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), GpuError>;
    unsafe fn queue_launch(&self, kernel: Kernel, blocks: u32, call: &[u8]) -> Result<(), GpuError>;
    /// Keeps launches that follow each other, and says by which number they are queued at once.
    fn record(&self, launches: &[Launch]) -> Result<u64, GpuError>;
    unsafe fn queue_recording(&self, number: u64) -> Result<(), GpuError>;
    fn forget_recording(&self, number: u64);
    unsafe fn queue_copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), GpuError>;
    /// z = x yᵀ of bf16 [n, n], by the vendor's library.
    unsafe fn queue_vendor_product(&self, n: usize, x: Address, y: Address, z: Address) -> Result<(), GpuError>;
    fn finish(&self) -> Result<(), GpuError>;
    /// The end of what is queued, by a number: the driver's event.
    fn mark(&self) -> Result<u64, GpuError>;
    /// Whether the GPU has come by a mark.
    unsafe fn is_past(&self, mark: u64) -> Result<bool, GpuError>;
    /// Returns once it has.
    unsafe fn wait_for(&self, mark: u64) -> Result<(), GpuError>;
    unsafe fn forget_mark(&self, mark: u64);
}

/// A GPU with its arena.
#[derive(Clone, Debug)]
pub struct Device {
    gpu: Arc<dyn Gpu>,
    arena: Arc<Arena>,
    pinned: Arc<Pinned>,
    /// Of the GPU, in quarters of multiprocessors.
    pub(super) lent: Arc<AtomicU32>,
    /// What was dropped while it may still be written to.
    pub(super) late: Arc<Late>,
    /// Where launches are kept instead of being queued.
    kept: Option<Arc<Mutex<Vec<Launch>>>>,
}

impl Device {
    /// Takes the arena from the GPU.
    pub fn new(gpu: Arc<dyn Gpu>, arena_bytes: usize) -> Result<Self, GpuError> {
        let arena_bytes = arena_bytes / ALIGNMENT * ALIGNMENT;
        let start = gpu.allocate(arena_bytes)?;
        let arena = Arena { start, bytes: arena_bytes, free: Mutex::new(Free::of(arena_bytes)) };
        let pinned = Pinned::new(gpu.clone());
        Ok(Self { arena: Arc::new(arena), pinned, gpu, lent: Arc::default(), late: Arc::default(), kept: None })
    }

    /// The same GPU and queue with another arena.
    pub fn with_arena(&self, bytes: usize) -> Result<Self, GpuError> {
        Ok(Self { lent: self.lent.clone(), ..Self::new(self.gpu.clone(), bytes)? })
    }

    pub fn properties(&self) -> &Properties {
        self.gpu.properties()
    }

    pub(super) fn gpu(&self) -> &Arc<dyn Gpu> {
        &self.gpu
    }

    /// The same, but launches go to `kept` instead of the queue.
    pub(super) fn keeping(&self, kept: Arc<Mutex<Vec<Launch>>>) -> Self {
        Self { kept: Some(kept), ..self.clone() }
    }

    /// Peers compare this: equal names, equal bits. Matrix units of different generations round sums differently.
    pub fn numerics(&self) -> String {
        format!("bf16-{}", self.properties().architecture)
    }

    /// Bytes of the arena, and those of them that nobody holds.
    pub fn memory(&self) -> (usize, usize) {
        (self.arena.bytes, self.arena.free().total + self.late.bytes())
    }

    /// `len` values that say nothing yet, where there is room for them.
    pub(super) fn take<T: Pod>(&self, len: usize) -> Result<Buffer<T>, GpuError> {
        let bytes = (len * size_of::<T>()).next_multiple_of(ALIGNMENT);
        let at = self.arena.take(bytes)?;
        Ok(Buffer { arena: self.arena.clone(), at, bytes, len, values: PhantomData })
    }

    /// A buffer of these values; they are there when this returns.
    pub fn buffer_of<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>, GpuError> {
        let buffer = self.buffer(values.len())?;
        self.write(&buffer, 0, values)?;
        Ok(buffer)
    }

    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>, GpuError> {
        let buffer = self.buffer(len)?;
        // SAFETY: the buffer is new, and so large.
        unsafe { self.gpu.queue_fill(buffer.address(), 0, len * size_of::<T>())? };
        Ok(buffer)
    }

    /// Host memory for what goes to the GPU or comes from it.
    pub(super) fn staging(&self, bytes: usize) -> Result<Staging, GpuError> {
        self.pinned.staging(bytes.max(1))
    }

    /// Queues a copy of the first `bytes` bytes.
    ///
    /// # Safety
    ///
    /// The staging memory may not be written to before `finish`.
    pub(super) unsafe fn queue_write(&self, to: &Buffer<u8>, from: &Staging, bytes: usize) -> Result<(), GpuError> {
        assert!(bytes <= to.len, "{bytes} bytes into a buffer of {}", to.len);
        // SAFETY: the buffer is this device's and large enough; the rest is the caller's promise.
        unsafe { self.gpu.queue_write(to.address(), &from.bytes()[..bytes]) }
    }

    /// Writes to a buffer from value `first` on, now.
    pub fn write<T: Pod>(&self, to: &Buffer<T>, first: usize, values: &[T]) -> Result<(), GpuError> {
        let at = to.view().from(first).of_len(values.len());
        // SAFETY: the buffer is this device's and large enough.
        unsafe { self.gpu.write(Address(at), bytemuck::cast_slice(values)) }
    }

    /// Reads the first values of a buffer that nothing queued writes to, now.
    pub fn read<T: Pod>(&self, from: View<'_, T>, to: &mut [T]) -> Result<(), GpuError> {
        // SAFETY: the view is as large.
        unsafe { self.gpu.read(Address(from.of_len(to.len())), bytemuck::cast_slice_mut(to)) }
    }

    /// Room for `len` values that come from the GPU.
    pub fn returned<T: Pod>(&self, len: usize) -> Result<Returned<T>, GpuError> {
        Ok(Returned { staging: self.staging(len * size_of::<T>())?, len, values: PhantomData })
    }

    /// Queues a copy of the first `len` values.
    pub fn queue_return<T: Pod>(&self, from: View<'_, T>, to: &mut Returned<T>, len: usize) -> Result<(), GpuError> {
        assert!(len <= to.len, "{len} values into room for {}", to.len);
        let (at, bytes) = (Address(from.of_len(len)), len * size_of::<T>());
        // SAFETY: both are large enough; `Returned::values` is read afterwards only, it says.
        unsafe { self.gpu.queue_read(at, &mut to.staging.bytes_mut()[..bytes]) }
    }

    /// Queues a kernel on as many blocks as the GPU holds at a time, beside what is lent.
    ///
    /// # Safety
    ///
    /// `call` is the kernel's argument, and every address in it holds what the kernel expects until the queue is through.
    pub(crate) unsafe fn queue_launch<C: Pod>(&self, kernel: Kernel, call: &C) -> Result<(), GpuError> {
        let blocks = self.own_multiprocessors() * kernel.blocks_each;
        let call = bytemuck::bytes_of(call);
        if let Some(kept) = &self.kept {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(Launch { kernel, blocks, call: call.to_vec() });
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.gpu.queue_launch(kernel, blocks, call) }
    }

    /// Queues a copy that fills one buffer from the start of another.
    pub fn queue_copy<T, U>(&self, to: &Buffer<T>, from: &Buffer<U>) -> Result<(), GpuError> {
        let bytes = to.len * size_of::<T>();
        assert!(bytes <= from.len * size_of::<U>(), "a copy of more than a buffer has");
        // SAFETY: both are at least of this size.
        unsafe { self.gpu.queue_copy(to.address(), from.address(), bytes) }
    }

    /// Queues z = x yᵀ of bf16 [n, n], as the vendor's library computes it.
    pub(super) fn queue_vendor_product(
        &self,
        n: usize,
        x: &Buffer<u16>,
        y: &Buffer<u16>,
        z: &Buffer<u16>,
    ) -> Result<(), GpuError> {
        assert!([x, y, z].iter().all(|m| m.len == n * n), "matrices that are not [{n}, {n}]");
        // SAFETY: all are so large.
        unsafe { self.gpu.queue_vendor_product(n, x.address(), y.address(), z.address()) }
    }

    /// Waits for everything that is queued.
    pub fn finish(&self) -> Result<(), GpuError> {
        self.gpu.finish()
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Properties { name, architecture, multiprocessors, memory_free } = self.properties();
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        write!(f, "{name} ({architecture}, {multiprocessors} multiprocessors), ")?;
        write!(f, "an arena of {:.1} GiB of {:.1} GiB that were free", gib(self.arena.bytes), gib(*memory_free))
    }
}

/// `len` values in a GPU's memory.
pub struct Buffer<T> {
    arena: Arc<Arena>,
    at: usize,
    bytes: usize,
    len: usize,
    values: PhantomData<T>,
}

/// Values in a GPU's memory, of a buffer that lives. What is queued with a view is done before the memory of its buffer is
/// used for something else that is queued.
#[derive(Debug)]
pub struct View<'a, T> {
    at: u64,
    len: usize,
    buffer: PhantomData<&'a T>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<'a, T> View<'a, T> {
    /// For a kernel that takes at least `len` values.
    pub(crate) fn of_len(self, len: usize) -> u64 {
        assert!(self.len >= len, "{} values where a kernel takes {len}", self.len);
        self.at
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn bytes(self) -> View<'a, u8> {
        View { at: self.at, len: self.len * size_of::<T>(), buffer: PhantomData }
    }

    /// The first `len` values.
    pub fn first(self, len: usize) -> View<'a, T> {
        View { at: self.of_len(len), len, buffer: PhantomData }
    }

    /// From value `first` on.
    pub fn from(self, first: usize) -> View<'a, T> {
        assert!(first <= self.len, "value {first} of {}", self.len);
        View { at: self.at + (first * size_of::<T>()) as u64, len: self.len - first, buffer: PhantomData }
    }
}

impl<T> Buffer<T> {
    pub fn address(&self) -> Address {
        Address(self.arena.start.0 + self.at as u64)
    }

    pub fn view(&self) -> View<'_, T> {
        View { at: self.address().0, len: self.len, buffer: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.arena.free().give_back(self.at, self.bytes);
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} x {} bytes)", self.len, size_of::<T>())
    }
}

/// What goes to the GPU in one piece: pinned memory, and as much of the GPU's.
#[derive(Debug)]
pub struct Parcel {
    staging: Staging,
    buffer: Buffer<u8>,
    len: usize,
}

/// Parts of a parcel begin at multiples of this.
const PART_ALIGNMENT: usize = 16;

impl Parcel {
    pub fn new(device: &Device, bytes: usize) -> Result<Self, GpuError> {
        Ok(Self { staging: device.staging(bytes)?, buffer: device.buffer(bytes)?, len: 0 })
    }

    /// The one that is kept, empty, or a new one where that has no room for `bytes`; the old one goes first.
    pub fn at_least(kept: Option<Self>, device: &Device, bytes: usize) -> Result<Self, GpuError> {
        let mut parcel = match kept.filter(|kept| kept.buffer.len >= bytes) {
            Some(kept) => kept,
            None => Self::new(device, bytes.next_power_of_two())?,
        };
        parcel.open();
        Ok(parcel)
    }

    /// The same where it is kept.
    pub fn in_place<'k>(kept: &'k mut Option<Self>, device: &Device, bytes: usize) -> Result<&'k mut Self, GpuError> {
        let parcel = Self::at_least(kept.take(), device, bytes)?;
        Ok(kept.insert(parcel))
    }

    /// Bytes that parts of these sizes take.
    pub fn room(parts: &[usize]) -> usize {
        parts.iter().map(|part| part.next_multiple_of(PART_ALIGNMENT)).sum()
    }

    /// Empties it. What was sent before has to be through: `finish` was called since, or a later mark waited for.
    pub fn open(&mut self) {
        self.len = 0;
    }

    /// Where the values will be, once [`Parcel::send`] is called. The place is a number: views of what is in it can only be
    /// had once all is.
    pub fn put<T: Pod>(&mut self, values: &[T]) -> Part<T> {
        let (start, bytes) = (self.len, size_of_val(values));
        self.staging.bytes_mut()[start..start + bytes].copy_from_slice(bytemuck::cast_slice(values));
        self.len = (start + bytes).next_multiple_of(PART_ALIGNMENT);
        Part { start, len: values.len(), values: PhantomData }
    }

    /// The same for at most `room` values; zeros are behind them.
    pub fn put_in<T: Pod>(&mut self, room: usize, values: impl Iterator<Item = T>) -> Part<T> {
        let mut padded: Vec<T> = values.collect();
        assert!(padded.len() <= room, "{} values in room for {room}", padded.len());
        padded.resize(room, T::zeroed());
        self.put(&padded)
    }

    pub fn put_all<T: Pod>(&mut self, values: impl Iterator<Item = T>) -> Part<T> {
        self.put(&values.collect::<Vec<T>>())
    }

    /// Queues the copy.
    pub fn send(&self, device: &Device) -> Result<(), GpuError> {
        // SAFETY: the staging memory is written to afterwards only, says `open`.
        unsafe { device.queue_write(&self.buffer, &self.staging, self.len.min(self.buffer.len)) }
    }

    pub fn view<T>(&self, part: Part<T>) -> View<'_, T> {
        View { at: self.buffer.address().0 + part.start as u64, len: part.len, buffer: PhantomData }
    }
}

/// A place in a parcel.
#[derive(Debug)]
pub struct Part<T> {
    start: usize,
    len: usize,
    values: PhantomData<T>,
}

impl<T> Clone for Part<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Part<T> {}

/// Pinned memory for values that come from the GPU.
#[derive(Debug)]
pub struct Returned<T> {
    staging: Staging,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Pod> Returned<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What has come, once [`Device::finish`] was called since it was asked for, or a later mark waited for.
    pub fn values(&self) -> &[T] {
        &bytemuck::cast_slice(self.staging.bytes())[..self.len]
    }
}

/// Buffers begin at multiples of this: whole lines of the second-level cache.
const ALIGNMENT: usize = 256;

#[derive(Debug)]
struct Arena {
    start: Address,
    bytes: usize,
    free: Mutex<Free>,
}

impl Arena {
    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: usize) -> Result<usize, GpuError> {
        let mut free = self.free();
        free.take(bytes).ok_or(GpuError::Full {
            asked: bytes,
            arena: self.bytes,
            free: free.total,
            largest: free.largest(),
        })
    }
}

/// Free pieces, neighbours joined.
#[derive(Debug)]
struct Free {
    /// By where they begin.
    pieces: BTreeMap<usize, usize>,
    total: usize,
}

impl Free {
    fn of(bytes: usize) -> Self {
        Self { pieces: BTreeMap::from([(0, bytes)]), total: bytes }
    }

    /// The smallest piece that is large enough, cut: an epoch's experts are of one size and fill each other's holes.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        if bytes == 0 {
            return Some(0);
        }
        let fit = self.pieces.iter().filter(|(_, len)| **len >= bytes).min_by_key(|(_, len)| **len);
        let (at, len) = fit.map(|(at, len)| (*at, *len))?;
        self.pieces.remove(&at);
        if len > bytes {
            self.pieces.insert(at + bytes, len - bytes);
        }
        self.total -= bytes;
        Some(at)
    }

    fn give_back(&mut self, mut at: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.total += bytes;
        let mut len = bytes;
        if let Some(after) = self.pieces.remove(&(at + len)) {
            len += after;
        }
        if let Some((before, before_len)) = self.pieces.range(..at).next_back().map(|(at, len)| (*at, *len))
            && before + before_len == at
        {
            (at, len) = (before, before_len + len);
        }
        self.pieces.insert(at, len);
    }

    fn largest(&self) -> usize {
        self.pieces.values().copied().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is taken overlaps nothing that is taken, and when all is back it is one piece again.
        #[test]
        fn pieces_are_nobody_elses_and_come_together_again(steps in prop::collection::vec((any::<bool>(), 1..40usize), 0..200)) {
            let mut free = Free::of(1000);
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for (takes, n) in steps {
                if takes {
                    let has_room = free.largest() >= n;
                    let Some(at) = free.take(n) else {
                        prop_assert!(!has_room);
                        continue;
                    };
                    prop_assert!(at + n <= 1000);
                    prop_assert!(taken.iter().all(|(other, len)| at + n <= *other || other + len <= at));
                    taken.push((at, n));
                } else if !taken.is_empty() {
                    let (at, len) = taken.swap_remove(n % taken.len());
                    free.give_back(at, len);
                }
                prop_assert_eq!(free.total, 1000 - taken.iter().map(|(_, len)| len).sum::<usize>());
            }
            for (at, len) in taken {
                free.give_back(at, len);
            }
            prop_assert_eq!(&free.pieces, &BTreeMap::from([(0, 1000)]));
        }
    }
}
