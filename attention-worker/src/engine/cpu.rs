//! The layers on this processor.

use std::cell::RefCell;
use std::convert::Infallible;
use std::sync::Arc;

use moesaic_dispatch::Rows;
use moesaic_kernels::{
    Choice, Dtype, Expand, GateParams, LatentPages, Linear, PAGE_TOKENS, Pool, Query as Row, RowsRef, Span, add, bf16,
    mla_attend, mla_attend_expanded, rms_norm, route,
};
use moesaic_model::Config;

use super::arithmetic::{Arithmetic, Asked, Experts, Reading, positions, tokens};
use super::weights::{Mla, Mlp, Query, Weights};
use crate::core::batcher::Part;

pub struct Cpu {
    weights: Arc<Weights>,
    pool: Pool,
    /// Borrowed between two awaits only.
    cache: RefCell<LatentPages>,
}

/// What a micro-batch is computed in, kept from step to step: its layers allocate nothing for their rows.
#[derive(Default)]
pub struct Buffers {
    /// The residual stream [rows, hidden], and what it is read and changed by.
    h: Vec<f32>,
    x: Vec<f32>,
    y: Vec<f32>,
    shared: Vec<f32>,
    /// [rows, latent + rope]
    kv: Vec<f32>,
    /// Low-rank queries before and after their norm.
    low: Vec<f32>,
    low_normed: Vec<f32>,
    /// [rows, heads, nope + rope]
    q: Vec<f32>,
    /// [rows, heads, v]
    o: Vec<f32>,
    /// Of emitted rows only: q as above, absorbed to [rows, heads, latent + rope], attended [rows, heads, latent], o as above.
    emitted_q: Vec<f32>,
    absorbed: Vec<f32>,
    o_latent: Vec<f32>,
    emitted_o: Vec<f32>,
    gate: Vec<f32>,
}

/// `buffer` with `len` values, of any content, and no room for more.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.reserve_exact(len.saturating_sub(buffer.len()));
    buffer.resize(len, 0.0);
    buffer
}

impl Cpu {
    /// With a latent cache of `pages` pages.
    pub fn new(weights: Arc<Weights>, pool: Pool, pages: u32) -> Self {
        let c = weights.config();
        let (layers, latent, rope) = (c.num_hidden_layers, c.kv_lora_rank, c.qk_rope_head_dim);
        let cache = RefCell::new(LatentPages::new(weights.numerics, layers, pages as usize, latent, rope));
        Self { weights, pool, cache }
    }

    /// MLA, `b.x` to `b.y`. The rows' latents go to their pages first, so that rows of one prefill see each other; each
    /// attends to what is not after it: tokens of the prompt in the expanded form, emitted ones in the absorbed form.
    fn attention(&self, index: usize, mla: &Mla, parts: &[Part], b: &mut Buffers) {
        let c = self.config();
        self.append(index, mla, parts, b);
        self.queries(mla, parts, b);
        sized(&mut b.o, b.q.len() / (c.qk_nope_head_dim + c.qk_rope_head_dim) * c.v_head_dim);
        self.attend_prompts(index, mla, parts, b);
        self.attend_emitted(index, mla, parts, b);
        self.linear(&mla.o, &b.o, &mut b.y);
    }

    fn attend_prompts(&self, index: usize, mla: &Mla, parts: &[Part], b: &mut Buffers) {
        let mut spans = Vec::with_capacity(parts.len());
        let mut row = 0;
        for part in parts {
            let prompt = part.prompt.saturating_sub(part.start).min(part.tokens.len());
            if prompt > 0 {
                spans.push(Span { rows: row..row + prompt, start: part.start, pages: &part.pages });
            }
            row += part.tokens.len();
        }
        let (expand, cache) = (Expand { key: &mla.key_up, value: &mla.value_up }, self.cache.borrow());
        let scale = self.config().softmax_scale();
        mla_attend_expanded(&self.pool, &cache, index, &spans, expand, &b.q, scale, &mut b.o);
    }

