//! The attention side of a checkpoint, packed for the kernels: everything but the routed experts.

use std::sync::Arc;

use moesaic_kernels::{Dtype, Ffn, GateParams, Linear, Matrix, MatrixData, Numerics, PerHead, RopeTable};
use moesaic_model::{Checkpoint, Config, FfnBlock, LayerBlock, MlaBlock, MlpBlock, ModelError, QueryBlock, load};

pub struct Weights {
    checkpoint: Arc<Checkpoint>,
    pub numerics: Numerics,
    pub layers: Vec<Layer>,
    pub final_norm: Vec<f32>,
    /// [vocab, hidden]
    pub head: Linear,
    pub rope: RopeTable,
    pub gate_params: GateParams,
}

pub struct Layer {
    pub input_norm: Vec<f32>,
    pub mla: Mla,
    pub post_norm: Vec<f32>,
    pub mlp: Mlp,
}

pub struct Mla {
    pub q: Query,
    /// [latent + rope, hidden]
    pub kv_a: Linear,
    pub kv_a_norm: Vec<f32>,
    /// k_nope = latent W_UKᵀ: [nope, latent] a head. For the expanded form.
    pub key_up: PerHead,
    /// q_absorbed = q_nope W_UK: [latent, nope] a head. For the absorbed form.
    pub absorb: PerHead,
    /// v = latent W_UVᵀ, o = o_latent W_UVᵀ: [v, latent] a head. For both.
    pub value_up: PerHead,
    /// [hidden, heads * v]
    pub o: Linear,
}

pub enum Query {
    Direct(Linear),
    LowRank { a: Linear, norm: Vec<f32>, b: Linear },
}

pub enum Mlp {
    Dense(Ffn),
    Moe {
        /// [experts, hidden], always f32
        gate: Linear,
        bias: Option<Vec<f32>>,
        shared: Option<Ffn>,
    },
}

impl Weights {
    /// Packs layers in parallel.
    pub fn load(checkpoint: Arc<Checkpoint>, numerics: Numerics) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let pack = |layer| {
            let block = checkpoint.layer(layer)?;
            let layer = Layer::pack(config, &block, numerics);
            checkpoint.release(block.matrices());
            Ok((layer, block.bytes()))
        };
        let layers = load::all("layers", (0..config.num_hidden_layers).collect(), pack)?;
        checkpoint.embedding()?;
        let head = checkpoint.head()?;
        let packed_head = Linear::pack(&head, numerics.unquantised());
        checkpoint.release([&head]);
        Ok(Self {
            numerics,
            layers,
            final_norm: checkpoint.final_norm()?,
            head: packed_head,
            rope: RopeTable::new(&config.rope_params(), config.max_position_embeddings),
            gate_params: config.gate_params(),
            checkpoint,
        })
    }

    pub fn config(&self) -> &Config {
        self.checkpoint.config()
    }

    /// Replaces `rows` by the tokens' rows [tokens, hidden], from the mapped file.
    pub fn embed(&self, tokens: impl Iterator<Item = u32>, rows: &mut Vec<f32>) {
        let embedding = self.checkpoint.embedding().expect("it was there when the weights were loaded");
        rows.clear();
        for token in tokens {
            let start = rows.len();
            rows.resize(start + embedding.cols, 0.0);
            embedding.row_to_f32(token as usize, &mut rows[start..]);
        }
    }

    /// Bytes of the packed matrices.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>() + self.head.bytes()
    }
}

impl Layer {
    fn pack(c: &Config, block: &LayerBlock<'_>, n: Numerics) -> Self {
        let ffn = |ffn: &FfnBlock<'_>| Ffn::pack(&ffn.gate, &ffn.up, &ffn.down, n);
        Self {
            input_norm: block.input_norm.clone(),
            mla: Mla::pack(c, &block.mla, n),
            post_norm: block.post_norm.clone(),
            mlp: match &block.mlp {
                MlpBlock::Dense(dense) => Mlp::Dense(ffn(dense)),
                MlpBlock::Moe { gate, bias, shared } => Mlp::Moe {
                    gate: Linear::pack_f32(c.n_routed_experts, c.hidden_size, gate, n.as_f32()),
                    bias: bias.clone(),
                    shared: shared.as_ref().map(ffn),
                },
            },
        }
    }

    fn bytes(&self) -> usize {
        let Mla { q, kv_a, key_up, absorb, value_up, o, .. } = &self.mla;
        let query = match q {
            Query::Direct(q) => q.bytes(),
            Query::LowRank { a, b, .. } => a.bytes() + b.bytes(),
        };
        let mlp = match &self.mlp {
            Mlp::Dense(ffn) => ffn.bytes(),
            Mlp::Moe { gate, shared, .. } => gate.bytes() + shared.as_ref().map_or(0, Ffn::bytes),
        };
        query + kv_a.bytes() + key_up.bytes() + absorb.bytes() + value_up.bytes() + o.bytes() + mlp
    }
}

impl Mla {
    fn pack(c: &Config, block: &MlaBlock<'_>, n: Numerics) -> Self {
        let [key_up, absorb, value_up] = split(c, &block.kv_b);
        let (heads, latent) = (c.num_attention_heads, c.kv_lora_rank);
        let per_head = numerics_per_head(&block.kv_b, n);
        Self {
            q: match &block.q {
                QueryBlock::Direct(q) => Query::Direct(Linear::pack(q, n)),
                QueryBlock::LowRank { a, norm, b } => {
                    Query::LowRank { a: Linear::pack(a, n), norm: norm.clone(), b: Linear::pack(b, n) }
                }
            },
            kv_a: Linear::pack(&block.kv_a, n),
            kv_a_norm: block.kv_a_norm.clone(),
            key_up: PerHead::pack_f32(heads, c.qk_nope_head_dim, latent, &key_up, per_head),
            absorb: PerHead::pack_f32(heads, latent, c.qk_nope_head_dim, &absorb, per_head),
            value_up: PerHead::pack_f32(heads, c.v_head_dim, latent, &value_up, per_head),
            o: Linear::pack(&block.o, n),
        }
    }
}

/// In which kv_b is computed: FP8 with its scales is not exact in bf16, which nothing else is rounded to where products are of f32.
pub(super) fn numerics_per_head(kv_b: &Matrix<'_>, n: Numerics) -> Numerics {
    let is_exact = !matches!(kv_b.data, MatrixData::Fp8 { .. });
    if is_exact || n.activations() == Dtype::Bf16 { n } else { n.as_f32() }
}

/// kv_b [heads * (nope + v), latent] as [heads, nope, latent], the same turned to [heads, latent, nope], and [heads, v, latent].
pub(super) fn split(c: &Config, kv_b: &Matrix<'_>) -> [Vec<f32>; 3] {
    let (nope, v, latent) = (c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank);
    let [mut key_up, mut absorb, mut value_up] = [const { Vec::new() }; 3];
    for rows in kv_b.to_f32().chunks_exact((nope + v) * latent) {
        let (keys, values) = rows.split_at(nope * latent);
        key_up.extend_from_slice(keys);
        absorb.extend((0..latent * nope).map(|i| keys[i % nope * latent + i / nope]));
        value_up.extend_from_slice(values);
    }
    [key_up, absorb, value_up]
}
