//! What all products share (`cuda/tile.h`): their argument, and kernels by the rows of a tile.

use bytemuck::{Pod, Zeroable};

use super::gpu::Kernel;

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
