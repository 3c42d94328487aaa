//! One expert rank: what a layer takes, and a whole decode step of all layers as one recording.

use std::cell::Cell;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use moesaic_kernels::bf16;
use moesaic_kernels::cuda::{
    Device, Experts, GpuError, GpuFfn, GpuRoof, Output, Parcel, Recorded, Workspace, X, time_of,
};
use moesaic_model::Config;
use serde_json::{Value, json};

/// A rank's share of a model.
#[derive(Clone, Copy, Debug)]
pub struct Rank {
    layers: usize,
    experts: usize,
    /// in, width, out
    shape: [usize; 3],
    is_fp8: bool,
}

/// What was measured of a rank.
#[derive(Debug)]
pub struct Measured {
    rank: Rank,
    /// Of all weights.
    bytes: usize,
    rows: Vec<Row>,
}

/// Of one number of rows for each expert.
#[derive(Debug)]
pub struct Row {
    pub rows: usize,
    /// One layer, launched by itself.
    pub layer: Duration,
    /// All layers, as one recording.
    pub step: Duration,
}

impl Rank {
    /// One of `ep` that share the experts.
    pub fn of(config: &Config, ep: usize) -> Result<Self> {
        let (experts, layers) = (config.n_routed_experts, config.moe_layers().len());
        ensure!(layers > 0, "--config: a model without routed experts");
        ensure!(
            (1..=experts).contains(&ep) && experts.is_multiple_of(ep),
            "--ep is {ep}; expected a divisor of {experts}"
        );
        let shape = [config.hidden_size, config.moe_intermediate_size, config.hidden_size];
        Ok(Self { layers, experts: experts / ep, shape, is_fp8: config.quantization.is_some() })
    }

    /// Means of `rounds`.
    pub fn measure(self, device: &Device, rows: &[usize], rounds: u32) -> Result<Measured> {
        let layers = self.make(device)?;
        let bytes = layers.iter().flatten().map(GpuFfn::bytes).sum();
        let row = |rows: &usize| {
            measure(device, &layers, *rows, rounds).with_context(|| format!("--rows: {rows} rows an expert"))
        };
        Ok(Measured { rank: self, bytes, rows: rows.iter().map(row).collect::<Result<_>>()? })
    }

    fn make(&self, device: &Device) -> Result<Vec<Vec<GpuFfn>>, GpuError> {
        let expert = |seed: usize| GpuFfn::random(device, self.shape, self.is_fp8, seed as u64);
        let layer = |layer: usize| (0..self.experts).map(|i| expert(layer * self.experts + i)).collect();
        (0..self.layers).map(layer).collect()
    }
}

impl Measured {
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Bytes of weights that a layer reads a second.
    fn rate(&self, row: &Row) -> f64 {
        self.bytes as f64 / self.rank.layers as f64 / row.layer.as_secs_f64()
    }

    pub fn table(&self, roof: &GpuRoof) -> String {
        let Rank { layers, experts, .. } = self.rank;
        let mut text = format!("{layers} layers of {experts} experts, {:.1} GB\n\n", self.bytes as f64 / 1e9);
        let _ = writeln!(
            text,
            "{:>14} {:>10} {:>8} {:>8} {:>8} {:>12}",
            "rows an expert", "layer", "GB/s", "of roof", "TFLOP/s", "all layers"
        );
        let [in_, width, out] = self.rank.shape;
        for row in &self.rows {
            let flops = 2.0 * (row.rows * experts * width * (2 * in_ + out)) as f64;
            let _ = writeln!(
                text,
                "{:>14} {:>7.1} us {:>8.0} {:>6.0} % {:>8.0} {:>9.2} ms",
                row.rows,
                1e6 * row.layer.as_secs_f64(),
                self.rate(row) / 1e9,
                100.0 * self.rate(row) / roof.copy,
                flops / row.layer.as_secs_f64() / 1e12,
                1e3 * row.step.as_secs_f64(),
            );
        }
        text
    }

    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({ "rows": row.rows, "layer_s": row.layer.as_secs_f64(), "step_s": row.step.as_secs_f64(),
                    "bytes_per_s": self.rate(row) })
        };
        let Rank { layers, experts, .. } = self.rank;
        json!({ "layers": layers, "experts": experts, "bytes": self.bytes,
                "rows": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}

fn measure(device: &Device, layers: &[Vec<GpuFfn>], rows: usize, rounds: u32) -> Result<Row> {
    ensure!(rows > 0, "expected at least 1");
    let experts = layers.first().map_or(0, Vec::len);
    let hidden = layers.first().and_then(|layer| layer.first()).map_or(0, GpuFfn::in_features);
    // Each expert has rows that others have, too.
    let x_rows = 2 * rows;
    let x: Vec<bf16> = (0..x_rows * hidden).map(|i| bf16::from_f32((i * 7919 % 2003) as f32 / 1001.5 - 1.0)).collect();
    let picks: Vec<Vec<u32>> =
        (0..experts).map(|e| (0..rows).map(|i| ((i * 2 + e) % x_rows) as u32).collect()).collect();
    let terms: Vec<(u32, f32)> = (0..(experts * rows) as u32).map(|row| (row, 0.5)).collect();
    let outputs: Vec<Output<'_>> = terms.chunks(2).map(|terms| Output { terms }).collect();
    let mut workspace = Workspace::new(device.clone());
    let mut parcels: Vec<Option<Parcel>> = layers.iter().map(|_| None).collect();
    let groups: Vec<Vec<(&GpuFfn, &[u32])>> =
        layers.iter().map(|layer| layer.iter().zip(&picks).map(|(ffn, rows)| (ffn, &rows[..])).collect()).collect();
    let calls: Vec<Experts<'_>> =
        groups.iter().map(|groups| Experts { groups, x: X::Here(&x), outputs: &outputs }).collect();
    let mut sent = Vec::new();
    for (call, parcel) in calls.iter().zip(&mut parcels) {
        sent.push(call.send(&mut workspace, parcel)?);
    }
    device.finish()?;
    let step = Recorded::new(device, &sent)?;
    // Layers take turns, so that nothing of one is in a cache when it comes again.
    let turn = Cell::new(0);
    let layer = time_of(device, rounds, || {
        turn.set((turn.get() + 1) % sent.len());
        sent[turn.get()].queue(device)
    })?;
    let step = time_of(device, rounds, || step.queue())?;
    Ok(Row { rows, layer, step })
}
