//! The attention side of a checkpoint in a GPU's memory: everything but the routed experts.

use moesaic_kernels::cuda::{
    Buffer, Device, GpuError, GpuFfn, GpuLinear, GpuPerHead, NotLoaded, can_route, random_bf16,
};
use moesaic_kernels::{GateParams, Matrix, RopeTable, bf16};
use moesaic_model::{Checkpoint, Config, FfnBlock, LayerBlock, MlaBlock, MlpBlock, ModelError, QueryBlock, load};

use crate::engine::weights::split;

pub struct Weights {
    config: Config,
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
        bias: Option<Buffer<f32>>,
        shared: Option<GpuFfn>,
    },
}

impl Weights {
    /// Packs layers in parallel.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let (gate, experts) = (config.gate_params(), config.n_routed_experts);
        if experts > 0 && !can_route(&gate, experts) {
            let what = format!("{experts} experts in {} groups, {} of a row", gate.groups, gate.top_k);
            let most = "on a GPU there can be at most 256 experts, 32 groups, and 32 experts of a row";
            return Err(ModelError::file(checkpoint.dir(), format!("{what}: {most}")));
        }
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
            config: config.clone(),
        })
    }

    /// Random ones of a model's shape, made on the GPU: to measure with.
    pub fn random(config: &Config, device: &Device, seed: u64) -> Result<Self, GpuError> {
        let mut random = Random { device, is_fp8: config.quantization.is_some(), seed: seed << 20 };
        let layer = |layer| Layer::random(config, layer, &mut random);
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let rope = RopeTable::new(&config.rope_params(), config.max_position_embeddings);
        Ok(Self {
            layers,
            final_norm: random.norm(hidden)?,
            head: GpuLinear::random(device, [hidden, vocab], false, random.next())?,
            embedding: random_bf16(device, vocab * hidden, 1.0, random.next())?,
            turns: device.buffer_of(rope.turns().as_flattened())?,
            gate_params: config.gate_params(),
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Experts that a row goes to.
    pub fn choices_of_row(&self) -> usize {
        self.gate_params.top_k.min(self.config.n_routed_experts)
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
                MlpBlock::Moe { gate, bias, shared } => Mlp::Moe {
                    gate: vector(gate)?,
                    bias: bias.as_deref().map(vector).transpose()?,
                    shared: shared.as_ref().map(ffn).transpose()?,
                },
            },
        })
    }

    fn random(c: &Config, layer: usize, random: &mut Random<'_>) -> Result<Self, GpuError> {
        let hidden = c.hidden_size;
        let moe = |random: &mut Random<'_>| -> Result<Mlp, GpuError> {
            let shared = c.n_shared_experts * c.moe_intermediate_size;
            // Rows that differ: all experts are chosen by some row.
            let gate: Vec<f32> =
                (0..c.n_routed_experts * hidden).map(|i| (i * 7919 % 2003) as f32 / 2e4 - 0.05).collect();
            Ok(Mlp::Moe {
                gate: random.device.buffer_of(&gate)?,
                bias: None,
                shared: (shared > 0).then(|| random.ffn(hidden, shared)).transpose()?,
            })
        };
        Ok(Self {
            input_norm: random.norm(hidden)?,
            mla: Mla::random(c, random)?,
            post_norm: random.norm(hidden)?,
            mlp: match c.is_moe(layer) {
                true => moe(random)?,
                false => Mlp::Dense(random.ffn(hidden, c.intermediate_size)?),
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

    fn random(c: &Config, random: &mut Random<'_>) -> Result<Self, GpuError> {
        let (hidden, heads, latent, v) = (c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.v_head_dim);
        let q_width = heads * c.qk_head_dim();
        Ok(Self {
            q: match c.q_lora_rank {
                None => Query::Direct(random.linear(hidden, q_width)?),
                Some(rank) => Query::LowRank {
                    a: random.linear(hidden, rank)?,
                    norm: random.norm(rank)?,
                    b: random.linear(rank, q_width)?,
                },
            },
            kv_a: random.linear(hidden, c.latent_width())?,
            kv_a_norm: random.norm(latent)?,
            absorb: GpuPerHead::random(random.device, heads, [c.qk_nope_head_dim, latent], random.next())?,
            value_up: GpuPerHead::random(random.device, heads, [latent, v], random.next())?,
            o: random.linear(heads * v, hidden)?,
        })
    }
}

/// Makes random weights, each from a seed of its own.
struct Random<'d> {
    device: &'d Device,
    is_fp8: bool,
    seed: u64,
}

impl Random<'_> {
    fn next(&mut self) -> u64 {
        self.seed += 1;
        self.seed
    }

    fn linear(&mut self, in_: usize, out: usize) -> Result<GpuLinear, GpuError> {
        let seed = self.next();
        GpuLinear::random(self.device, [in_, out], self.is_fp8, seed)
    }

    fn ffn(&mut self, hidden: usize, width: usize) -> Result<GpuFfn, GpuError> {
        let seed = self.next();
        GpuFfn::random(self.device, [hidden, width, hidden], self.is_fp8, seed)
    }

    fn norm(&self, len: usize) -> Result<Buffer<f32>, GpuError> {
        self.device.buffer_of(&vec![1.0; len])
    }
}
