//! The attention side of a checkpoint in a GPU's memory: everything but the routed experts.

use std::sync::Arc;

use moesaic_kernels::cuda::{Buffer, Device, GpuError, GpuFfn, GpuLinear, GpuPerHead, NotLoaded};
use moesaic_kernels::{GateParams, Matrix, RopeTable, bf16};
use moesaic_model::{Checkpoint, Config, FfnBlock, LayerBlock, MlaBlock, MlpBlock, ModelError, QueryBlock, load};

use crate::engine::weights::split;

pub struct Weights {
    checkpoint: Arc<Checkpoint>,
    pub layers: Vec<Layer>,
    pub final_norm: Buffer<f32>,
    /// [vocab, hidden]
    pub head: GpuLinear,
    /// bf16 [vocab, hidden]
    pub embedding: Buffer<u16>,
    /// [positions, rope / 2, 2]: cosines and sines
    pub turns: Buffer<f32>,
    pub gate_params: GateParams,
}

pub struct Layer {
    pub input_norm: Buffer<f32>,
    pub mla: Mla,
    pub post_norm: Buffer<f32>,
    pub mlp: Mlp,
}

pub struct Mla {
    pub q: Query,
    /// [latent + rope, hidden]
    pub kv_a: GpuLinear,
    pub kv_a_norm: Buffer<f32>,
    /// q_absorbed = q_nope W_UK: [latent, nope] a head.
    pub absorb: GpuPerHead,
    /// o = o_latent W_UVᵀ: [v, latent] a head.
    pub value_up: GpuPerHead,
    /// [hidden, heads * v]
    pub o: GpuLinear,
}

pub enum Query {
    Direct(GpuLinear),
    LowRank { a: GpuLinear, norm: Buffer<f32>, b: GpuLinear },
}

pub enum Mlp {
    Dense(GpuFfn),
    Moe {
        /// [experts, hidden]
        gate: Buffer<f32>,
        bias: Option<Vec<f32>>,
        shared: Option<GpuFfn>,
    },
}

impl Weights {
    /// Packs layers in parallel.
    pub fn load(checkpoint: Arc<Checkpoint>, device: &Device) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let failed = |what: String, error: NotLoaded| ModelError::file(checkpoint.dir(), format!("{what}: {error}"));
        let load = |layer| {
            let block = checkpoint.layer(layer)?;
            let loaded =
                Layer::load(config, &block, device).map_err(|error| failed(format!("layer {layer}"), error))?;
            checkpoint.release(block.matrices());
            Ok((loaded, block.bytes()))
        };
        let layers = load::all("layers", (0..config.num_hidden_layers).collect(), load)?;
        let (embedding, head) = (checkpoint.embedding()?, checkpoint.head()?);
        let rope = RopeTable::new(&config.rope_params(), config.max_position_embeddings);
        let rest = || -> Result<_, NotLoaded> {
            Ok((
                device.buffer_of(&checkpoint_rows(&embedding))?,
                GpuLinear::load(device, &head)?,
                device.buffer_of(rope.turns().as_flattened())?,
            ))
        };
        let (table, packed_head, turns) = rest().map_err(|error| failed("embedding and head".into(), error))?;
        let final_norm = device.buffer_of(&checkpoint.final_norm()?);
        checkpoint.release([&embedding, &head]);
        Ok(Self {
            layers,
            final_norm: final_norm.map_err(|error| failed("the final norm".into(), error.into()))?,
            head: packed_head,
            embedding: table,
            turns,
            gate_params: config.gate_params(),
            checkpoint,
        })
    }

    pub fn config(&self) -> &Config {
        self.checkpoint.config()
    }

    /// Bytes of the matrices.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>()
            + self.head.bytes()
            + self.embedding.len() * size_of::<u16>()
    }
}

fn checkpoint_rows(m: &Matrix<'_>) -> Vec<u16> {
    let (mut row, mut values) = (vec![0.0; m.cols], Vec::with_capacity(m.rows * m.cols));
    for i in 0..m.rows {
        m.row_to_f32(i, &mut row);
        values.extend(row.iter().map(|x| bf16::from_f32(*x).to_bits()));
    }
    values
}

impl Layer {
    fn load(c: &Config, block: &LayerBlock<'_>, device: &Device) -> Result<Self, NotLoaded> {
        let ffn = |ffn: &FfnBlock<'_>| GpuFfn::load(device, &ffn.gate, &ffn.up, &ffn.down);
        let vector = |values: &[f32]| -> Result<Buffer<f32>, GpuError> { device.buffer_of(values) };
        Ok(Self {
            input_norm: vector(&block.input_norm)?,
            mla: Mla::load(c, &block.mla, device)?,
            post_norm: vector(&block.post_norm)?,
            mlp: match &block.mlp {
                MlpBlock::Dense(dense) => Mlp::Dense(ffn(dense)?),
                MlpBlock::Moe { gate, bias, shared } => {
                    Mlp::Moe { gate: vector(gate)?, bias: bias.clone(), shared: shared.as_ref().map(ffn).transpose()? }
                }
            },
        })
    }

    fn bytes(&self) -> usize {
        let Mla { q, kv_a, absorb, value_up, o, .. } = &self.mla;
        let query = match q {
            Query::Direct(q) => q.bytes(),
            Query::LowRank { a, b, .. } => a.bytes() + b.bytes(),
        };
        let mlp = match &self.mlp {
            Mlp::Dense(ffn) => ffn.bytes(),
            Mlp::Moe { gate, shared, .. } => size_of::<f32>() * gate.len() + shared.as_ref().map_or(0, GpuFfn::bytes),
        };
        query + kv_a.bytes() + absorb.bytes() + value_up.bytes() + o.bytes() + mlp
    }
}

impl Mla {
    fn load(c: &Config, block: &MlaBlock<'_>, device: &Device) -> Result<Self, NotLoaded> {
        let [_, absorb, value_up] = split(c, &block.kv_b);
        let (heads, latent) = (c.num_attention_heads, c.kv_lora_rank);
        Ok(Self {
            q: match &block.q {
                QueryBlock::Direct(q) => Query::Direct(GpuLinear::load(device, q)?),
                QueryBlock::LowRank { a, norm, b } => Query::LowRank {
                    a: GpuLinear::load(device, a)?,
                    norm: device.buffer_of(norm)?,
                    b: GpuLinear::load(device, b)?,
                },
            },
            kv_a: GpuLinear::load(device, &block.kv_a)?,
            kv_a_norm: device.buffer_of(&block.kv_a_norm)?,
            absorb: GpuPerHead::load(device, heads, latent, c.qk_nope_head_dim, &absorb)?,
            value_up: GpuPerHead::load(device, heads, c.v_head_dim, latent, &value_up)?,
            o: GpuLinear::load(device, &block.o)?,
        })
    }
}
