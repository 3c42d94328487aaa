//! One attention rank: a whole decode step as a worker makes it, with experts that answer at once, and its larger parts.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use moesaic_attention_worker::core::batcher::{Part, SequenceId};
use moesaic_attention_worker::core::sampler::Sampling;
use moesaic_attention_worker::engine::arithmetic::{Arithmetic, Asked};
use moesaic_attention_worker::engine::gpu::{Buffers, Gpu, Limits};
use moesaic_kernels::PAGE_TOKENS;
use moesaic_kernels::cuda::{Device, GpuError, GpuRoof, time_of};
use moesaic_model::Config;
use serde_json::{Value, json};

/// What was measured of a rank.
#[derive(Debug)]
pub struct Measured {
    layers: usize,
    /// Of all weights, and of those that a step reads: it takes only rows of the embedding.
    bytes: usize,
    read: usize,
    context: usize,
    rows: Vec<Row>,
}

/// Of one number of sequences.
#[derive(Debug)]
pub struct Row {
    pub sequences: usize,
    pub step: Duration,
    /// All layers' attention, with its projections; all layers' gates, with the wait for them; and the head.
    pub attention: Duration,
    pub gates: Duration,
    pub head: Duration,
    /// Of the latent cache that a step reads.
    cache: usize,
}

/// Sequences of `context` tokens each; means of `rounds`.
pub fn measure(device: &Device, config: &Config, batches: &[usize], context: usize, rounds: u32) -> Result<Measured> {
    ensure!(
        (1..=config.max_position_embeddings).contains(&context),
        "--ctx is {context}; the model has fewer positions"
    );
    let rows = batches.iter().copied().max().unwrap_or(0);
    ensure!(rows > 0 && !batches.contains(&0), "--batch: expected at least 1 sequence");
    let limits = Limits { pages: (rows * context.div_ceil(PAGE_TOKENS)) as u32, rows };
    let gpu = Gpu::random(config, device.clone(), limits, 1)?;
    let (bytes, cache) = gpu.bytes();
    let per_page = cache / limits.pages as usize;
    let mut measured = Vec::new();
    for &sequences in batches {
        let rank = Rank { device, gpu: &gpu, parts: parts(sequences, context), rounds };
        let cache = sequences * per_page * context / PAGE_TOKENS;
        measured.push(rank.measure(cache).with_context(|| format!("--batch: {sequences} sequences"))?);
    }
    let table = config.vocab_size * config.hidden_size * size_of::<u16>();
    Ok(Measured { layers: config.num_hidden_layers, bytes, read: bytes - table, context, rows: measured })
}

/// A token of each sequence, with pages of its own.
fn parts(sequences: usize, context: usize) -> Vec<Part> {
    let pages = context.div_ceil(PAGE_TOKENS) as u32;
    let part = |i: usize| Part {
        sequence: SequenceId(i as u64),
        start: context - 1,
        tokens: vec![i as u32],
        prompt: context,
        pages: (i as u32 * pages..(i as u32 + 1) * pages).collect(),
        draws: true,
    };
    (0..sequences).map(part).collect()
}

/// A row's token, as DeepSeek-R1's card says to draw it.
fn asked(row: usize) -> Asked {
    let sampling = Sampling { temperature: 0.6, top_p: 0.95, seed: row as u64, ..Sampling::default() };
    Asked { row, draw: Some(sampling.draw(&[], &[])), logits: false }
}

struct Rank<'a> {
    device: &'a Device,
    gpu: &'a Gpu,
    parts: Vec<Part>,
    rounds: u32,
}

impl Rank<'_> {
    fn measure(&self, cache: usize) -> Result<Row, GpuError> {
        let (gpu, layers) = (self.gpu, self.gpu.config().num_hidden_layers);
        let mut b = gpu.buffers()?;
        let mut choices = Vec::new();
        let gates = |b: &mut Buffers, layer: usize, choices: &mut Vec<_>| {
            if !gpu.config().is_moe(layer) {
                return Ok(());
            }
            choices.clear();
            gpu.gate(layer, b)?;
            gpu.fetch(true, b)?;
            gpu.choose(layer, b, choices)
        };
        let asked: Vec<Asked> = (0..self.parts.len()).map(asked).collect();
        let head = |b: &mut Buffers| asked.chunks(gpu.logit_rows()).try_for_each(|asked| gpu.read(asked, b).map(drop));
        let step = self.time(|| {
            gpu.embed(&self.parts, &mut b)?;
            for layer in 0..layers {
                gpu.attend(layer, &self.parts, &mut b)?;
                gpu.norm(layer, &mut b)?;
                gates(&mut b, layer, &mut choices)?;
                gpu.dense(layer, &mut b)?;
                // As if the experts' sums were there.
                gpu.add(layer, None, &mut b)?;
            }
            head(&mut b)
        })?;
        let attention = self.time(|| (0..layers).try_for_each(|layer| gpu.attend(layer, &self.parts, &mut b)))?;
        let gates = self.time(|| (0..layers).try_for_each(|layer| gates(&mut b, layer, &mut choices)))?;
        let head = self.time(|| head(&mut b))?;
        Ok(Row { sequences: self.parts.len(), step, attention, gates, head, cache })
    }

    fn time(&self, work: impl FnMut() -> Result<(), GpuError>) -> Result<Duration, GpuError> {
        time_of(self.device, self.rounds, work)
    }
}

impl Measured {
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Bytes that a step reads a second.
    fn rate(&self, row: &Row) -> f64 {
        (self.read + row.cache) as f64 / row.step.as_secs_f64()
    }

    pub fn table(&self, roof: &GpuRoof) -> String {
        let (layers, bytes, context) = (self.layers, self.bytes as f64 / 1e9, self.context);
        let mut text =
            format!("{layers} layers without their routed experts, {bytes:.1} GB; contexts of {context} tokens\n\n");
        let _ = writeln!(
            text,
            "{:>9} {:>10} {:>8} {:>8} {:>12} {:>10} {:>10}",
            "sequences", "step", "GB/s", "of roof", "attention", "gates", "head"
        );
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        for row in &self.rows {
            let _ = writeln!(
                text,
                "{:>9} {:>7.2} ms {:>8.0} {:>6.0} % {:>9.2} ms {:>7.2} ms {:>7.2} ms",
                row.sequences,
                ms(row.step),
                self.rate(row) / 1e9,
                100.0 * self.rate(row) / roof.copy,
                ms(row.attention),
                ms(row.gates),
                ms(row.head),
            );
        }
        text
    }

    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({ "sequences": row.sequences, "step_s": row.step.as_secs_f64(), "bytes_per_s": self.rate(row),
                    "attention_s": row.attention.as_secs_f64(), "gates_s": row.gates.as_secs_f64(),
                    "head_s": row.head.as_secs_f64() })
        };
        json!({ "layers": self.layers, "bytes": self.bytes, "context": self.context,
                "rows": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}
