//! `config.json` of `deepseek_v2` and `deepseek_v3`: every number checked once, here. What passes cannot overflow a
//! size, divide by zero or ask for more experts than there are, so the rest of the code computes without looking back.

mod fields;
mod rope;
mod routing;

use std::path::Path;

use moesaic_kernels::{GateParams, GroupScore, RopeParams, Scoring, Yarn, softmax_scale};
use serde::Serialize;

use crate::ModelError;
use crate::json::read_text;
use fields::Fields;

pub(crate) const CONFIG_FILE: &str = "config.json";
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Upper bounds, several times beyond the largest public model. Every product that the code forms of them fits 63 bits.
const LAYERS_MAX: usize = 256;
const MTP_LAYERS_MAX: usize = 8;
const EXPERTS_MAX: usize = 4096;
const VOCAB_MAX: usize = 1 << 24;
const HIDDEN_MAX: usize = 1 << 17;
const INTERMEDIATE_MAX: usize = 1 << 20;
const HEADS_MAX: usize = 4096;
const HEAD_DIM_MAX: usize = 4096;
const RANK_MAX: usize = 1 << 16;
const POSITIONS_MAX: usize = 1 << 22;
const FP8_BLOCK_MAX: usize = 1 << 16;
/// Experts of a model without groups are summed in this many fixed blocks.
const UNGROUPED_BLOCKS: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    DeepseekV2,
    DeepseekV3,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringFunc {
    Sigmoid,
    Softmax,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TopkMethod {
    /// The best experts of all.
    Greedy,
    /// The best experts of the groups with the best single expert.
    GroupLimitedGreedy,
    /// V3: a bias that only chooses; groups by the sum of their two best.
    NoauxTc,
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct YarnScaling {
    pub factor: f64,
    pub original_max_position_embeddings: usize,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub mscale: f64,
    pub mscale_all_dim: f64,
}

/// FP8 e4m3 weights with one scale a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Quantization {
    /// weight_block_size: rows, columns.
    pub block: [usize; 2],
    /// Scales are powers of two.
    pub ue8m0: bool,
}

/// A validated config.json; names as in the file.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Config {
    pub model_type: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub moe_intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_nextn_predict_layers: usize,
    pub num_attention_heads: usize,
    pub q_lora_rank: Option<usize>,
    pub kv_lora_rank: usize,
    pub qk_nope_head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    /// 0: every layer is dense.
    pub n_routed_experts: usize,
    pub n_shared_experts: usize,
    pub num_experts_per_tok: usize,
    pub n_group: usize,
    pub topk_group: usize,
    pub first_k_dense_replace: usize,
    pub moe_layer_freq: usize,
    pub routed_scaling_factor: f32,
    pub norm_topk_prob: bool,
    pub scoring_func: ScoringFunc,
    pub topk_method: TopkMethod,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub rope_scaling: Option<YarnScaling>,
    pub max_position_embeddings: usize,
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
    pub tie_word_embeddings: bool,
    pub quantization: Option<Quantization>,
}

