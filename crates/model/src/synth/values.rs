//! Random values by counter: a value depends on seed, tensor and index alone, so any thread can make any part of a tensor.
//!
//! ```text
//! start, step  = blake3(seed, tensor)
//! bits         = splitmix64(start + index / 4 * step)
//! level        = one byte + another byte of bits            0 to 510, triangular around 255
//! value        = center + reach * (level - 255) / 255       by a table, as it is stored
//! ```

use moesaic_kernels::{bf16, f32_to_e4m3};
use safetensors::tensor::Dtype;

/// Two bytes a value.
pub(super) const VALUES_PER_DRAW: u64 = 4;
/// How many standard deviations a value is away from the center at most: 255 / sqrt(2 * (256^2 - 1) / 12).
pub(super) const REACH_PER_STD: f32 = 2.439_941;
/// A power of two, so that the largest sum of two bytes needs no check against the table's length.
const LEVELS: usize = 512;
const MIDDLE: f32 = 255.0;

/// How a tensor's values are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stored {
    F32,
    Bf16,
    E4m3,
}

impl Stored {
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::E4m3 => Dtype::F8_E4M3,
        }
    }

    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::E4m3 => 1,
        }
    }
}

/// All values of one tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Values {
    pub stream: Stream,
    pub stored: Stored,
    pub center: f32,
    /// The largest distance from the center.
    pub reach: f32,
}

impl Values {
    /// The values from index `first` on, a multiple of VALUES_PER_DRAW, as many as fit `out`.
    pub fn fill(&self, first: u64, out: &mut [u8]) {
        match self.stored {
            Stored::F32 => self.fill_as(first, out, f32::to_le_bytes),
            Stored::Bf16 => self.fill_as(first, out, |x| bf16::from_f32(x).to_le_bytes()),
            // Saturates, so that no code is a NaN.
            Stored::E4m3 => self.fill_as(first, out, |x| [f32_to_e4m3(x)]),
        }
    }

    fn fill_as<const N: usize>(&self, first: u64, out: &mut [u8], store: impl Fn(f32) -> [u8; N]) {
        let value = |level: usize| self.center + self.reach * ((level as f32 - MIDDLE) / MIDDLE);
        let table: [[u8; N]; LEVELS] = std::array::from_fn(|level| store(value(level)));
        let first_draw = first / VALUES_PER_DRAW;
        for (draw, values) in (first_draw..).zip(out.chunks_mut(VALUES_PER_DRAW as usize * N)) {
            let levels = self.stream.levels(draw);
            for (value, level) in values.chunks_exact_mut(N).zip(levels) {
                value.copy_from_slice(&table[level % LEVELS]);
            }
        }
    }
}

/// A sequence of draws of its own for each seed and tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    start: u64,
    /// Odd, so that the counter meets every number once.
    step: u64,
}

impl Stream {
    pub fn new(seed: u64, tensor: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(tensor.as_bytes());
        let hash = hasher.finalize();
        let words = hash.as_bytes().as_chunks::<8>().0;
        Self { start: u64::from_le_bytes(words[0]), step: u64::from_le_bytes(words[1]) | 1 }
    }

    /// Four sums of two bytes each.
    fn levels(self, draw: u64) -> [usize; VALUES_PER_DRAW as usize] {
        const EVEN_BYTES: u64 = 0x00ff_00ff_00ff_00ff;
        let bits = mix(self.start.wrapping_add(draw.wrapping_mul(self.step)));
        let sums = (bits & EVEN_BYTES) + (bits >> 8 & EVEN_BYTES);
        [0, 16, 32, 48].map(|shift| (sums >> shift) as usize & 0xffff)
    }
}

/// The finalizer of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
