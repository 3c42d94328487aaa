//! The parts that workers load: a decoder layer without its routed experts, and one expert. Borrowed from the mapped
//! files: nothing is copied but norms, gates and scales.

use moesaic_kernels::{Matrix, MatrixData};

use crate::ModelError;
use crate::names::{FfnSpecs, LayerNames};
use crate::typed::Typed;

#[derive(Clone, Debug)]
pub struct LayerBlock<'a> {
    pub input_norm: Vec<f32>,
    pub mla: MlaBlock<'a>,
    pub post_norm: Vec<f32>,
    pub mlp: MlpBlock<'a>,
}

#[derive(Clone, Debug)]
pub struct MlaBlock<'a> {
    pub q: QueryBlock<'a>,
    /// [latent + rope, hidden]
    pub kv_a: Matrix<'a>,
    /// [latent]
    pub kv_a_norm: Vec<f32>,
    /// [heads * (nope + v), latent]; a head's rows are its nope rows, then its v rows
    pub kv_b: Matrix<'a>,
    /// [hidden, heads * v]
    pub o: Matrix<'a>,
}

#[derive(Clone, Debug)]
pub enum QueryBlock<'a> {
    /// [heads * (nope + rope), hidden]
    Direct(Matrix<'a>),
    /// a [rank, hidden], norm [rank], b [heads * (nope + rope), rank]
    LowRank { a: Matrix<'a>, norm: Vec<f32>, b: Matrix<'a> },
}

#[derive(Clone, Debug)]
pub enum MlpBlock<'a> {
    Dense(FfnBlock<'a>),
    Moe {
        /// [experts, hidden]
        gate: Vec<f32>,
        /// [experts]
        bias: Option<Vec<f32>>,
        /// All shared experts as one network.
        shared: Option<FfnBlock<'a>>,
    },
}

/// down(silu(gate x) * up x)
#[derive(Clone, Debug)]
pub struct FfnBlock<'a> {
    /// [width, hidden]
    pub gate: Matrix<'a>,
    /// [width, hidden]
    pub up: Matrix<'a>,
    /// [hidden, width]
    pub down: Matrix<'a>,
}

impl LayerBlock<'_> {
    /// Bytes of its matrices in the checkpoint.
    pub fn bytes(&self) -> u64 {
        let query = match &self.mla.q {
            QueryBlock::Direct(q) => bytes(q),
            QueryBlock::LowRank { a, b, .. } => bytes(a) + bytes(b),
        };
        let mlp = match &self.mlp {
            MlpBlock::Dense(ffn) => ffn.bytes(),
            MlpBlock::Moe { shared, .. } => shared.as_ref().map_or(0, FfnBlock::bytes),
        };
        query + bytes(&self.mla.kv_a) + bytes(&self.mla.kv_b) + bytes(&self.mla.o) + mlp
    }
}

impl FfnBlock<'_> {
    /// Bytes of its matrices in the checkpoint.
    pub fn bytes(&self) -> u64 {
        bytes(&self.gate) + bytes(&self.up) + bytes(&self.down)
    }
}

fn bytes(m: &Matrix<'_>) -> u64 {
    let bytes = match &m.data {
        MatrixData::F32(b) | MatrixData::F16(b) | MatrixData::Bf16(b) => b.len(),
        MatrixData::Fp8 { q, scales, .. } => q.len() + size_of_val(&**scales),
    };
    bytes as u64
}

impl<'a> Typed<'a> {
    pub fn layer(&self, layer: usize) -> Result<LayerBlock<'a>, ModelError> {
        let names = LayerNames { config: self.config, layer };
        Ok(LayerBlock {
            input_norm: self.vector(&names.input_norm())?,
            mla: self.mla(&names)?,
            post_norm: self.vector(&names.post_norm())?,
            mlp: if self.config.is_moe(layer) {
                MlpBlock::Moe {
                    gate: self.finite_matrix(&names.gate())?,
                    bias: names.gate_bias().map(|bias| self.vector(&bias)).transpose()?,
                    shared: names.shared().map(|ffn| self.ffn(&ffn)).transpose()?,
                }
            } else {
                MlpBlock::Dense(self.ffn(&names.dense())?)
            },
        })
    }

    fn mla(&self, names: &LayerNames<'_>) -> Result<MlaBlock<'a>, ModelError> {
        let q = match self.config.q_lora_rank {
            None => QueryBlock::Direct(self.matrix(&names.q())?),
            Some(rank) => QueryBlock::LowRank {
                a: self.matrix(&names.q_a(rank))?,
                norm: self.vector(&names.q_a_norm(rank))?,
                b: self.matrix(&names.q_b(rank))?,
            },
        };
        Ok(MlaBlock {
            q,
            kv_a: self.matrix(&names.kv_a())?,
            kv_a_norm: self.vector(&names.kv_a_norm())?,
            kv_b: self.matrix(&names.kv_b())?,
            o: self.matrix(&names.o())?,
        })
    }

    pub fn ffn(&self, [gate, up, down]: &FfnSpecs) -> Result<FfnBlock<'a>, ModelError> {
        Ok(FfnBlock { gate: self.matrix(gate)?, up: self.matrix(up)?, down: self.matrix(down)? })
    }
}
