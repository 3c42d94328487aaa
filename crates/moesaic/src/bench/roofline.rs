//! What a test takes at least: the bytes that it must read over the read bandwidth, or its multiply-adds over their rate,
//! whichever is longer.

use anyhow::Result;
use moesaic_attention_worker::engine::memory::{CacheSize, MemoryPlan};
use moesaic_attention_worker::engine::profile::Counts;
use moesaic_kernels::{Dtype, Numerics, Roof, int8_bytes};
use moesaic_model::inspect::Parameters;
use moesaic_model::{Checkpoint, Config};

use super::Test;

pub struct Roofline {
    config: Config,
    roof: Roof,
    numerics: Numerics,
    /// Bytes of the attention side's weights, and of one expert's, as the checkpoint has them: bf16 that is packed tighter may beat this roof.
    weights: f64,
    expert: f64,
    /// Of one token in all layers.
    cache: f64,
    /// Multiply-adds of a token's way through the layers, head and attention left out.
    token: f64,
}

impl Roofline {
    pub fn new(checkpoint: &Checkpoint, numerics: Numerics, roof: Roof) -> Result<Self> {
        let config = checkpoint.config().clone();
        let plan = MemoryPlan::new(checkpoint, numerics, CacheSize::Tokens(1), 0)?;
        let (hidden, width) = (config.hidden_size, config.moe_intermediate_size);
        let expert = match (numerics.quantises(), config.quantization.is_some()) {
            (true, _) => 2 * int8_bytes(width, hidden) + int8_bytes(hidden, width),
            (false, true) => 3 * hidden * width,
            (false, false) => 3 * hidden * width * numerics.dtype().bytes(),
        };
        let head = (config.vocab_size * config.hidden_size) as f64;
        Ok(Self {
            weights: plan.weights as f64,
            expert: expert as f64,
            cache: plan.per_token as f64,
            token: Parameters::of(&config).active as f64 - 2.0 * head,
            config,
            roof,
            numerics,
        })
    }

    /// Seconds for one token of the test. None for serving, which is a mixture.
    pub fn seconds_per_token(&self, test: &Test, counts: &Counts) -> Option<f64> {
        let c = &self.config;
        let head = (c.vocab_size * c.hidden_size) as f64;
        // A key: of a prompt in the expanded form, of what is emitted in the absorbed form.
        let per_head = c.num_hidden_layers * c.num_attention_heads;
        let prompt_key = (per_head * (c.qk_head_dim() + c.v_head_dim)) as f64;
        let key = (per_head * (2 * c.kv_lora_rank + c.qk_rope_head_dim)) as f64;
        let experts = if counts.steps == 0 { 0.0 } else { counts.experts as f64 / counts.steps as f64 };
        // In linears of layers, and in attention and the head.
        let (bytes, fma, rest) = match *test {
            Test::Prefill { tokens } => {
                let n = tokens as f64;
                let all = self.weights + experts * self.expert;
                (all / n, self.token, head / n + prompt_key * n / 2.0)
            }
            Test::Decode { batch, context, tokens } => {
                let context = (context + tokens / 2) as f64;
                let step = self.weights + experts * self.expert;
                (step / batch as f64 + context * self.cache, self.token, head + key * context)
            }
            Test::Serve { .. } => return None,
        };
        let rate = if self.numerics.activations() == Dtype::Bf16 { self.roof.bf16 } else { self.roof.fma };
        let linears = if self.numerics.quantises() { self.roof.int8 } else { rate };
        Some((bytes / self.roof.read).max(fma / linears + rest / rate))
    }
}
