//! What the worker will hold in memory, known before anything is loaded.

use std::fmt;

use moesaic_kernels::{LatentPages, Matrix, MatrixData, Numerics, PAGE_TOKENS, int8_bytes};
use moesaic_model::{Checkpoint, ModelError};

use super::cpu;
use super::decoder::Buffers;
use super::thread::LOGITS_MAX;
use super::weights::numerics_per_head;

/// What decides the size of the latent cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheSize {
    /// Room for this many tokens, rounded up to whole pages.
    Tokens(usize),
    /// As many whole pages as fit in these bytes.
    Bytes(u64),
}

/// Bytes of the attention side. The embedding is not part of it: its rows are read from the mapped file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Packed weights, at most: attention, dense and shared experts, gates, head.
    pub weights: u64,
    pub cache: u64,
    /// Cache for one token, all layers.
    pub per_token: u64,
    pub pages: u32,
    /// What micro-batches are computed in.
    pub steps: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("memory is {given} bytes; one page of the latent cache takes {page}")]
    TooSmall { given: u64, page: u64 },
    #[error("cache_tokens is 0; expected at least 1")]
    NoTokens,
    #[error("a cache of {pages} pages; expected at most {}", u32::MAX)]
    TooManyPages { pages: u64 },
}

impl MemoryPlan {
    /// `rows`: tokens of all micro-batches in flight, at most.
    pub fn new(checkpoint: &Checkpoint, numerics: Numerics, size: CacheSize, rows: usize) -> Result<Self, MemoryError> {
        let config = checkpoint.config();
        let weights = weight_bytes(checkpoint, numerics)?;
        let (layers, latent, rope) = (config.num_hidden_layers, config.kv_lora_rank, config.qk_rope_head_dim);
        let page = LatentPages::page_bytes(numerics, layers, latent, rope) as u64;
        let pages = match size {
            CacheSize::Tokens(0) => return Err(MemoryError::NoTokens),
            CacheSize::Tokens(tokens) => tokens.div_ceil(PAGE_TOKENS) as u64,
            CacheSize::Bytes(given) => match given / page {
                0 => return Err(MemoryError::TooSmall { given, page }),
                pages => pages,
            },
        };
        let logits = (rows * config.vocab_size).min(LOGITS_MAX) * size_of::<f32>();
        let row = Buffers::<cpu::Buffers>::bytes_per_row(config) + cpu::Buffers::bytes_per_row(config);
        let steps = (rows * row + logits) as u64;
        let (cache, per_token) = (pages * page, page / PAGE_TOKENS as u64);
        match u32::try_from(pages) {
            Ok(pages) => Ok(Self { weights, cache, per_token, pages, steps }),
            Err(_) => Err(MemoryError::TooManyPages { pages }),
        }
    }

    pub fn cache_tokens(&self) -> u64 {
        u64::from(self.pages) * PAGE_TOKENS as u64
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (weights, cache, steps, per_token) = (mib(self.weights), mib(self.cache), mib(self.steps), self.per_token);
        write!(f, "weights {weights:.1} MiB, steps {steps:.1} MiB, latent cache {cache:.1} MiB ")?;
        write!(f, "({} tokens in {} pages, {per_token} bytes a token)", self.cache_tokens(), self.pages)
    }
}

/// At most, as the kernels pack them: outputs in panels of 16, FP8 and bf16 kept where the checkpoint has them (bf16 may become a quarter smaller).
fn weight_bytes(checkpoint: &Checkpoint, n: Numerics) -> Result<u64, ModelError> {
    let c = checkpoint.config();
    // All of a checkpoint's projections are stored alike, but not its head.
    let mla = checkpoint.layer(0)?.mla;
    let stored = value_bytes(&mla.o, n);
    let matrix = |size: usize, out: usize, inputs: usize| (out.next_multiple_of(16) * inputs * size) as u64;
    let linear = |out: usize, inputs: usize| match n.quantises() {
        true => int8_bytes(out, inputs) as u64,
        false => matrix(stored, out, inputs),
    };
    let ffn = |width: usize| 2 * linear(width, c.hidden_size) + linear(c.hidden_size, width);
    let heads = c.num_attention_heads;
    let query = match c.q_lora_rank {
        None => linear(heads * c.qk_head_dim(), c.hidden_size),
        Some(rank) => linear(rank, c.hidden_size) + linear(heads * c.qk_head_dim(), rank),
    };
    let computed = |out: usize, inputs: usize| matrix(numerics_per_head(&mla.kv_b, n).dtype().bytes(), out, inputs);
    let (latent, nope) = (c.kv_lora_rank, c.qk_nope_head_dim);
    let head = computed(nope, latent) + computed(latent, nope) + computed(c.v_head_dim, latent);
    let attention = query
        + linear(c.latent_width(), c.hidden_size)
        + heads as u64 * head
        + linear(c.hidden_size, heads * c.v_head_dim);
    let mlp = |layer| match (c.is_moe(layer), c.n_shared_experts * c.moe_intermediate_size) {
        (false, _) => ffn(c.intermediate_size),
        (true, 0) => matrix(4, c.n_routed_experts, c.hidden_size),
        (true, shared) => matrix(4, c.n_routed_experts, c.hidden_size) + ffn(shared),
    };
    let layers: u64 = (0..c.num_hidden_layers).map(|layer| attention + mlp(layer)).sum();
    Ok(layers + matrix(value_bytes(&checkpoint.head()?, n), c.vocab_size, c.hidden_size))
}

/// Of a packed value.
fn value_bytes(matrix: &Matrix<'_>, n: Numerics) -> usize {
    match &matrix.data {
        MatrixData::Fp8 { .. } => 1,
        MatrixData::Bf16(_) => 2,
        MatrixData::F32(_) | MatrixData::F16(_) => n.dtype().bytes(),
    }
}
