//! Random inputs.

use std::borrow::Cow;

use half::bf16;
use moesaic_kernels::{Matrix, MatrixData};

pub struct Random(fastrand::Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0.usize(..n)
    }

    /// In -1..1.
    pub fn unit(&mut self) -> f32 {
        2.0 * self.0.f32() - 1.0
    }

    pub fn bf16s(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.unit())).collect()
    }
}

pub struct Stored {
    pub rows: usize,
    pub cols: usize,
    pub bytes: Vec<u8>,
    /// None: BF16.
    scales: Option<Vec<f32>>,
}

impl Stored {
    pub fn random(random: &mut Random, rows: usize, cols: usize, is_fp8: bool) -> Self {
        let len = rows * cols;
        // About 1 / sqrt(cols), so that results are about 1.
        let size = (3.0 / cols as f32).sqrt();
        if is_fp8 {
            let bytes = (0..len).map(|_| (random.below(0x7f) | random.below(2) << 7) as u8).collect();
            let blocks = rows.div_ceil(128) * cols.div_ceil(128);
            let scales = (0..blocks).map(|_| size / 128.0 * (0.5 + random.unit().abs())).collect();
            return Self { rows, cols, bytes, scales: Some(scales) };
        }
        let bytes = (0..len).flat_map(|_| bf16::from_f32(random.unit() * size).to_le_bytes()).collect();
        Self { rows, cols, bytes, scales: None }
    }

    pub fn matrix(&self) -> Matrix<'_> {
        let data = match &self.scales {
            Some(scales) => MatrixData::Fp8 { q: &self.bytes, scales: Cow::Borrowed(scales), block: [128, 128] },
            None => MatrixData::Bf16(&self.bytes),
        };
        Matrix { rows: self.rows, cols: self.cols, data }
    }

    /// W x
    pub fn times(&self, x: &[f32]) -> Vec<f32> {
        let w = self.matrix().to_f32();
        let row = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() as f32;
        w.chunks_exact(self.cols).map(row).collect()
    }
}
