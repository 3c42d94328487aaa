//! The whole model in f32 and plain loops, in the expanded form: keys and values are made for every head, nothing is
//! absorbed, cached or batched. Slow, and takes nothing from `moesaic_kernels` but the decoding of stored numbers: what the
//! fast path is held against.
//!
//! ```text
//! h = embedding[token]
//! each layer:   h += attention(norm(h));   h += dense(norm(h)) or moe(norm(h))
//! logits = head norm(h)
//! ```
//! T tokens, D hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, L kv_lora_rank, E experts.
//! Every matrix is [rows = out, cols = in].

use std::f64::consts::PI;

use moesaic_kernels::Matrix;

use crate::config::{ScoringFunc, TopkMethod, YarnScaling};
use crate::{Checkpoint, Config, Family, FfnBlock, MlaBlock, MlpBlock, ModelError, QueryBlock};

/// The logits [T, vocab] after each token of one sequence.
pub fn forward(c: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
    let config = c.config();
    let eps = config.rms_norm_eps;
    let mut h = embed(c, tokens)?;
    for layer in 0..config.num_hidden_layers {
        let block = c.layer(layer)?;
        let x = rms_norm(&h, &block.input_norm, eps);
        add(&mut h, &attention(config, &block.mla, &x));
        let x = rms_norm(&h, &block.post_norm, eps);
        let y = match &block.mlp {
            MlpBlock::Dense(ffn) => feed_forward(ffn, &x),
            MlpBlock::Moe { gate, bias, shared } => {
                let mut y = routed(c, layer, gate, bias.as_deref(), &x)?;
                if let Some(shared) = shared {
                    add(&mut y, &feed_forward(shared, &x));
                }
                y
            }
        };
        add(&mut h, &y);
    }
    Ok(linear(&rms_norm(&h, &c.final_norm()?, eps), &c.head()?))
}

/// [T, D]
fn embed(c: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
    let (vocab_size, hidden) = (c.config().vocab_size, c.config().hidden_size);
    let embedding = c.embedding()?;
    let mut h = vec![0.0; tokens.len() * hidden];
    for (position, (&token, row)) in tokens.iter().zip(h.chunks_exact_mut(hidden)).enumerate() {
        if token as usize >= vocab_size {
            return Err(ModelError::Token { token, position, vocab_size });
        }
        embedding.row_to_f32(token as usize, row);
    }
    Ok(h)
}

/// x [T, D] to [T, D].
fn attention(c: &Config, mla: &MlaBlock<'_>, x: &[f32]) -> Vec<f32> {
    let (heads, nope, rope, v_dim) = (c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim);
    let tokens = x.len() / c.hidden_size;
    // q [T, H, N + P]
    let mut q = match &mla.q {
        QueryBlock::Direct(q) => linear(x, q),
        QueryBlock::LowRank { a, norm, b } => linear(&rms_norm(&linear(x, a), norm, c.rms_norm_eps), b),
    };
    // latent [T, L] and one roped key [T, P] for all heads
    let kv_a = linear(x, &mla.kv_a);
    let (mut latent, mut k_rope) = (Vec::new(), Vec::new());
    for row in kv_a.chunks_exact(c.latent_width()) {
        latent.extend_from_slice(&row[..c.kv_lora_rank]);
        k_rope.extend_from_slice(&row[c.kv_lora_rank..]);
    }
    // kv [T, H, N + V]
    let kv = linear(&rms_norm(&latent, &mla.kv_a_norm, c.rms_norm_eps), &mla.kv_b);
    let rotation = Rotation::new(c);
    for t in 0..tokens {
        rotation.turn(t, &mut k_rope[t * rope..][..rope]);
        for head in 0..heads {
            rotation.turn(t, &mut q[(t * heads + head) * (nope + rope) + nope..][..rope]);
        }
    }
    let scale = softmax_scale(c);
    let mut out = vec![0.0; tokens * heads * v_dim];
    for t in 0..tokens {
        for head in 0..heads {
            let (q_nope, q_rope) = q[(t * heads + head) * (nope + rope)..][..nope + rope].split_at(nope);
            let kv_of = |s: usize| kv[(s * heads + head) * (nope + v_dim)..][..nope + v_dim].split_at(nope);
            let score = |s: usize| (dot(q_nope, kv_of(s).0) + dot(q_rope, &k_rope[s * rope..][..rope])) * scale;
            let p = softmax(&(0..=t).map(score).collect::<Vec<f32>>());
            let out = &mut out[(t * heads + head) * v_dim..][..v_dim];
            for (s, p) in p.iter().enumerate() {
                add_scaled(out, *p, kv_of(s).1);
            }
        }
    }
    linear(&out, &mla.o)
}

/// (N + P)^-0.5, under YaRN times mscale(mscale_all_dim)².
fn softmax_scale(c: &Config) -> f32 {
    let m = c.rope_scaling.map_or(1.0, |y| mscale(y.factor, y.mscale_all_dim));
    (((c.qk_nope_head_dim + c.qk_rope_head_dim) as f64).powf(-0.5) * m * m) as f32
}

fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

/// Rotary embedding of pairs (2i, 2i + 1).
struct Rotation {
    /// Radians a position, [P / 2].
    frequencies: Vec<f64>,
    magnitude: f64,
}

