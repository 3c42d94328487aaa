//! Bytes in a GPU's memory that several hold, and rows that are taken out of such or added up from them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::gpu::{Address, Buffer, Device, GpuError, Kernel, Parcel, View};
use super::mark::Mark;

/// Bytes in a GPU's memory. Clones and slices share them; the memory is given back with the last one.
///
/// They are there from the beginning, or once the GPU has come by their mark, and nobody writes to them later. Whoever queues
/// work on them keeps them until that is through.
#[derive(Clone)]
pub struct GpuBytes {
    held: Arc<Held>,
    start: usize,
    len: usize,
}

struct Held {
    device: Device,
    /// Until this is dropped.
    buffer: Option<Buffer<u8>>,
    /// Behind what writes them.
    written: Option<Mark>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let (Some(mark), Some(buffer)) = (self.written.take(), self.buffer.take()) {
            // Others would write to the memory at once, on other streams.
            self.device.late.keep(mark, buffer);
        }
    }
}

impl Held {
    fn wait(&self) -> Result<(), GpuError> {
        self.written.as_ref().map_or(Ok(()), Mark::wait)
    }

    fn buffer(&self) -> &Buffer<u8> {
        self.buffer.as_ref().expect("it is there until this is dropped")
    }
}

impl GpuBytes {
    /// All of a buffer that the queue, and whoever else has written to it, is through with.
    pub fn new(device: &Device, buffer: Buffer<u8>) -> Self {
        Self::of_buffer(device, buffer, None)
    }

    /// All of a buffer that what is queued by now writes to, and nothing later.
    pub fn queued(device: &Device, buffer: Buffer<u8>) -> Result<Self, GpuError> {
        Ok(Self::of_buffer(device, buffer, Some(device.mark()?)))
    }

    fn of_buffer(device: &Device, buffer: Buffer<u8>, written: Option<Mark>) -> Self {
        let len = buffer.len();
        let held = Held { device: device.clone(), buffer: Some(buffer), written };
        Self { start: 0, len, held: Arc::new(held) }
    }

    /// A copy of what is in the processor's memory; it is there when this returns.
    pub fn of(device: &Device, bytes: &[u8]) -> Result<Self, GpuError> {
        Ok(Self::new(device, device.buffer_of(bytes)?))
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn slice(&self, range: Range<usize>) -> Self {
        self.check(&range);
        Self { start: self.start + range.start, len: range.len(), ..self.clone() }
    }

    /// Pieces of these lengths, one after the other.
    pub fn cut(&self, lens: impl Iterator<Item = usize>) -> impl Iterator<Item = Self> {
        lens.scan(0, |end, len| {
            *end += len;
            Some(self.slice(*end - len..*end))
        })
    }

    pub fn address(&self) -> Address {
        Address(self.held.buffer().address().0 + self.start as u64)
    }

    /// What other streams wait for before they read them.
    pub fn written(&self) -> Option<&Mark> {
        self.held.written.as_ref()
    }

    fn check(&self, range: &Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len, "bytes {range:?} of {}", self.len);
    }

