//! What all products share (`cuda/tile.h`): their weights, their argument, and kernels by the rows of a tile.

use bytemuck::{Pod, Zeroable};

use super::gpu::{Buffer, Device, GpuError, Kernel};
use super::pack::{Format, Packed};
use super::rows::fill;

/// Groups of a call; `cuda/tile.h` has the same.
pub(super) const GROUPS_MAX: usize = 256;

/// Field by field that of `cuda/tile.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Grouped {
    pub weights: u64,
    pub scales: u64,
    pub counts: u64,
    pub count: u32,
    pub groups: u32,
    pub strips: u32,
    pub in_: u32,
    pub x: u64,
    pub pick: u64,
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

    /// `rows` rows of one group; the groups behind it follow where `Grouped::groups` says that there are more.
    pub fn grouped(&self, group: usize, rows: usize, strips: usize, in_: usize, x: u64) -> Grouped {
        let count = self.begins.len() / 2;
        // Where the number of where they begin is.
        let table = |number: usize| self.memory.address().0 + (self.table + number * 8) as u64;
        Grouped {
            weights: table(group),
            scales: table(count + group),
            counts: 0,
            count: rows as u32,
            groups: 1,
            strips: strips as u32,
            in_: in_ as u32,
            x,
            pick: 0,
        }
    }
}

/// Kernels of one name by the rows of their tiles: 8, 16, 32, 64, 128.
pub(super) type Sizes = [Kernel; 5];

/// As `TILES` of `cuda/tile.h` makes them.
macro_rules! sizes {
    ($name:literal) => {
        [
            Kernel { name: concat!($name, "_8"), threads: 128, blocks_each: 2 },
            Kernel { name: concat!($name, "_16"), threads: 128, blocks_each: 2 },
            Kernel { name: concat!($name, "_32"), threads: 256, blocks_each: 1 },
            Kernel { name: concat!($name, "_64"), threads: 256, blocks_each: 1 },
            Kernel { name: concat!($name, "_128"), threads: 256, blocks_each: 1 },
        ]
    };
}
pub(super) use sizes;

/// The smallest tiles that hold `rows`; the bits are the same whichever are taken.
pub(super) fn fit(sizes: &Sizes, rows: usize) -> Kernel {
    sizes[[8, 16, 32, 64].iter().position(|tile| rows <= *tile).unwrap_or(4)]
}