impl Config {
    /// Reads `config.json` of a checkpoint's folder.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        Self::read_all(dir).map_err(|mut problems| problems.swap_remove(0))
    }

    /// All that is wrong with it, never an empty list.
    pub(crate) fn read_all(dir: &Path) -> Result<Self, Vec<ModelError>> {
        Self::read_file(&dir.join(CONFIG_FILE))
    }

    /// A config.json by itself. All that is wrong with it, never an empty list.
    pub fn read_file(file: &Path) -> Result<Self, Vec<ModelError>> {
        let text = read_text(file, CONFIG_BYTES_MAX).map_err(|e| vec![e])?;
        Self::parse(file, &text)
    }

    /// `file` is for the words of the errors only.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Vec<ModelError>> {
        let fields = Fields::parse(file, text).map_err(|e| vec![e])?;
        let families = [("deepseek_v2", Family::DeepseekV2), ("deepseek_v3", Family::DeepseekV3)];
        let model_type = fields.choice("model_type", &families, None);
        // Another family's fields are not wrong, they are another family's.
        let config = fields.is_right().then(|| Self::from_fields(&fields, model_type));
        let problems = fields.into_problems();
        config.filter(|_| problems.is_empty()).ok_or(problems)
    }

    /// A field that is wrong is noted in `f` and stands for its least value until the end.
    fn from_fields(f: &Fields<'_>, model_type: Family) -> Self {
        refuse_what_is_not_built(f);
        let routing = routing::Routing::read(f, model_type);
        let layers = f.count("num_hidden_layers", 1..=LAYERS_MAX);
        let dense = if routing.experts > 0 { f.count_or("first_k_dense_replace", 0, 0..=layers) } else { layers };
        let vocab_size = f.count("vocab_size", 1..=VOCAB_MAX);
        let max_position_embeddings = f.count("max_position_embeddings", 1..=POSITIONS_MAX);
        let heads = f.count("num_attention_heads", 1..=HEADS_MAX);
        if f.given("num_key_value_heads") && f.count("num_key_value_heads", 1..=HEADS_MAX) != heads {
            f.problem("num_key_value_heads", &format!("num_attention_heads, {heads}"));
        }
        let qk_rope_head_dim = f.count("qk_rope_head_dim", 2..=HEAD_DIM_MAX);
        if !qk_rope_head_dim.is_multiple_of(2) {
            f.problem("qk_rope_head_dim", "an even number");
        }
        let (rope_theta, rope_scaling) = rope::read(f);
        Self {
            model_type,
            vocab_size,
            hidden_size: f.count("hidden_size", 1..=HIDDEN_MAX),
            intermediate_size: f.count("intermediate_size", 1..=INTERMEDIATE_MAX),
            moe_intermediate_size: routing.width,
            num_hidden_layers: layers,
            num_nextn_predict_layers: f.count_or("num_nextn_predict_layers", 0, 0..=MTP_LAYERS_MAX),
            num_attention_heads: heads,
            q_lora_rank: f.given("q_lora_rank").then(|| f.count("q_lora_rank", 1..=RANK_MAX)),
            kv_lora_rank: f.count("kv_lora_rank", 1..=RANK_MAX),
            qk_nope_head_dim: f.count("qk_nope_head_dim", 1..=HEAD_DIM_MAX),
            qk_rope_head_dim,
            v_head_dim: f.count("v_head_dim", 1..=HEAD_DIM_MAX),
            n_routed_experts: routing.experts,
            n_shared_experts: routing.shared,
            num_experts_per_tok: routing.top_k,
            n_group: routing.groups,
            topk_group: routing.groups_kept,
            first_k_dense_replace: dense,
            moe_layer_freq: f.count_or("moe_layer_freq", 1, 1..=LAYERS_MAX),
            routed_scaling_factor: routing.scale,
            norm_topk_prob: routing.normalize,
            scoring_func: routing.scoring,
            topk_method: routing.method,
            rms_norm_eps: f.number_or("rms_norm_eps", 1e-6, 1e-12..=1.0) as f32,
            rope_theta,
            rope_scaling,
            max_position_embeddings,
            eos_token_ids: f.token_ids("eos_token_id", vocab_size),
            bos_token_id: f.token_ids("bos_token_id", vocab_size).first().copied(),
            tie_word_embeddings: f.flag_or("tie_word_embeddings", false),
            quantization: f.section("quantization_config").map(|q| read_quantization(&q)),
        }
    }

    pub fn is_moe(&self, layer: usize) -> bool {
        self.n_routed_experts > 0 && layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq)
    }

    /// Layers with routed experts, ascending.
    pub fn moe_layers(&self) -> Vec<usize> {
        (0..self.num_hidden_layers).filter(|&layer| self.is_moe(layer)).collect()
    }

    pub fn gate_params(&self) -> GateParams {
        let greedy = self.topk_method == TopkMethod::Greedy;
        let noaux = self.topk_method == TopkMethod::NoauxTc;
        GateParams {
            scoring: match self.scoring_func {
                ScoringFunc::Sigmoid => Scoring::Sigmoid,
                ScoringFunc::Softmax => Scoring::Softmax,
            },
            groups: if greedy { 1 } else { self.n_group },
            groups_kept: if greedy { 1 } else { self.topk_group },
            top_k: self.num_experts_per_tok,
            group_score: if noaux { GroupScore::TopTwoSum } else { GroupScore::Max },
            mask: if noaux { f32::NEG_INFINITY } else { 0.0 },
            normalize: self.norm_topk_prob,
            scale: if self.model_type == Family::DeepseekV2 && self.norm_topk_prob {
                1.0
            } else {
                self.routed_scaling_factor
            },
        }
    }

    pub fn rope_params(&self) -> RopeParams {
        RopeParams {
            dim: self.qk_rope_head_dim,
            theta: self.rope_theta,
            yarn: self.rope_scaling.map(|y| Yarn {
                factor: y.factor,
                original_positions: y.original_max_position_embeddings,
                beta_fast: y.beta_fast,
                beta_slow: y.beta_slow,
                mscale: y.mscale,
                mscale_all_dim: y.mscale_all_dim,
            }),
        }
    }

    pub fn softmax_scale(&self) -> f32 {
        softmax_scale(self.qk_head_dim(), &self.rope_params())
    }

    /// In how many groups a layer's experts are summed (rule 1): the gate's, else fixed blocks of ceil(experts / 8).
    pub fn logical_groups(&self) -> usize {
        if self.n_group > 1 { self.n_group } else { UNGROUPED_BLOCKS }
    }

    /// Values of the latent cache for a token and layer.
    pub fn latent_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// The gate has a bias that only chooses.
    pub fn has_gate_bias(&self) -> bool {
        self.topk_method == TopkMethod::NoauxTc
    }
}

fn refuse_what_is_not_built(f: &Fields<'_>) {
    f.choice("hidden_act", &[("silu", ())], Some(()));
    for name in ["attention_bias", "mlp_bias"] {
        if f.flag_or(name, false) {
            f.problem(name, "false");
        }
    }
}

fn read_quantization(q: &Fields<'_>) -> Quantization {
    q.choice("quant_method", &[("fp8", ())], None);
    q.choice("fmt", &[("e4m3", ())], Some(()));
    Quantization {
        block: q.pair("weight_block_size", 1..=FP8_BLOCK_MAX),
        ue8m0: q.choice("scale_fmt", &[("ue8m0", true), ("float", false)], Some(false)),
    }
}