impl Rotation {
    fn new(c: &Config) -> Self {
        let d = c.qk_rope_head_dim;
        let base = |i: usize| c.rope_theta.powf(-2.0 * i as f64 / d as f64);
        let Some(y) = c.rope_scaling else {
            return Self { frequencies: (0..d / 2).map(base).collect(), magnitude: 1.0 };
        };
        let (low, high) = yarn_bounds(&y, d as f64, c.rope_theta);
        let frequency = |i: usize| {
            let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            base(i) / y.factor * stretched + base(i) * (1.0 - stretched)
        };
        let magnitude = mscale(y.factor, y.mscale) / mscale(y.factor, y.mscale_all_dim);
        Self { frequencies: (0..d / 2).map(frequency).collect(), magnitude }
    }

    fn turn(&self, position: usize, x: &mut [f32]) {
        for (pair, frequency) in x.chunks_exact_mut(2).zip(&self.frequencies) {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (sin, cos) = ((sin * self.magnitude) as f32, (cos * self.magnitude) as f32);
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = b * cos + a * sin;
        }
    }
}

/// Between these dimensions YaRN goes from the original frequencies to stretched ones.
fn yarn_bounds(y: &YarnScaling, d: f64, theta: f64) -> (f64, f64) {
    let dimension =
        |turns: f64| d * (y.original_max_position_embeddings as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let low = dimension(y.beta_fast).floor().max(0.0);
    let high = dimension(y.beta_slow).ceil().min(d - 1.0);
    (low, if low == high { high + 0.001 } else { high })
}

/// The chosen experts' weighted sum, [T, D].
fn routed(c: &Checkpoint, layer: usize, gate: &[f32], bias: Option<&[f32]>, x: &[f32]) -> Result<Vec<f32>, ModelError> {
    let config = c.config();
    let hidden = config.hidden_size;
    let mut y = vec![0.0; x.len()];
    let choices: Vec<Vec<(usize, f32)>> = x
        .chunks_exact(hidden)
        .map(|x| route(config, &gate.chunks_exact(hidden).map(|w| dot(w, x)).collect::<Vec<f32>>(), bias))
        .collect();
    for expert in 0..config.n_routed_experts {
        let chosen = |row: usize| choices[row].iter().find(|(e, _)| *e == expert).map(|(_, w)| (row, *w));
        let rows: Vec<(usize, f32)> = (0..choices.len()).filter_map(chosen).collect();
        if rows.is_empty() {
            continue;
        }
        let block = c.expert(layer, expert)?;
        for (row, weight) in rows {
            add_scaled(&mut y[row * hidden..][..hidden], weight, &feed_forward(&block, &x[row * hidden..][..hidden]));
        }
    }
    Ok(y)
}

/// The chosen experts and their weights, for one token's gate logits [E].
fn route(c: &Config, logits: &[f32], bias: Option<&[f32]>) -> Vec<(usize, f32)> {
    let scores = match c.scoring_func {
        ScoringFunc::Softmax => softmax(logits),
        ScoringFunc::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
    };
    // The bias chooses and does not weigh.
    let mut keys: Vec<f32> = (0..scores.len()).map(|e| scores[e] + bias.map_or(0.0, |b| b[e])).collect();
    if c.topk_method != TopkMethod::Greedy {
        keep_best_groups(c, &mut keys);
    }
    let chosen = best(&keys, c.num_experts_per_tok);
    let sum: f32 = chosen.iter().map(|&e| scores[e]).sum();
    let scale = match (c.model_type, c.norm_topk_prob) {
        (Family::DeepseekV3, true) => c.routed_scaling_factor / (sum + 1e-20),
        (Family::DeepseekV2, true) => 1.0 / (sum + 1e-20),
        (_, false) => c.routed_scaling_factor,
    };
    chosen.into_iter().map(|e| (e, scores[e] * scale)).collect()
}

/// V3: groups by the sum of their two best, the others out of reach. V2: groups by their best, the others at 0.
fn keep_best_groups(c: &Config, keys: &mut [f32]) {
    let size = keys.len() / c.n_group;
    let noaux = c.topk_method == TopkMethod::NoauxTc;
    let group_score = |keys: &[f32]| best(keys, if noaux { 2 } else { 1 }).iter().map(|&e| keys[e]).sum();
    let kept = best(&keys.chunks_exact(size).map(group_score).collect::<Vec<f32>>(), c.topk_group);
    for (group, keys) in keys.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            keys.fill(if noaux { f32::NEG_INFINITY } else { 0.0 });
        }
    }
}

/// The indices of the `n` largest, the lower index first among equals.
fn best(keys: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]));
    order.truncate(n);
    order
}

/// down(silu(gate x) * up x), x [T, D].
fn feed_forward(ffn: &FfnBlock<'_>, x: &[f32]) -> Vec<f32> {
    let (gate, up) = (linear(x, &ffn.gate), linear(x, &ffn.up));
    let inner: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    linear(&inner, &ffn.down)
}

/// x [T, cols] to [T, rows]: y = x Wᵀ.
fn linear(x: &[f32], w: &Matrix<'_>) -> Vec<f32> {
    let values = w.to_f32();
    let outputs = |x: &[f32]| values.chunks_exact(w.cols).map(|w| dot(w, x)).collect::<Vec<f32>>();
    x.chunks_exact(w.cols).flat_map(outputs).collect()
}

/// Each row of `weight.len()` values: x / sqrt(mean(x²) + eps) * weight.
fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let norm = |x: &[f32]| {
        let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect::<Vec<f32>>()
    };
    x.chunks_exact(weight.len()).flat_map(norm).collect()
}

fn softmax(x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(y: &mut [f32], x: &[f32]) {
    add_scaled(y, 1.0, x);
}

fn add_scaled(y: &mut [f32], scale: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += scale * x;
    }
}
