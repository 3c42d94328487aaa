//! `moesaic bench --rank`: one rank's share of a large model on a GPU, in full dimensions, with random weights that are made
//! there. `experts` and `attention` are the two kinds of ranks.

pub mod attention;
pub mod experts;

use anyhow::{Context, Result, anyhow};
use moesaic_kernels::DtypeChoice;
use moesaic_kernels::cuda::{Device, DeviceChoice, GpuRoof};
use serde_json::{Value, json};

use super::Args;

/// What is measured together, after as much that is not.
const ROUNDS: u32 = 20;

pub fn run(args: &Args, role: &str) -> Result<()> {
    let config = args.model_config()?.context("--rank needs --config, a model's config.json")?;
    let name = args.device.as_deref().unwrap_or("cuda:0");
    let device: DeviceChoice = name.parse()?;
    let device = device.open(DtypeChoice::Bf16, None).map_err(|missing| anyhow!("--device {name}: {missing}"))?;
    let device = device.with_context(|| format!("--device is {name}; --rank measures a GPU"))?;
    let roof = GpuRoof::measure(&device)?;
    let (table, json) = match role {
        "expert" => {
            let rank = experts::Rank::of(&config, args.ep)?;
            let rows = if args.rows.is_empty() { &[8, 16, 32, 64] } else { &args.rows[..] };
            let measured = rank.measure(&device, rows, ROUNDS)?;
            (measured.table(&roof), measured.json())
        }
        _ => {
            let measured = attention::measure(&device, &config, &args.batch, args.ctx, ROUNDS)?;
            (measured.table(&roof), measured.json())
        }
    };
    crate::cli::say(&if args.json {
        as_json(&device, &roof, json)
    } else {
        format!("{}{table}", head(&device, &roof))
    });
    Ok(())
}

fn head(device: &Device, roof: &GpuRoof) -> String {
    let product =
        roof.fma.map_or("is not known (no cuBLASLt)".into(), |fma| format!("makes {:.0} TFLOP/s", 2e-12 * fma));
    format!("{device}\nroof: a copy reads and writes {:.0} GB/s, a product of bf16 {product}\n", roof.copy / 1e9)
}

fn as_json(device: &Device, roof: &GpuRoof, mut measured: Value) -> String {
    measured["device"] = device.to_string().into();
    measured["roof"] = json!({ "copy_bytes_per_s": roof.copy, "flops": roof.fma.map(|fma| 2.0 * fma) });
    format!("{measured:#}\n")
}
