//! `moesaic inspect`, `pack`, `quantize` and `synth`.

use std::path::PathBuf;
use std::process::ExitCode;

use moesaic_kernels::DtypeChoice;
use moesaic_model::quantize::{Options, to_fp8};
use moesaic_model::synth::{SHARD_BYTES_MAX, SynthDtype, SynthOptions, synthesize};
use moesaic_model::{Checkpoint, ModelError, inspect as model_inspect, packed};

use crate::cli::say;

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// The checkpoint's folder
    dir: PathBuf,
}

/// Prints the report; fails if the folder cannot be served.
pub fn inspect(args: &InspectArgs) -> ExitCode {
    let report = model_inspect::report(&args.dir);
    say(&report.to_string());
    if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[derive(Debug, clap::Args)]
pub struct PackArgs {
    /// The checkpoint's folder, which gets one more file as large as its experts
    dir: PathBuf,
    /// What the workers will be started with: f32; bf16, by the faster of bf16-fma and bf16-dp on a processor, or one of these;
    /// int8, on a processor
    #[arg(long, default_value = "bf16", value_parser = DtypeChoice::NAMES)]
    dtype: String,
}

pub fn pack(args: &PackArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let done = packed::write(&checkpoint, args.dtype.parse::<DtypeChoice>()?.numerics())?;
    let megabytes = done.bytes as f64 / 1e6;
    say(&format!(
        "{}: {} experts, {megabytes:.2} MB; workers on processors like this one map it\n",
        done.path.display(),
        done.experts
    ));
    Ok(())
}

#[derive(Debug, clap::Args)]
pub struct QuantizeArgs {
    /// A checkpoint in BF16, F16 or F32
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The folder to make; must not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Scales that are powers of two, as DeepSeek-V3.1 has them
    #[arg(long)]
    ue8m0: bool,
}

pub fn quantize(args: &QuantizeArgs) -> Result<(), ModelError> {
    let done = to_fp8(&args.source, &args.out, Options { ue8m0: args.ue8m0 })?;
    say(&format!(
        "{}: {} files, {} tensors quantized, {} copied, {:.2} MB -> {:.2} MB\n",
        args.out.display(),
        done.files,
        done.tensors_quantized,
        done.tensors_copied,
        done.bytes_before as f64 / 1e6,
        done.bytes_after as f64 / 1e6,
    ));
    Ok(())
}

#[derive(Debug, clap::Args)]
pub struct SynthArgs {
    /// A config.json of a family that Moesaic serves
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The same seed makes the same checkpoint
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// bf16, or fp8 in blocks of 128 x 128
    #[arg(long, default_value = "bf16", value_parser = ["bf16", "fp8"])]
    dtype: String,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn synth(args: &SynthArgs) -> Result<(), ModelError> {
    let dtype = if args.dtype == "fp8" { SynthDtype::Fp8 } else { SynthDtype::Bf16 };
    let options = SynthOptions { seed: args.seed, dtype, shard_bytes_max: SHARD_BYTES_MAX };
    let done = synthesize(&args.config, &options, &args.out)?;
    say(&format!(
        "{}: {} tensors in {} files, {:.2} MB in {:.1} s\n",
        args.out.display(),
        done.tensors,
        done.files,
        done.bytes as f64 / 1e6,
        done.seconds,
    ));
    Ok(())
}