    fn attend_emitted(&self, index: usize, mla: &Mla, parts: &[Part], b: &mut Buffers) {
        let c = self.config();
        let (heads, latent, rope, v) = (c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim, c.v_head_dim);
        let (width, q_width) = (latent + rope, c.qk_nope_head_dim + rope);
        let all = positions(parts).enumerate();
        let emitted: Vec<_> = all.filter(|(_, (part, position))| *position >= part.prompt).collect();

        let q = sized(&mut b.emitted_q, emitted.len() * heads * q_width);
        for ((row, _), to) in emitted.iter().zip(q.chunks_exact_mut(heads * q_width)) {
            to.copy_from_slice(&b.q[row * heads * q_width..][..heads * q_width]);
        }
        let absorbed = sized(&mut b.absorbed, emitted.len() * heads * width);
        mla.absorb.forward(&self.pool, q, q_width, absorbed, width);
        for (q, absorbed) in q.chunks_exact(q_width).zip(absorbed.chunks_exact_mut(width)) {
            absorbed[latent..].copy_from_slice(&q[q_width - rope..]);
        }
        let rows = emitted.iter().zip(absorbed.chunks_exact(heads * width));
        let queries: Vec<Row<'_>> =
            rows.map(|((_, (part, position)), q)| Row { q, pages: &part.pages, context: position + 1 }).collect();
        let o_latent = sized(&mut b.o_latent, emitted.len() * heads * latent);
        mla_attend(&self.pool, &self.cache.borrow(), index, &queries, heads, c.softmax_scale(), o_latent);
        let o = sized(&mut b.emitted_o, emitted.len() * heads * v);
        mla.value_up.forward(&self.pool, o_latent, latent, o, v);
        for ((row, _), o) in emitted.iter().zip(o.chunks_exact(heads * v)) {
            b.o[row * heads * v..][..heads * v].copy_from_slice(o);
        }
    }

    /// Writes the rows' normed latents and rotated keys to their pages.
    fn append(&self, index: usize, mla: &Mla, parts: &[Part], b: &mut Buffers) {
        let latent_width = self.config().kv_lora_rank;
        self.linear(&mla.kv_a, &b.x, &mut b.kv);
        let normed = sized(&mut b.low_normed, latent_width);
        let mut cache = self.cache.borrow_mut();
        for ((part, position), kv) in positions(parts).zip(b.kv.chunks_exact_mut(self.config().latent_width())) {
            let (latent, key) = kv.split_at_mut(latent_width);
            rms_norm(latent, &mla.kv_a_norm, self.config().rms_norm_eps, normed);
            self.weights.rope.apply(position, key);
            cache.write(index, part.pages[position / PAGE_TOKENS], position % PAGE_TOKENS, normed, key);
        }
    }

    /// `b.q`, of each head the last part rotated.
    fn queries(&self, mla: &Mla, parts: &[Part], b: &mut Buffers) {
        let c = self.config();
        let (rope, nope) = (c.qk_rope_head_dim, c.qk_nope_head_dim);
        match &mla.q {
            Query::Direct(q) => self.linear(q, &b.x, &mut b.q),
            Query::LowRank { a, norm, b: up } => {
                self.linear(a, &b.x, &mut b.low);
                self.rms_norm(&b.low, norm, &mut b.low_normed);
                self.linear(up, &b.low_normed, &mut b.q);
            }
        }
        let rows = b.q.chunks_exact_mut(c.num_attention_heads * (nope + rope));
        for ((_, position), q) in positions(parts).zip(rows) {
            for q in q.chunks_exact_mut(nope + rope) {
                self.weights.rope.apply(position, &mut q[nope..]);
            }
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], y: &mut Vec<f32>) {
        rms_norm(x, weight, self.config().rms_norm_eps, sized(y, x.len()));
    }

    fn linear(&self, linear: &Linear, x: &[f32], y: &mut Vec<f32>) {
        let y = sized(y, x.len() / linear.in_features() * linear.out_features());
        linear.forward(&self.pool, RowsRef::F32(x), y);
    }
}

impl Arithmetic for Cpu {
    type Buffers = Buffers;
    type Failure = Infallible;
    const QUEUES: bool = false;

    fn config(&self) -> &Config {
        self.weights.config()
    }

    fn gate_params(&self) -> &GateParams {
        &self.weights.gate_params
    }

    fn pin_caller(&self) {
        self.pool.pin_caller();
    }

