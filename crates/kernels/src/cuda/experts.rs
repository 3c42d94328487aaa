//! A layer's experts on a GPU: `cuda/experts.cu`, and what it takes to call it.

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::bytes::{self, GATHER, Gather, GpuBytes};
use super::gpu::{Buffer, Device, GpuError, Kernel, Parcel, Returned, View};
use super::grouped::{GROUPS_MAX, Grouped, Groups, Sizes, fit, sizes};
use super::pack::{Format, M_TILE, Unfit, pack};
use super::recording::{Recording, Replays};
use crate::Matrix;

/// One expert's weights in a GPU's memory.
#[derive(Debug)]
pub struct GpuFfn {
    /// gate and up by turns of 16 outputs; and down.
    weights: Groups,
    shape: Shape,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shape {
    in_: usize,
    width: usize,
    out: usize,
    format: Format,
}

impl Shape {
    /// Of gate and up together: a strip has 16 columns of each.
    fn gate_up_strips(&self) -> usize {
        self.width.div_ceil(M_TILE)
    }

    fn down_strips(&self) -> usize {
        self.out.div_ceil(2 * M_TILE)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum NotLoaded {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

impl GpuFfn {
    /// gate and up are [width, in], down is [out, width].
    pub fn load(device: &Device, gate: &Matrix<'_>, up: &Matrix<'_>, down: &Matrix<'_>) -> Result<Self, NotLoaded> {
        assert_eq!([gate.rows, gate.cols], [up.rows, up.cols], "gate and up differ in shape");
        assert_eq!(down.cols, gate.rows, "down does not take what gate gives");
        let shape = Shape { in_: gate.cols, width: gate.rows, out: down.rows, format: Format::of(gate) };
        if Format::of(down) != shape.format {
            return Err(Unfit::Mixed.into());
        }
        let pairs: Vec<_> = (0..shape.gate_up_strips()).flat_map(|i| [(gate, i * M_TILE), (up, i * M_TILE)]).collect();
        let rows: Vec<_> = (0..shape.down_strips() * 2).map(|i| (down, i * M_TILE)).collect();
        Ok(Self { weights: Groups::load(device, &[pack(&pairs)?, pack(&rows)?])?, shape })
    }

    /// Random weights, made on the GPU: to measure with.
    pub fn random(device: &Device, [in_, width, out]: [usize; 3], is_fp8: bool, seed: u64) -> Result<Self, GpuError> {
        let format = if is_fp8 { Format::Fp8 } else { Format::Bf16 };
        let shape = Shape { in_, width, out, format };
        let groups = [(shape.gate_up_strips(), in_), (shape.down_strips(), width)];
        Ok(Self { weights: Groups::random(device, format, &groups, seed)?, shape })
    }

    pub fn in_features(&self) -> usize {
        self.shape.in_
    }

    pub fn bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Queues it: x is bf16 [rows, in], y is [rows, out]; h, bf16 [rows, width], is what it is computed in.
    pub fn queue(
        &self,
        device: &Device,
        rows: usize,
        x: View<'_, u16>,
        h: View<'_, u16>,
        y: View<'_, f32>,
    ) -> Result<(), GpuError> {
        let Shape { in_, width, out, format } = self.shape;
        let gate_up = GateUp {
            grouped: self.weights.grouped(0, rows, self.shape.gate_up_strips(), in_, x.of_len(rows * in_)),
            width: width as u32,
            _pad: 0,
            h: h.of_len(rows * width),
        };
        let down = Down {
            grouped: self.weights.grouped(1, rows, self.shape.down_strips(), width, gate_up.h),
            out: out as u32,
            _pad: 0,
            y: y.of_len(rows * out),
        };
        let [gate_up_kernel, down_kernel] = kernels_for(format, rows);
        // SAFETY: the views are as large as the kernels take them to be, the weights are this network's.
        unsafe {
            device.queue_launch(gate_up_kernel, &gate_up)?;
            device.queue_launch(down_kernel, &down)
        }
    }
}

/// What is asked of a call: sums of weighted rows of y, in the order of their terms.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// (row of y, weight); at least one. The first is multiplied, the others are added by fused multiply-adds.
    pub terms: &'a [(u32, f32)],
}

/// Everything of one call of [`Experts::run`].
#[derive(Clone, Copy, Debug)]
pub struct Experts<'a> {
    /// Each with the rows of x that it runs on; y has a row for each of these, in this order.
    pub groups: &'a [(&'a GpuFfn, &'a [u32])],
    pub x: X<'a>,
    pub outputs: &'a [Output<'a>],
}

/// bf16 [rows, in]
#[derive(Clone, Copy, Debug)]
pub enum X<'a> {
    Here(&'a [bf16]),
    /// In this GPU's memory, some rows in each piece.
    There(&'a [GpuBytes]),
}

impl X<'_> {
    /// How many values.
    fn len(&self) -> usize {
        match self {
            Self::Here(values) => values.len(),
            Self::There(pieces) => pieces.iter().map(|piece| piece.len() / size_of::<bf16>()).sum(),
        }
    }
}

/// What calls are computed in. Grows with them, and stays.
#[derive(Debug)]
pub struct Workspace {
    device: Device,
    sent: Option<Parcel>,
    returned: Option<Returned<f32>>,
    buffers: Buffers,
    replays: Replays,
    /// Of a call that may not be through, the rows that it reads.
    unfinished: Option<Vec<GpuBytes>>,
}

#[derive(Debug, Default)]
struct Buffers {
    /// Rows that were elsewhere on the GPU.
    x: Option<Buffer<u16>>,
    h: Option<Buffer<u16>>,
    y: Option<Buffer<f32>>,
    sums: Option<Buffer<f32>>,
}

impl Buffers {
    fn made_sums(&self) -> &Buffer<f32> {
        self.sums.as_ref().expect("a call has made room for its sums")
    }
}

impl Workspace {
    pub fn new(device: Device) -> Self {
        let (buffers, replays) = (Buffers::default(), Replays::default());
        Self { device, sent: None, returned: None, buffers, replays, unfinished: None }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits until the last call is through. The next one does so, too.
    pub fn finish(&mut self) -> Result<(), GpuError> {
        if self.unfinished.is_some() {
            self.device.finish()?;
            self.unfinished = None;
        }
        Ok(())
    }

    /// The first `len` sums of the last call.
    pub fn sums(&mut self, len: usize) -> Result<&[f32], GpuError> {
        let Self { device, returned, buffers, unfinished, .. } = self;
        let returned = at_least(returned, |r| r.len() >= len, || device.returned(len.next_power_of_two()))?;
        device.queue_return(buffers.made_sums().view(), returned, len)?;
        device.finish()?;
        *unfinished = None;
        Ok(&returned.values()[..len])
    }
}

/// A call whose rows and lists are on the GPU, and which can be queued any number of times.
#[derive(Debug)]
pub struct Sent<'a> {
    gather: Option<Gather>,
    gate_up: (Kernel, GateUp),
    down: (Kernel, Down),
    add_up: AddUp,
    /// Experts, and what it is computed in.
    uses: PhantomData<&'a ()>,
}

impl Sent<'_> {
    /// The sums are in the workspace then.
    pub fn queue(&self, device: &Device) -> Result<(), GpuError> {
        // SAFETY: the addresses are of buffers as large as the kernels take them to be, and of experts that are borrowed.
        unsafe {
            self.gather.map_or(Ok(()), |gather| device.queue_launch(GATHER, &gather))?;
            device.queue_launch(self.gate_up.0, &self.gate_up.1)?;
            device.queue_launch(self.down.0, &self.down.1)?;
            device.queue_launch(ADD_UP, &self.add_up)
        }
    }
}

