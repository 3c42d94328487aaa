//! `moesaic bench --rank expert`: one expert rank of a large model on a GPU, with random weights that are made there: what a
//! layer takes, and a whole decode step of all layers as one recording.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use moesaic_kernels::cuda::{Device, DeviceChoice, Experts, GpuError, GpuFfn, Output, Parcel, Workspace};
use moesaic_kernels::{Dtype, bf16};
use moesaic_model::Config;
use serde_json::json;

use super::Args;

/// Steps that are measured together, after as many that are not.
const STEPS: u32 = 20;
/// What is copied for the roof: far more than caches hold.
const COPY_BYTES: usize = 1 << 30;

/// A rank's share of a model.
struct Rank {
    layers: usize,
    experts: usize,
    /// in, width, out
    shape: [usize; 3],
    is_fp8: bool,
}

impl Rank {
    fn of(config: &Config, ep: usize) -> Result<Self> {
        let (experts, layers) = (config.n_routed_experts, config.moe_layers().len());
        ensure!(layers > 0, "--config: a model without routed experts");
        ensure!(
            (1..=experts).contains(&ep) && experts.is_multiple_of(ep),
            "--ep is {ep}; expected a divisor of {experts}"
        );
        let shape = [config.hidden_size, config.moe_intermediate_size, config.hidden_size];
        Ok(Self { layers, experts: experts / ep, shape, is_fp8: config.quantization.is_some() })
    }
}

/// Of one number of rows for each expert.
struct Measured {
    rows: usize,
    /// One layer, launched by itself.
    layer: Duration,
    /// All layers, as one recording.
    step: Duration,
}

pub fn run(args: &Args) -> Result<()> {
    let file = args.config.as_deref().context("--rank needs --config, a model's config.json")?;
    let rank = Rank::of(&Config::read_file(file).map_err(|mut problems| problems.swap_remove(0))?, args.ep)?;
    let device: DeviceChoice = args.device.parse()?;
    let device = device.open(Dtype::Bf16, None).map_err(|missing| anyhow!("--device {}: {missing}", args.device))?;
    let device = device.with_context(|| format!("--device is {}; --rank measures a GPU", args.device))?;
    let copy = copy_rate(&device)?;
    let layers = make(&device, &rank)?;
    let bytes: usize = layers.iter().flatten().map(GpuFfn::bytes).sum();
    let mut measured = Vec::new();
    for rows in &args.rows {
        measured.push(measure(&device, &layers, *rows).with_context(|| format!("{rows} rows an expert"))?);
    }
    let layer_bytes = bytes as f64 / rank.layers as f64;
    crate::cli::say(&if args.json {
        let row = |m: &Measured| {
            json!({ "rows": m.rows, "layer_s": m.layer.as_secs_f64(), "step_s": m.step.as_secs_f64(),
                    "bytes_per_s": layer_bytes / m.layer.as_secs_f64() })
        };
        let all = json!({ "device": device.to_string(), "layers": rank.layers, "experts": rank.experts, "bytes": bytes,
                          "roof": { "copy_bytes_per_s": copy }, "rows": measured.iter().map(row).collect::<Vec<_>>() });
        format!("{all:#}\n")
    } else {
        table(&device, &rank, copy, bytes, &measured)
    });
    Ok(())
}

fn table(device: &Device, rank: &Rank, copy: f64, bytes: usize, measured: &[Measured]) -> String {
    let mut text = format!(
        "{device}\n{} layers of {} experts, {:.1} GB; roof: a copy reads and writes {:.0} GB/s\n\n",
        rank.layers,
        rank.experts,
        bytes as f64 / 1e9,
        copy / 1e9
    );
    let _ =
        writeln!(text, "{:>14} {:>10} {:>8} {:>8} {:>12}", "rows an expert", "layer", "GB/s", "of roof", "all layers");
    for m in measured {
        let rate = bytes as f64 / rank.layers as f64 / m.layer.as_secs_f64();
        let _ = writeln!(
            text,
            "{:>14} {:>7.1} us {:>8.0} {:>6.0} % {:>9.2} ms",
            m.rows,
            1e6 * m.layer.as_secs_f64(),
            rate / 1e9,
            100.0 * rate / copy,
            1e3 * m.step.as_secs_f64(),
        );
    }
    text
}

fn make(device: &Device, rank: &Rank) -> Result<Vec<Vec<GpuFfn>>, GpuError> {
    let expert = |seed: usize| GpuFfn::random(device, rank.shape, rank.is_fp8, seed as u64);
    let layer = |layer: usize| (0..rank.experts).map(|i| expert(layer * rank.experts + i)).collect();
    (0..rank.layers).map(layer).collect()
}

/// Bytes a second that a large copy reads and writes.
fn copy_rate(device: &Device) -> Result<f64, GpuError> {
    let (from, to) = (device.zeros::<u8>(COPY_BYTES)?, device.zeros::<u8>(COPY_BYTES)?);
    let time = timed(device, || device.queue_copy(&to, &from))?;
    Ok(2.0 * COPY_BYTES as f64 / time.as_secs_f64())
}

/// Of one of many that are queued one after the other.
fn timed(device: &Device, queue: impl Fn() -> Result<(), GpuError>) -> Result<Duration, GpuError> {
    let all = || (0..STEPS).try_for_each(|_| queue());
    all()?;
    device.finish()?;
    let start = Instant::now();
    all()?;
    device.finish()?;
    Ok(start.elapsed() / STEPS)
}

fn measure(device: &Device, layers: &[Vec<GpuFfn>], rows: usize) -> Result<Measured> {
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
    let calls: Vec<Experts<'_>> = groups.iter().map(|groups| Experts { groups, x: &x, outputs: &outputs }).collect();
    let mut sent = Vec::new();
    for (call, parcel) in calls.iter().zip(&mut parcels) {
        sent.push(call.send(&mut workspace, parcel)?);
    }
    device.finish()?;
    let step = device.record(|| sent.iter().try_for_each(|call| call.queue(device)))?;
    // Layers take turns, so that nothing of one is in a cache when it comes again.
    let turn = std::cell::Cell::new(0);
    let layer = timed(device, || {
        turn.set((turn.get() + 1) % sent.len());
        sent[turn.get()].queue(device)
    })?;
    let step = timed(device, || device.queue_recording(&step))?;
    Ok(Measured { rows, layer, step })
}
