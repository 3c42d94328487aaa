//! The model's layers over a micro-batch. One `async fn`: while a micro-batch awaits its experts, another one computes.
//!
//! Knows rows (a token at a position, with a page table) and nothing of sequences, requests or sampling.

use std::cell::RefCell;
use std::sync::Arc;

use moesaic_dispatch::{DispatchError, Dispatcher, Pending, Route, Rows};
use moesaic_kernels::{
    Dtype, LatentPages, Linear, PAGE_TOKENS, PerHead, Pool, Query as Row, RowsRef, add, bf16, mla_attend, rms_norm,
    route,
};
use moesaic_model::Config;
use moesaic_proto::{ExpertId, LayerId};

use super::weights::{Layer, Mla, Mlp, Query, Weights};
use crate::core::batcher::Part;

pub struct Decoder {
    weights: Arc<Weights>,
    dispatcher: Dispatcher,
    pool: Pool,
    /// Borrowed between two awaits only.
    cache: RefCell<LatentPages>,
}

impl Decoder {
    pub fn new(weights: Arc<Weights>, dispatcher: Dispatcher, pool: Pool, pages: u32) -> Self {
        let c = weights.config();
        let (layers, latent, rope) = (c.num_hidden_layers, c.kv_lora_rank, c.qk_rope_head_dim);
        let cache = RefCell::new(LatentPages::new(weights.numerics, layers, pages as usize, latent, rope));
        Self { weights, dispatcher, pool, cache }
    }

    fn config(&self) -> &Config {
        self.weights.config()
    }