/// Calls that are queued as one.
#[derive(Debug)]
pub struct Recorded<'a> {
    recording: Recording,
    calls: PhantomData<&'a ()>,
}

impl<'a> Recorded<'a> {
    /// Of calls that follow each other.
    pub fn new(device: &Device, calls: &'a [Sent<'a>]) -> Result<Self, GpuError> {
        let recording = device.record(|device| calls.iter().try_for_each(|call| call.queue(device)))?;
        Ok(Self { recording, calls: PhantomData })
    }

    pub fn queue(&self) -> Result<(), GpuError> {
        // SAFETY: the calls are borrowed, so that what they work on lasts.
        unsafe { self.recording.queue() }
    }
}

impl Experts<'_> {
    /// h = silu(x gateᵀ) * (x upᵀ) in bf16, y = h downᵀ in f32 for each group, and the outputs' sums [outputs, out]. All experts
    /// have one shape.
    pub fn run<'w>(&self, workspace: &'w mut Workspace) -> Result<&'w [f32], GpuError> {
        if self.outputs.is_empty() {
            return Ok(&[]);
        }
        self.queue(workspace)?;
        workspace.sums(self.sum_count())
    }

    /// The same for outputs that there are, which stay on the GPU. The call may not be through when this returns.
    pub fn run_there(&self, workspace: &mut Workspace) -> Result<GpuBytes, GpuError> {
        // First: where there is no room, nothing is queued.
        let to = workspace.device.buffer(self.sum_count() * size_of::<f32>())?;
        self.queue(workspace)?;
        workspace.device.queue_copy(&to, workspace.buffers.made_sums())?;
        GpuBytes::queued(&workspace.device, to)
    }

    fn sum_count(&self) -> usize {
        self.groups.first().map_or(0, |(model, _)| self.outputs.len() * model.shape.out)
    }

    fn queue(&self, workspace: &mut Workspace) -> Result<(), GpuError> {
        workspace.finish()?;
        workspace.unfinished = Some(if let X::There(pieces) = self.x { pieces.to_vec() } else { Vec::new() });
        let Workspace { device, sent, buffers, replays, .. } = workspace;
        let sent = self.send_by(device, sent, buffers)?;
        replays.queue(device, |device| sent.queue(device))
    }

    /// Queues everything but the kernels. `parcel` holds what is sent, as long as the call may be queued; calls that have the
    /// same workspace are not computed at a time.
    ///
    /// A larger call makes larger buffers: those of calls that are sent to one workspace should be of one size.
    pub fn send<'s>(&'s self, workspace: &mut Workspace, parcel: &'s mut Option<Parcel>) -> Result<Sent<'s>, GpuError> {
        self.send_by(&workspace.device, parcel, &mut workspace.buffers)
    }

    fn send_by<'s>(
        &self,
        device: &Device,
        parcel: &mut Option<Parcel>,
        buffers: &mut Buffers,
    ) -> Result<Sent<'s>, GpuError> {
        let (model, _) = self.groups.first().expect("a call of at least one expert");
        let shape = model.shape;
        assert!(self.groups.iter().all(|(ffn, _)| ffn.shape == shape), "experts of one call differ in shape");
        // A power of two, so that room for one is never more.
        const _: () = assert!(GROUPS_MAX.is_power_of_two());
        assert!(self.groups.len() <= GROUPS_MAX, "{} experts in one call", self.groups.len());
        let rows: usize = self.groups.iter().map(|(_, rows)| rows.len()).sum();
        let x_rows = self.x.len() / shape.in_;
        assert_eq!(self.x.len(), x_rows * shape.in_, "x does not have whole rows");
        let picks = || self.groups.iter().flat_map(|(_, rows)| rows.iter().copied());
        assert!(picks().all(|row| (row as usize) < x_rows), "a row that x does not have");
        let terms = || self.outputs.iter().flat_map(|output| output.terms);
        assert!(terms().all(|(row, _)| (*row as usize) < rows), "a term that y does not have");
        assert!(self.outputs.iter().all(|output| !output.terms.is_empty()), "an output without terms");

        // Calls of about the same size have equal arguments, so that they are replays: lists have room for a power of two, and
        // experts without rows and outputs without terms fill it.
        let term_count = terms().count();
        let [groups, row_room, outputs, term_room] =
            [self.groups.len(), rows, self.outputs.len(), term_count].map(usize::next_power_of_two);
        let lists = [groups * 4, groups * 8, groups * 8, groups * 8, groups * 8, row_room * 4].into_iter().chain([
            (outputs + 1) * 4,
            term_room * 4,
            term_room * 4,
        ]);
        let x_room = x_rows.next_power_of_two();
        let x_bytes = match self.x {
            X::Here(values) => size_of_val(values),
            X::There(_) => x_room * size_of::<u64>(),
        };
        let room = Parcel::room(&lists.chain([x_bytes]).collect::<Vec<_>>());
        let sent = Parcel::in_place(parcel, device, room)?;
        let h = room_for(&mut buffers.h, row_room * shape.width, |len| device.buffer(len))?;
        let y = room_for(&mut buffers.y, row_room * shape.out, |len| device.buffer(len))?;
        let sums = room_for(&mut buffers.sums, outputs * shape.out, |len| device.buffer(len))?;

        let counts = sent.put_in(groups, self.groups.iter().map(|(_, rows)| rows.len() as u32));
        let begins =
            [0, 1, 2, 3].map(|part| sent.put_in(groups, self.groups.iter().map(|(ffn, _)| ffn.weights.begin(part))));
        let pick = sent.put_in(row_room, picks());
        let mut next = 0;
        let firsts = self.outputs.iter().map(|output| {
            next += output.terms.len() as u32;
            next - output.terms.len() as u32
        });
        let ends = std::iter::repeat_n(term_count as u32, outputs + 1 - self.outputs.len());
        let firsts = sent.put_in(outputs + 1, firsts.chain(ends));
        let term_rows = sent.put_in(term_room, terms().map(|(row, _)| *row));
        let weights = sent.put_in(term_room, terms().map(|(_, weight)| *weight));
        let (x, gather) = match self.x {
            X::Here(values) => {
                let x = sent.put(values);
                sent.send(device)?;
                (sent.view(x).of_len(values.len()), None)
            }
            X::There(pieces) => {
                let row_bytes = shape.in_ * size_of::<bf16>();
                let of_piece = |piece: &GpuBytes| (0..piece.len() / row_bytes).map(|row| (row * row_bytes) as u64);
                let rows = pieces.iter().flat_map(|piece| of_piece(piece).map(|at| piece.address().0 + at));
                // Behind the last one it is taken again.
                let last = rows.clone().last().into_iter().cycle();
                let rows = sent.put_all(rows.chain(last).take(x_room));
                sent.send(device)?;
                let x = room_for(&mut buffers.x, x_room * shape.in_, |len| device.buffer(len))?.view();
                (x.of_len(0), Some(bytes::gather(sent.view(rows), row_bytes, x.bytes())))
            }
        };
        let [gate_up, down, gate_up_scales, down_scales] = begins.map(|begins| sent.view(begins).of_len(groups));

        let grouped = |weights, scales, strips: usize, in_: usize, x, pick| Grouped {
            weights,
            scales,
            counts: sent.view(counts).of_len(groups),
            count: 0,
            groups: groups as u32,
            strips: strips as u32,
            in_: in_ as u32,
            x,
            pick,
        };
        let gate_up = GateUp {
            grouped: grouped(
                gate_up,
                gate_up_scales,
                shape.gate_up_strips(),
                shape.in_,
                x,
                sent.view(pick).of_len(row_room),
            ),
            width: shape.width as u32,
            _pad: 0,
            h: h.address().0,
        };
        let down = Down {
            grouped: grouped(down, down_scales, shape.down_strips(), shape.width, h.address().0, 0),
            out: shape.out as u32,
            _pad: 0,
            y: y.address().0,
        };
        assert!(u32::try_from(outputs * shape.out).is_ok(), "{outputs} outputs of {} are too many", shape.out);
        let add_up = AddUp {
            y: y.address().0,
            out: shape.out as u32,
            outputs: outputs as u32,
            firsts: sent.view(firsts).of_len(outputs + 1),
            rows: sent.view(term_rows).of_len(term_room),
            weights: sent.view(weights).of_len(term_room),
            sums: sums.address().0,
        };
        let most = self.groups.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0);
        let [gate_up_kernel, down_kernel] = kernels_for(shape.format, most);
        Ok(Sent { gather, gate_up: (gate_up_kernel, gate_up), down: (down_kernel, down), add_up, uses: PhantomData })
    }
}

