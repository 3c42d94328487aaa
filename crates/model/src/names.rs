//! Every tensor of a checkpoint: its name, shape and owner. The one place that spells names and shapes.

use crate::Config;

/// Who needs a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// Attention workers: everything of the main model but the routed experts.
    Attention,
    /// Expert workers: the routed experts.
    Expert,
    /// The multi-token prediction layers, which no worker loads yet. A checkpoint may lack them.
    Mtp,
}

/// What a tensor is to arithmetic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A norm's weight or the gate's bias: read as f32.
    Vector,
    /// A matrix that stays as it is: embedding, head, gate, eh_proj.
    Plain,
    /// A matrix that may be FP8 with scales beside it.
    Linear,
}

#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub name: String,
    /// [values], or [rows, columns].
    pub shape: Vec<usize>,
    pub kind: Kind,
    pub owner: Owner,
}

impl Spec {
    pub fn values(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    pub fn scale_name(&self) -> String {
        format!("{}_scale_inv", self.name)
    }
}

/// gate, up, down of one feed-forward network.
pub(crate) type FfnSpecs = [Spec; 3];

pub(crate) fn embedding(c: &Config) -> Spec {
    top("model.embed_tokens.weight", vec![c.vocab_size, c.hidden_size], Kind::Plain)
}

pub(crate) fn final_norm(c: &Config) -> Spec {
    top("model.norm.weight", vec![c.hidden_size], Kind::Vector)
}

/// The head's own matrix; a tied model has none.
pub(crate) fn head(c: &Config) -> Spec {
    top("lm_head.weight", vec![c.vocab_size, c.hidden_size], Kind::Plain)
}

fn top(name: &str, shape: Vec<usize>, kind: Kind) -> Spec {
    Spec { name: name.to_owned(), shape, kind, owner: Owner::Attention }
}

/// The tensors of one decoder layer; from `num_hidden_layers` on these are the MTP layers.
#[derive(Clone, Copy)]
pub(crate) struct LayerNames<'a> {
    pub config: &'a Config,
    pub layer: usize,
}