    /// The hidden states [rows, hidden] after all layers. `micro_batch` tells those in flight apart.
    pub async fn forward(&self, micro_batch: u8, parts: &[Part]) -> Result<Vec<f32>, DispatchError> {
        let mut h = self.weights.embed(parts.iter().flat_map(|part| part.tokens.iter().copied()));
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let x = self.norm(&h, &layer.input_norm);
            add(&mut h, &self.attention(index, &layer.mla, &x, parts));
            let x = self.norm(&h, &layer.post_norm);
            add(&mut h, &self.mlp(micro_batch, index, layer, x).await?);
        }
        Ok(h)
    }

    /// The logits [rows, vocab] of some rows of hidden states.
    pub fn logits(&self, h: &[f32]) -> Vec<f32> {
        self.linear(&self.weights.head, &self.norm(h, &self.weights.final_norm))
    }

    async fn mlp(&self, micro_batch: u8, index: usize, layer: &Layer, x: Vec<f32>) -> Result<Vec<f32>, DispatchError> {
        let mut y = vec![0.0; x.len()];
        match &layer.mlp {
            Mlp::Dense(ffn) => ffn.forward(&self.pool, RowsRef::F32(&x), &mut y),
            Mlp::Moe { gate, bias, shared } => {
                let away = self.dispatch(micro_batch, index, gate, bias.as_deref(), &x)?;
                let shared = shared.as_ref().map(|ffn| {
                    let mut y = vec![0.0; x.len()];
                    ffn.forward(&self.pool, RowsRef::F32(&x), &mut y);
                    y
                });
                away.combine(&mut y).await?;
                if let Some(shared) = shared {
                    add(&mut y, &shared);
                }
            }
        }
        Ok(y)
    }

    /// Sends the rows to the experts that the gate chooses.
    fn dispatch(
        &self,
        micro_batch: u8,
        index: usize,
        gate: &Linear,
        bias: Option<&[f32]>,
        x: &[f32],
    ) -> Result<Pending, DispatchError> {
        let params = &self.weights.gate_params;
        let logits = self.linear(gate, x);
        let mut choices = Vec::new();
        for logits in logits.chunks_exact(gate.out_features()) {
            route(logits, bias, params, &mut choices);
        }
        let routes: Vec<Route> =
            choices.iter().map(|c| Route { expert: ExpertId(c.expert), weight: c.weight }).collect();
        let rows = match self.weights.numerics.dtype() {
            Dtype::F32 => Rows::F32(x.to_vec()),
            Dtype::Bf16 => Rows::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
        };
        self.dispatcher.dispatch(LayerId(index as u8), micro_batch, rows, params.top_k, &routes)
    }

    /// MLA in the absorbed form: x [rows, hidden] to [rows, hidden]. The rows' latents go to their pages first, so that
    /// rows of one prefill see each other; each attends to what is not after it.
    fn attention(&self, index: usize, mla: &Mla, x: &[f32], parts: &[Part]) -> Vec<f32> {
        let c = self.config();
        let (heads, latent, width) = (c.num_attention_heads, c.kv_lora_rank, c.latent_width());
        self.append(index, mla, x, parts);
        let q = self.queries(mla, x, parts);
        let queries: Vec<Row<'_>> = positions(parts)
            .zip(q.chunks_exact(heads * width))
            .map(|((part, position), q)| Row { q, pages: &part.pages, context: position + 1 })
            .collect();
        let mut o_latent = vec![0.0; queries.len() * heads * latent];
        mla_attend(&self.pool, &self.cache.borrow(), index, &queries, heads, c.softmax_scale(), &mut o_latent);
        self.linear(&mla.o, &self.per_head(&mla.value_up, &o_latent, latent, c.v_head_dim))
    }

    /// Writes the rows' normed latents and rotated keys to their pages.
    fn append(&self, index: usize, mla: &Mla, x: &[f32], parts: &[Part]) {
        let latent_width = self.config().kv_lora_rank;
        let mut kv = self.linear(&mla.kv_a, x);
        let mut normed = vec![0.0; latent_width];
        let mut cache = self.cache.borrow_mut();
        for ((part, position), kv) in positions(parts).zip(kv.chunks_exact_mut(self.config().latent_width())) {
            let (latent, key) = kv.split_at_mut(latent_width);
            rms_norm(latent, &mla.kv_a_norm, self.config().rms_norm_eps, &mut normed);
            self.weights.rope.apply(position, key);
            cache.write(index, part.pages[position / PAGE_TOKENS], position % PAGE_TOKENS, &normed, key);
        }
    }

    /// [rows, heads, latent + rope]: the absorbed part, then the rotated part.
    fn queries(&self, mla: &Mla, x: &[f32], parts: &[Part]) -> Vec<f32> {
        let c = self.config();
        let (heads, latent, rope, nope) =
            (c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim, c.qk_nope_head_dim);
        let q = match &mla.q {
            Query::Direct(q) => self.linear(q, x),
            Query::LowRank { a, norm, b } => self.linear(b, &self.norm(&self.linear(a, x), norm)),
        };
        let q_nope: Vec<f32> = q.chunks_exact(nope + rope).flat_map(|head| &head[..nope]).copied().collect();
        let absorbed = self.per_head(&mla.key_up, &q_nope, nope, latent);
        let mut out = Vec::with_capacity(absorbed.len() / latent * (latent + rope));
        for (absorbed, head) in absorbed.chunks_exact(latent).zip(q.chunks_exact(nope + rope)) {
            out.extend_from_slice(absorbed);
            out.extend_from_slice(&head[nope..]);
        }
        for ((_, position), q) in positions(parts).zip(out.chunks_exact_mut(heads * (latent + rope))) {
            q.chunks_exact_mut(latent + rope).for_each(|head| self.weights.rope.apply(position, &mut head[latent..]));
        }
        out
    }

    fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        rms_norm(x, weight, self.config().rms_norm_eps, &mut y);
        y
    }

    fn linear(&self, linear: &Linear, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / linear.in_features() * linear.out_features()];
        linear.forward(&self.pool, RowsRef::F32(x), &mut y);
        y
    }

    fn per_head(&self, linears: &PerHead, x: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / inputs * outputs];
        linears.forward(&self.pool, x, &mut y);
        y
    }
}

/// Every row's part and position.
fn positions(parts: &[Part]) -> impl Iterator<Item = (&Part, usize)> {
    parts.iter().flat_map(|part| (part.start..part.start + part.tokens.len()).map(move |position| (part, position)))
}
