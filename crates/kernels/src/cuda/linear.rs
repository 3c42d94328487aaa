//! One linear over rows, and a linear of its own for each head: `cuda/linear.cu`.

use bytemuck::{Pod, Zeroable};

use super::experts::NotLoaded;
use super::gpu::{Buffer, Device, GpuError, Kernel, View};
use super::grouped::{GROUPS_MAX, Grouped, Sizes, fit, sizes};
use super::pack::{Format, M_TILE, Packed, Unfit, pack};
use super::rows::fill;
use crate::Matrix;

/// Weights of y = x Wᵀ in a GPU's memory.
#[derive(Debug)]
pub struct GpuLinear {
    weights: Groups,
    in_: usize,
    out: usize,
    format: Format,
}

impl GpuLinear {
    /// `m` is [out, in].
    pub fn load(device: &Device, m: &Matrix<'_>) -> Result<Self, NotLoaded> {
        Ok(Self { weights: Groups::load(device, &[packed(m)?])?, in_: m.cols, out: m.rows, format: Format::of(m) })
    }

    pub fn in_features(&self) -> usize {
        self.in_
    }

    pub fn out_features(&self) -> usize {
        self.out
    }

    pub fn bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Queues it: x is bf16 [rows, in], y is [rows, out].
    pub fn queue(&self, device: &Device, rows: usize, x: View<'_, u16>, y: View<'_, f32>) -> Result<(), GpuError> {
        let kernels = match self.format {
            Format::Fp8 => &LINEAR_FP8,
            Format::Bf16 => &LINEAR_BF16,
        };
        let call = LinearCall {
            grouped: Grouped {
                weights: self.weights.table(0),
                scales: self.weights.table(1),
                counts: 0,
                count: rows as u32,
                groups: 1,
                strips: strips(self.out) as u32,
                in_: self.in_ as u32,
                x: x.of_len(rows * self.in_),
                pick: 0,
            },
            out: self.out as u32,
            _pad: 0,
            y: y.of_len(rows * self.out),
        };
        // SAFETY: the views are as large as the kernel takes them to be, the weights are this linear's.
        unsafe { device.queue_launch(fit(kernels, rows), &call) }
    }
}

/// A linear for each head, in bf16.
#[derive(Debug)]
pub struct GpuPerHead {
    weights: Groups,
    heads: usize,
    in_: usize,
    out: usize,
}

/// Where results of heads go: values from one row to the next, and from one head to the next.
#[derive(Clone, Copy, Debug)]
pub struct Strides {
    pub row: usize,
    pub head: usize,
}

impl GpuPerHead {
    /// `w` is [heads, out, in_].
    pub fn load(device: &Device, heads: usize, out: usize, in_: usize, w: &[f32]) -> Result<Self, NotLoaded> {
        assert_eq!(w.len(), heads * out * in_, "weights of {heads} heads of [{out}, {in_}]");
        assert!(heads <= GROUPS_MAX, "{heads} heads");
        let head =
            |w: &[f32]| packed(&Matrix { rows: out, cols: in_, data: crate::MatrixData::F32(bytemuck::cast_slice(w)) });
        let groups: Vec<Packed> = w.chunks_exact(out * in_).map(head).collect::<Result<_, Unfit>>()?;
        Ok(Self { weights: Groups::load(device, &groups)?, heads, in_, out })
    }

    pub fn bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Queues it: x is bf16 [heads, rows, in]; the results of a row's head go to where `strides` say in y, as bf16.
    pub fn queue(
        &self,
        device: &Device,
        rows: usize,
        x: View<'_, u16>,
        y: View<'_, u16>,
        strides: Strides,
    ) -> Result<(), GpuError> {
        let last = rows.saturating_sub(1) * strides.row + (self.heads - 1) * strides.head + self.out;
        let call = PerHeadCall {
            grouped: Grouped {
                weights: self.weights.table(0),
                scales: 0,
                counts: 0,
                count: rows as u32,
                groups: self.heads as u32,
                strips: strips(self.out) as u32,
                in_: self.in_ as u32,
                x: x.of_len(self.heads * rows * self.in_),
                pick: 0,
            },
            out: self.out as u32,
            row_stride: strides.row as u32,
            head_stride: strides.head as u32,
            _pad: 0,
            y: y.of_len(last),
        };
        // SAFETY: the views are as large as the kernel takes them to be, the weights are these heads'.
        unsafe { device.queue_launch(fit(&PER_HEAD, rows), &call) }
    }
}

