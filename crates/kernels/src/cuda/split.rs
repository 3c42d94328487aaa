//! Rows of a micro-batch for those who compute their experts, split on the GPU: the processor need not know what was chosen.

use bytemuck::{Pod, Zeroable};

use super::bytes::GpuBytes;
use super::gpu::{Device, GpuError, Kernel, Parcel, View};
use super::rows::Routed;

/// In place of a taker: nobody has the expert.
pub const NOBODY: u32 = u32::MAX;

/// What each of `takers` gets: a share of [`Split::share_bytes`], which is a table and the first `room` of the rows that have chosen
/// an expert of its own, bf16 [room, width].
#[derive(Clone, Copy, Debug)]
pub struct Split<'a> {
    /// Of each expert, its taker's number.
    pub owners: &'a [u32],
    pub takers: usize,
    /// Rows of a share.
    pub room: usize,
    /// Choices of a row.
    pub top_k: usize,
    /// Values of a row.
    pub width: usize,
}

impl Split<'_> {
    /// More rows than that are not split.
    pub const ROWS_MAX: usize = SPLIT.threads as usize;
    /// Where a table has its choices, behind the number of rows (u32): [rows, top_k] of [`Routed`], ascending by expert.
    pub const CHOICES: usize = 16;

    /// Of a table; rows follow.
    pub fn table_bytes(room: usize, top_k: usize) -> usize {
        (Self::CHOICES + room * top_k * size_of::<Routed>()).next_multiple_of(16)
    }

    pub fn share_bytes(&self) -> usize {
        Self::table_bytes(self.room, self.top_k) + self.room * self.width * size_of::<u16>()
    }
}

/// Queues the shares of x, bf16 [rows, width], one after the other. What is sent for it has room in `parcel`, and is read until they
/// are there.
pub fn split_rows(
    device: &Device,
    rows: usize,
    x: View<'_, u16>,
    choices: View<'_, Routed>,
    split: &Split<'_>,
    parcel: &mut Option<Parcel>,
) -> Result<GpuBytes, GpuError> {
    let Split { owners, takers, room, top_k, width } = *split;
    assert!(rows <= Split::ROWS_MAX && width.is_multiple_of(2), "{rows} rows of {width} are not split");
    let to = device.buffer::<u8>(takers * split.share_bytes())?;
    let sent = Parcel::in_place(parcel, device, Parcel::room(&[size_of_val(owners)]))?;
    let owners = sent.put(owners);
    sent.send(device)?;
    let call = SplitRows {
        x: x.of_len(rows * width),
        choices: choices.of_len(rows * top_k),
        owners: sent.view(owners).of_len(split.owners.len()),
        rows: rows as u32,
        words: (width / 2) as u32,
        top_k: top_k as u32,
        takers: takers as u32,
        room: room as u32,
        table: (Split::table_bytes(room, top_k) / size_of::<u32>()) as u32,
        to: to.view().of_len(takers * split.share_bytes()),
    };
    // SAFETY: the views are as large as the kernel takes them to be; choices are of experts that there are owners of, says `route`.
    unsafe { device.queue_launch(SPLIT, &call)? };
    GpuBytes::queued(device, to)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SplitRows {
    x: u64,
    choices: u64,
    owners: u64,
    rows: u32,
    words: u32,
    top_k: u32,
    takers: u32,
    room: u32,
    table: u32,
    to: u64,
}

pub(super) const SPLIT: Kernel = Kernel { name: "split_rows", threads: 256, blocks_each: 4 };