/// What is kept, or a new one where that is not enough; the old one goes first.
fn at_least<T>(
    kept: &mut Option<T>,
    is_enough: impl Fn(&T) -> bool,
    new: impl FnOnce() -> Result<T, GpuError>,
) -> Result<&mut T, GpuError> {
    if !kept.as_ref().is_some_and(is_enough) {
        *kept = None;
        *kept = Some(new()?);
    }
    Ok(kept.as_mut().expect("just made"))
}

fn room_for<T>(
    kept: &mut Option<Buffer<T>>,
    len: usize,
    new: impl FnOnce(usize) -> Result<Buffer<T>, GpuError>,
) -> Result<&mut Buffer<T>, GpuError> {
    at_least(kept, |buffer| buffer.len() >= len, || new(len))
}

/// Arguments of the kernels, field by field those of `cuda/experts.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct GateUp {
    grouped: Grouped,
    width: u32,
    _pad: u32,
    h: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Down {
    grouped: Grouped,
    out: u32,
    _pad: u32,
    y: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct AddUp {
    y: u64,
    out: u32,
    outputs: u32,
    firsts: u64,
    rows: u64,
    weights: u64,
    sums: u64,
}

const ADD_UP: Kernel = Kernel { name: "add_up_outputs", threads: 256, blocks_each: 6 };

static GATE_UP_FP8: Sizes = sizes!("gate_up_fp8");
static GATE_UP_BF16: Sizes = sizes!("gate_up_bf16");
static DOWN_FP8: Sizes = sizes!("down_fp8");
static DOWN_BF16: Sizes = sizes!("down_bf16");

pub(super) fn kernels() -> Vec<Kernel> {
    [&GATE_UP_FP8[..], &GATE_UP_BF16, &DOWN_FP8, &DOWN_BF16, &[ADD_UP]].concat()
}

fn kernels_for(format: Format, rows: usize) -> [Kernel; 2] {
    match format {
        Format::Fp8 => [fit(&GATE_UP_FP8, rows), fit(&DOWN_FP8, rows)],
        Format::Bf16 => [fit(&GATE_UP_BF16, rows), fit(&DOWN_BF16, rows)],
    }
}