    fn buffers(&self) -> Result<Buffers, Infallible> {
        Ok(Buffers::default())
    }

    fn embed(&self, parts: &[Part], b: &mut Buffers) -> Result<(), Infallible> {
        self.weights.embed(tokens(parts), &mut b.h);
        Ok(())
    }

    fn attend(&self, layer: usize, parts: &[Part], b: &mut Buffers) -> Result<(), Infallible> {
        let weights = &self.weights.layers[layer];
        self.rms_norm(&b.h, &weights.input_norm, &mut b.x);
        self.attention(layer, &weights.mla, parts, b);
        add(&mut b.h, &b.y);
        Ok(())
    }

    fn norm(&self, layer: usize, b: &mut Buffers) -> Result<(), Infallible> {
        self.rms_norm(&b.h, &self.weights.layers[layer].post_norm, &mut b.x);
        Ok(())
    }

    fn choose(&self, layer: usize, b: &mut Buffers, choices: &mut Vec<Choice>) -> Result<(), Infallible> {
        if let Mlp::Moe { gate, bias, .. } = &self.weights.layers[layer].mlp {
            self.linear(gate, &b.x, &mut b.gate);
            for logits in b.gate.chunks_exact(gate.out_features()) {
                route(logits, bias.as_deref(), &self.weights.gate_params, choices);
            }
        }
        Ok(())
    }

    fn rows<'a>(&'a self, _: bool, b: &'a mut Buffers) -> Rows<'a> {
        match self.weights.numerics.activations() {
            Dtype::F32 => Rows::F32(b.x.clone()),
            Dtype::Bf16 => Rows::Bf16(b.x.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    fn dense(&self, layer: usize, b: &mut Buffers) -> Result<(), Infallible> {
        let (ffn, y) = match &self.weights.layers[layer].mlp {
            Mlp::Dense(ffn) => (ffn, &mut b.y),
            Mlp::Moe { shared: Some(ffn), .. } => (ffn, &mut b.shared),
            Mlp::Moe { shared: None, .. } => return Ok(()),
        };
        ffn.forward(&self.pool, RowsRef::F32(&b.x), sized(y, b.x.len()));
        Ok(())
    }

    fn add(&self, layer: usize, experts: Option<Experts<'_>>, b: &mut Buffers) -> Result<(), Infallible> {
        match (&self.weights.layers[layer].mlp, experts) {
            (Mlp::Moe { shared, .. }, Some(experts)) => {
                let experts = experts.added_up();
                if shared.is_some() {
                    add(experts, &b.shared);
                }
                add(&mut b.h, experts);
            }
            _ => add(&mut b.h, &b.y),
        }
        Ok(())
    }

    fn read(&self, asked: &[Asked], b: &mut Buffers) -> Result<Reading, Infallible> {
        let hidden = self.config().hidden_size;
        let h: Vec<f32> = asked.iter().flat_map(|asked| &b.h[asked.row * hidden..][..hidden]).copied().collect();
        let (mut x, mut logits) = (Vec::new(), Vec::new());
        self.rms_norm(&h, &self.weights.final_norm, &mut x);
        self.linear(&self.weights.head, &x, &mut logits);
        Ok(Reading { tokens: vec![None; asked.len()], logits })
    }
}

impl Buffers {
    /// What they grow to for each row of a micro-batch, in bytes.
    pub fn bytes_per_row(c: &Config) -> usize {
        let (heads, latent) = (c.num_attention_heads, c.latent_width());
        let (q, o) = (heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), heads * c.v_head_dim);
        let emitted = q + heads * (latent + c.kv_lora_rank) + o;
        let low = 2 * c.q_lora_rank.unwrap_or(0);
        let values = 4 * c.hidden_size + latent + low + q + o + emitted + c.n_routed_experts;
        values * size_of::<f32>()
    }

    /// What they take.
    pub fn bytes(&self) -> usize {
        let Self { h, x, y, shared, kv, low, low_normed, q, o, emitted_q, absorbed, o_latent, emitted_o, gate } = self;
        let values = [h, x, y, shared, kv, low, low_normed, q, o, emitted_q, absorbed, o_latent, emitted_o, gate];
        values.iter().map(|values| values.capacity() * size_of::<f32>()).sum()
    }
}