impl LayerNames<'_> {
    pub fn input_norm(&self) -> Spec {
        self.norm("input_layernorm", self.config.hidden_size)
    }

    pub fn post_norm(&self) -> Spec {
        self.norm("post_attention_layernorm", self.config.hidden_size)
    }

    /// Without q_lora_rank.
    pub fn q(&self) -> Spec {
        self.linear("self_attn.q_proj", self.query_rows(), self.config.hidden_size)
    }

    pub fn q_a(&self, rank: usize) -> Spec {
        self.linear("self_attn.q_a_proj", rank, self.config.hidden_size)
    }

    pub fn q_a_norm(&self, rank: usize) -> Spec {
        self.norm("self_attn.q_a_layernorm", rank)
    }

    pub fn q_b(&self, rank: usize) -> Spec {
        self.linear("self_attn.q_b_proj", self.query_rows(), rank)
    }

    pub fn kv_a(&self) -> Spec {
        self.linear("self_attn.kv_a_proj_with_mqa", self.config.latent_width(), self.config.hidden_size)
    }

    pub fn kv_a_norm(&self) -> Spec {
        self.norm("self_attn.kv_a_layernorm", self.config.kv_lora_rank)
    }

    pub fn kv_b(&self) -> Spec {
        let c = self.config;
        self.linear("self_attn.kv_b_proj", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    }

    pub fn o(&self) -> Spec {
        let c = self.config;
        self.linear("self_attn.o_proj", c.hidden_size, c.num_attention_heads * c.v_head_dim)
    }

    pub fn gate(&self) -> Spec {
        let shape = vec![self.config.n_routed_experts, self.config.hidden_size];
        self.spec("mlp.gate.weight", shape, Kind::Plain, Owner::Attention)
    }

    pub fn gate_bias(&self) -> Option<Spec> {
        let shape = vec![self.config.n_routed_experts];
        let bias = || self.spec("mlp.gate.e_score_correction_bias", shape, Kind::Vector, Owner::Attention);
        self.config.has_gate_bias().then(bias)
    }

    pub fn dense(&self) -> FfnSpecs {
        self.ffn("mlp", self.config.intermediate_size, Owner::Attention)
    }

    pub fn shared(&self) -> Option<FfnSpecs> {
        let width = self.config.n_shared_experts * self.config.moe_intermediate_size;
        (width > 0).then(|| self.ffn("mlp.shared_experts", width, Owner::Attention))
    }

    pub fn expert(&self, expert: usize) -> FfnSpecs {
        self.ffn(&format!("mlp.experts.{expert}"), self.config.moe_intermediate_size, Owner::Expert)
    }

    /// Everything of the layer.
    pub fn all(&self) -> Vec<Spec> {
        let mut specs = vec![self.input_norm(), self.post_norm(), self.kv_a(), self.kv_a_norm(), self.kv_b(), self.o()];
        match self.config.q_lora_rank {
            None => specs.push(self.q()),
            Some(rank) => specs.extend([self.q_a(rank), self.q_a_norm(rank), self.q_b(rank)]),
        }
        if !self.config.is_moe(self.layer) {
            specs.extend(self.dense());
            return specs;
        }
        specs.push(self.gate());
        specs.extend(self.gate_bias());
        specs.extend(self.shared().into_iter().flatten());
        specs.extend((0..self.config.n_routed_experts).flat_map(|e| self.expert(e)));
        specs
    }

    /// What an MTP layer has beside a decoder layer. Its embedding and head are copies of the main model's.
    fn mtp_only(&self) -> Vec<Spec> {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        vec![
            self.norm("enorm", hidden),
            self.norm("hnorm", hidden),
            self.norm("shared_head.norm", hidden),
            self.spec("eh_proj.weight", vec![hidden, 2 * hidden], Kind::Plain, Owner::Mtp),
            self.spec("embed_tokens.weight", vec![vocab, hidden], Kind::Plain, Owner::Mtp),
            self.spec("shared_head.head.weight", vec![vocab, hidden], Kind::Plain, Owner::Mtp),
        ]
    }

    fn query_rows(&self) -> usize {
        self.config.num_attention_heads * self.config.qk_head_dim()
    }

    fn ffn(&self, prefix: &str, width: usize, owner: Owner) -> FfnSpecs {
        let hidden = self.config.hidden_size;
        [("gate_proj", [width, hidden]), ("up_proj", [width, hidden]), ("down_proj", [hidden, width])]
            .map(|(name, shape)| self.spec(&format!("{prefix}.{name}.weight"), shape.to_vec(), Kind::Linear, owner))
    }

    fn linear(&self, name: &str, rows: usize, cols: usize) -> Spec {
        self.spec(&format!("{name}.weight"), vec![rows, cols], Kind::Linear, Owner::Attention)
    }

    fn norm(&self, name: &str, values: usize) -> Spec {
        self.spec(&format!("{name}.weight"), vec![values], Kind::Vector, Owner::Attention)
    }

    fn spec(&self, name: &str, shape: Vec<usize>, kind: Kind, owner: Owner) -> Spec {
        let owner = if self.layer < self.config.num_hidden_layers { owner } else { Owner::Mtp };
        Spec { name: format!("model.layers.{}.{name}", self.layer), shape, kind, owner }
    }
}

/// Every tensor that the main model must have, one layer at a time: a config may promise millions that no file has.
pub(crate) fn main_model(c: &Config) -> impl Iterator<Item = Spec> {
    let head = (!c.tie_word_embeddings).then(|| head(c));
    let layers = (0..c.num_hidden_layers).flat_map(|layer| LayerNames { config: c, layer }.all());
    [embedding(c), final_norm(c)].into_iter().chain(head).chain(layers)
}

/// Every tensor that the MTP layers may have.
pub(crate) fn mtp(c: &Config) -> impl Iterator<Item = Spec> {
    let layers = c.num_hidden_layers..c.num_hidden_layers + c.num_nextn_predict_layers;
    let names = layers.map(|layer| LayerNames { config: c, layer });
    names.flat_map(|n| [n.all(), n.mtp_only()].concat())
}