    /// A copy in the processor's memory, as soon as they are there. They are a whole number of values.
    pub fn read<T: Pod>(&self) -> Result<Vec<T>, GpuError> {
        assert!(self.len.is_multiple_of(size_of::<T>()), "{} bytes of values of {}", self.len, size_of::<T>());
        let mut values = vec![T::zeroed(); self.len / size_of::<T>()];
        self.held.wait()?;
        self.held.device.read(self.held.buffer().view().from(self.start), bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

impl fmt::Debug for GpuBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GpuBytes({})", self.len)
    }
}

/// Copies rows of `row_bytes` that lie anywhere, one after the other: `rows` are their addresses, of whole words.
pub(super) fn gather(rows: View<'_, u64>, row_bytes: usize, to: View<'_, u8>) -> Gather {
    assert!(row_bytes.is_multiple_of(WORD), "rows of {row_bytes} bytes are no words");
    let count = rows.len();
    Gather {
        rows: rows.of_len(count),
        count: count as u32,
        words: (row_bytes / WORD) as u32,
        to: to.of_len(count * row_bytes),
    }
}

const WORD: usize = size_of::<u32>();

/// Queues a copy of rows of x [.., width], by their numbers, for others. What is sent for it has room in `parcel`, and is read
/// until they are there.
pub fn pick_rows<T: Pod>(
    device: &Device,
    x: View<'_, T>,
    width: usize,
    picks: &[u32],
    parcel: &mut Option<Parcel>,
) -> Result<GpuBytes, GpuError> {
    let row_bytes = width * size_of::<T>();
    let rows = x.len() / width;
    assert!(picks.iter().all(|row| (*row as usize) < rows), "a row that x does not have");
    let (at, to) = (x.of_len(0), device.buffer::<u8>(picks.len() * row_bytes)?);
    let sent = Parcel::in_place(parcel, device, Parcel::room(&[picks.len() * size_of::<u64>()]))?;
    let addresses = sent.put_all(picks.iter().map(|row| at + u64::from(*row) * row_bytes as u64));
    sent.send(device)?;
    // SAFETY: they are rows of x.
    unsafe { device.queue_launch(GATHER, &gather(sent.view(addresses), row_bytes, to.view()))? };
    GpuBytes::queued(device, to)
}

/// What of a row's sum is at `answers[answer]`, row `output` of it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Addend {
    pub answer: usize,
    pub output: usize,
    pub kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Kind {
    /// Added as it is.
    Whole,
    /// The first of a weighted sum that is added as one, and another one of that.
    First(f32),
    Next(f32),
}

/// Queues y [rows, width] = each row's addends, added up in their order: those of row r end before `ends[r]`. `answers` are f32
/// [.., width] each. What is sent for it has room in `parcel`, and is read until the queue is through.
pub fn add_up(
    device: &Device,
    answers: &[GpuBytes],
    addends: &[Addend],
    ends: &[usize],
    width: usize,
    parcel: &mut Option<Parcel>,
    y: View<'_, f32>,
) -> Result<(), GpuError> {
    let row_bytes = width * size_of::<f32>();
    let found = |&Addend { answer, output, kind }: &Addend| {
        let (answer, start) = (&answers[answer], output * row_bytes);
        answer.check(&(start..start + row_bytes));
        let (kind, weight) = match kind {
            Kind::Whole => (0, 0.0),
            Kind::First(weight) => (1, weight),
            Kind::Next(weight) => (2, weight),
        };
        Found { at: answer.address().0 + start as u64, weight, kind }
    };
    assert!(ends.is_sorted() && ends.last().is_none_or(|end| *end == addends.len()), "addends of no row");
    let room = Parcel::room(&[addends.len() * size_of::<Found>(), ends.len() * size_of::<u32>()]);
    let sent = Parcel::in_place(parcel, device, room)?;
    let addends = sent.put_all(addends.iter().map(found));
    let ends_there = sent.put_all(ends.iter().map(|end| *end as u32));
    sent.send(device)?;
    let call = AddUp {
        addends: sent.view(addends).of_len(0),
        ends: sent.view(ends_there).of_len(ends.len()),
        rows: ends.len() as u32,
        width: width as u32,
        y: y.of_len(ends.len() * width),
    };
    // SAFETY: the views are as large as the kernel takes them to be; what is added is there, and stays, says `GpuBytes`.
    unsafe { device.queue_launch(ADD_UP, &call) }
}

/// An addend as the kernel has it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Found {
    at: u64,
    weight: f32,
    kind: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Gather {
    rows: u64,
    count: u32,
    words: u32,
    to: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AddUp {
    addends: u64,
    ends: u64,
    rows: u32,
    width: u32,
    y: u64,
}

pub(super) const GATHER: Kernel = Kernel { name: "gather_rows", threads: 256, blocks_each: 4 };
const ADD_UP: Kernel = Kernel { name: "add_up_rows", threads: 256, blocks_each: 4 };
pub(super) const KERNELS: [Kernel; 2] = [GATHER, ADD_UP];