fn strips(out: usize) -> usize {
    out.div_ceil(2 * M_TILE)
}

fn packed(m: &Matrix<'_>) -> Result<Packed, Unfit> {
    let tiles: Vec<_> = (0..strips(m.rows) * 2).map(|i| (m, i * M_TILE)).collect();
    pack(&tiles)
}

/// Weights of some groups in a GPU's memory: the weights of all, the scales of all, then where each group's weights begin, then
/// where its scales do.
#[derive(Debug)]
pub(super) struct Groups {
    memory: Buffer<u8>,
    /// Of each group's weights, then of its scales.
    begins: Vec<u64>,
    /// Where these numbers are in the memory.
    table: usize,
}

impl Groups {
    /// Room for groups of so many bytes of weights and of scales, with the numbers of where they begin.
    fn with_room(device: &Device, sizes: &[(usize, usize)]) -> Result<Self, GpuError> {
        let all = sizes.iter().map(|(weights, _)| weights).chain(sizes.iter().map(|(_, scales)| scales));
        let table = all.clone().sum::<usize>().next_multiple_of(8);
        let memory = device.buffer::<u8>(table + sizes.len() * 16)?;
        let mut next = memory.address().0;
        let begin = |bytes: &usize| {
            next += *bytes as u64;
            next - *bytes as u64
        };
        let begins: Vec<u64> = all.map(begin).collect();
        device.write(&memory, table, bytemuck::cast_slice(&begins))?;
        Ok(Self { memory, begins, table })
    }

    pub fn load(device: &Device, groups: &[Packed]) -> Result<Self, GpuError> {
        let sizes: Vec<(usize, usize)> =
            groups.iter().map(|group| (group.weights.len(), size_of_val(&group.scales[..]))).collect();
        let loaded = Self::with_room(device, &sizes)?;
        let weights = groups.iter().map(|group| &group.weights[..]);
        let scales = groups.iter().map(|group| bytemuck::cast_slice(&group.scales));
        for (bytes, begin) in weights.chain(scales).zip(&loaded.begins) {
            device.write(&loaded.memory, (begin - loaded.memory.address().0) as usize, bytes)?;
        }
        Ok(loaded)
    }

    /// Random weights of groups of so many strips and inputs, whose sums are about as large as the inputs.
    pub fn random(device: &Device, format: Format, groups: &[(usize, usize)], seed: u64) -> Result<Self, GpuError> {
        let scale_count = |strips: usize, in_: usize| match format {
            Format::Fp8 => strips * format.steps(in_) * 2,
            Format::Bf16 => 0,
        };
        let sizes: Vec<(usize, usize)> =
            groups.iter().map(|(strips, in_)| (format.bytes(*strips, *in_), scale_count(*strips, *in_) * 4)).collect();
        let made = Self::with_room(device, &sizes)?;
        for (i, (strips, in_)) in groups.iter().enumerate() {
            let (weights_at, scales_at) = (made.offset(i), made.offset(groups.len() + i));
            let size = (3.0 / *in_ as f32).sqrt();
            let bf16_size = (format == Format::Bf16).then_some(size);
            let weights = made.memory.view().from(weights_at);
            fill(device, weights, sizes[i].0, bf16_size, seed.wrapping_add((i as u64) << 40))?;
            // The codes' root mean square is about 100.
            let scales = vec![size / 170.0; scale_count(*strips, *in_)];
            device.write(&made.memory, scales_at, bytemuck::cast_slice(&scales))?;
        }
        Ok(made)
    }

    fn offset(&self, begin: usize) -> usize {
        (self.begins[begin] - self.memory.address().0) as usize
    }

    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Where a group's weights begin, or (from the number of groups on) its scales.
    pub fn begin(&self, number: usize) -> u64 {
        self.begins[number]
    }

    /// Where the number of where they begin is.
    pub fn table(&self, number: usize) -> u64 {
        self.memory.address().0 + (self.table + number * 8) as u64
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinearCall {
    grouped: Grouped,
    out: u32,
    _pad: u32,
    y: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PerHeadCall {
    grouped: Grouped,
    out: u32,
    row_stride: u32,
    head_stride: u32,
    _pad: u32,
    y: u64,
}

static LINEAR_FP8: Sizes = sizes!("linear_fp8");
static LINEAR_BF16: Sizes = sizes!("linear_bf16");
static PER_HEAD: Sizes = sizes!("per_head_bf16");

pub(super) fn kernels() -> Vec<Kernel> {
    [LINEAR_FP8, LINEAR_BF16, PER_HEAD].concat()
}
