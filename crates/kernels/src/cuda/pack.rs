//! Weights in the order in which a GPU's lanes read them: strips of 32 outputs, steps of 4096 bytes (`cuda/tile.h` has the order).

use half::{bf16, f16};

use crate::{Matrix, MatrixData};

/// Outputs of an m-tile of the matrix instruction; a strip has two.
pub(super) const M_TILE: usize = 16;
const STEP_BYTES: usize = 4096;
const LANES: usize = 32;

/// How weights are stored on the GPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Fp8,
    Bf16,
}

impl Format {
    pub fn of(m: &Matrix<'_>) -> Self {
        if matches!(m.data, MatrixData::Fp8 { .. }) { Self::Fp8 } else { Self::Bf16 }
    }

    /// k of a step.
    pub fn step(self) -> usize {
        match self {
            Self::Fp8 => 128,
            Self::Bf16 => 64,
        }
    }

    pub fn steps(self, in_: usize) -> usize {
        in_.div_ceil(self.step())
    }

    /// Bytes of so many strips.
    pub fn bytes(self, strips: usize, in_: usize) -> usize {
        strips * self.steps(in_) * STEP_BYTES
    }
}

/// Why weights do not fit the kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error("FP8 weights in blocks of {0:?}; on a GPU they have to be [128, 128]")]
    Block([usize; 2]),
    #[error("FP8 weights have a NaN at row {row}, column {column}")]
    Nan { row: usize, column: usize },
    #[error("{0} inputs; on a GPU they have to be a multiple of 8")]
    Inputs(usize),
    #[error("weights of one linear are stored in more than one way")]
    Mixed,
}

/// Weights of some outputs, packed; and in FP8 their scales, [strips][steps][2].
#[derive(Debug)]
pub(super) struct Packed {
    pub weights: Vec<u8>,
    pub scales: Vec<f32>,
}

/// The m-tiles in their order, each of a matrix from a row on; rows behind its end are zeros. An even number of them.
pub(super) fn pack(tiles: &[(&Matrix<'_>, usize)]) -> Result<Packed, Unfit> {
    let Some((first, _)) = tiles.first() else { return Ok(Packed { weights: Vec::new(), scales: Vec::new() }) };
    let (in_, format) = (first.cols, Format::of(first));
    for (m, _) in tiles {
        check(m, in_, format)?;
    }
    let (steps, mut weights) = (format.steps(in_), vec![0; format.bytes(tiles.len() / 2, in_)]);
    let mut scales = Vec::new();
    for (strip, to) in weights.chunks_exact_mut(steps * STEP_BYTES).enumerate() {
        let pair = [tiles[strip * 2], tiles[strip * 2 + 1]];
        for (step, to) in to.chunks_exact_mut(STEP_BYTES).enumerate() {
            for (m, (matrix, first_row)) in pair.into_iter().enumerate() {
                match &matrix.data {
                    MatrixData::Fp8 { q, scales: of_blocks, .. } => {
                        fp8_step(to, m, Codes { q, matrix, first_row, first_k: step * 128 })?;
                        let row = first_row.min(matrix.rows.saturating_sub(1));
                        scales.push(of_blocks[row / 128 * in_.div_ceil(128) + step]);
                    }
                    data => bf16_step(to, m, |row, k| bf16_at(matrix, data, first_row + row, step * 64 + k)),
                }
            }
        }
    }
    Ok(Packed { weights, scales })
}

fn check(m: &Matrix<'_>, in_: usize, format: Format) -> Result<(), Unfit> {
    m.check();
    assert_eq!(m.cols, in_, "weights of one linear differ in their inputs");
    if Format::of(m) != format {
        return Err(Unfit::Mixed);
    }
    if !in_.is_multiple_of(8) {
        return Err(Unfit::Inputs(in_));
    }
    match &m.data {
        MatrixData::Fp8 { block, .. } if *block != [128, 128] => Err(Unfit::Block(*block)),
        _ => Ok(()),
    }
}

struct Codes<'a> {
    q: &'a [u8],
    matrix: &'a Matrix<'a>,
    first_row: usize,
    first_k: usize,
}

/// [k / 64][m-tile][half][lane][16 codes]
fn fp8_step(to: &mut [u8], m: usize, codes: Codes<'_>) -> Result<(), Unfit> {
    let Codes { q, matrix, first_row, first_k } = codes;
    for block in 0..2 {
        for half in 0..2 {
            for lane in 0..LANES {
                let row = first_row + lane / 4 + half * 8;
                let k = first_k + block * 64 + lane % 4 * 16;
                if row >= matrix.rows || k >= matrix.cols {
                    continue;
                }
                let len = 16.min(matrix.cols - k);
                let mut read = [0; 16];
                read[..len].copy_from_slice(&q[row * matrix.cols + k..][..len]);
                if let Some(at) = read.iter().position(|code| code & 0x7f == 0x7f) {
                    return Err(Unfit::Nan { row, column: k + at });
                }
                let to = &mut to[(((block * 2 + m) * 2 + half) * LANES + lane) * 16..][..16];
                for (to, four) in to.as_chunks_mut::<4>().0.iter_mut().zip(read.as_chunks::<4>().0) {
                    *to = [four[0], four[2], four[1], four[3]];
                }
            }
        }
    }
    Ok(())
}

/// [m-tile][k / 16][lane][4 pairs]
fn bf16_step(to: &mut [u8], m: usize, value: impl Fn(usize, usize) -> u16) {
    for s in 0..4 {
        for lane in 0..LANES {
            let to = &mut to[((m * 4 + s) * LANES + lane) * 16..][..16];
            let (row, k) = (lane / 4, lane % 4 * 16 + s * 4);
            for (i, to) in to.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let (register, place) = (i / 2, i % 2);
                *to = value(row + register % 2 * 8, k + register / 2 * 2 + place).to_le_bytes();
            }
        }
    }
}

fn bf16_at(m: &Matrix<'_>, data: &MatrixData<'_>, row: usize, k: usize) -> u16 {
    if row >= m.rows || k >= m.cols {
        return 0;
    }
    let i = row * m.cols + k;
    let bytes = |b: &[u8], size: usize| -> [u8; 4] {
        let mut four = [0; 4];
        four[..size].copy_from_slice(&b[i * size..][..size]);
        four
    };
    match data {
        MatrixData::Bf16(b) => u32::from_le_bytes(bytes(b, 2)) as u16,
        MatrixData::F16(b) => bf16::from_f32(f16::from_bits(u32::from_le_bytes(bytes(b, 2)) as u16).to_f32()).to_bits(),
        MatrixData::F32(b) => bf16::from_f32(f32::from_le_bytes(bytes(b, 4))).to_bits(),
        MatrixData::Fp8 { .. } => unreachable!("checked to be of one format"),
    }
}
