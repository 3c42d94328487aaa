//! One linear over rows, and a linear of its own for each head: `cuda/linear.cu`.

use bytemuck::{Pod, Zeroable};

use super::experts::NotLoaded;
use super::gpu::{Device, GpuError, Kernel, View};
use super::grouped::{GROUPS_MAX, Grouped, Groups, Sizes, fit, sizes};
use super::pack::{Format, M_TILE, Packed, Unfit, pack};
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

    /// Random weights, made on the GPU: to measure with.
    pub fn random(device: &Device, [in_, out]: [usize; 2], is_fp8: bool, seed: u64) -> Result<Self, GpuError> {
        let format = if is_fp8 { Format::Fp8 } else { Format::Bf16 };
        Ok(Self { weights: Groups::random(device, format, &[(strips(out), in_)], seed)?, in_, out, format })
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
            grouped: self.weights.grouped(0, rows, strips(self.out), self.in_, x.of_len(rows * self.in_)),
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

    /// Random weights, made on the GPU: to measure with.
    pub fn random(device: &Device, heads: usize, [in_, out]: [usize; 2], seed: u64) -> Result<Self, GpuError> {
        let groups = vec![(strips(out), in_); heads];
        Ok(Self { weights: Groups::random(device, Format::Bf16, &groups, seed)?, heads, in_, out })
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
        let x = x.of_len(self.heads * rows * self.in_);
        let one_head = self.weights.grouped(0, rows, strips(self.out), self.in_, x);
        let call = PerHeadCall {
            grouped: Grouped { groups: self.heads as u32, ..one_head },
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
