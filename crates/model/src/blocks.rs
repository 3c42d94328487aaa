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

impl<'a> LayerBlock<'a> {
    /// Without norms and gate, which are copies.
    pub fn matrices(&self) -> Vec<&Matrix<'a>> {
        let MlaBlock { q, kv_a, kv_b, o, .. } = &self.mla;
        let mut all = vec![kv_a, kv_b, o];
        match q {
            QueryBlock::Direct(q) => all.push(q),
            QueryBlock::LowRank { a, b, .. } => all.extend([a, b]),
        }
        match &self.mlp {
            MlpBlock::Dense(ffn) => all.extend(ffn.matrices()),
            MlpBlock::Moe { shared, .. } => all.extend(shared.iter().flat_map(FfnBlock::matrices)),
        }
        all
    }

    /// Bytes of its matrices in the checkpoint.
    pub fn bytes(&self) -> u64 {
        self.matrices().into_iter().map(bytes).sum()
    }
}

impl<'a> FfnBlock<'a> {
    pub fn matrices(&self) -> [&Matrix<'a>; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Bytes of its matrices in the checkpoint.
    pub fn bytes(&self) -> u64 {
        self.matrices().into_iter().map(bytes).sum()
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
        self.check_alike(gate, up)?;
        Ok(FfnBlock { gate: self.matrix(gate)?, up: self.matrix(up)?, down: self.matrix(down)? })
    }
}
