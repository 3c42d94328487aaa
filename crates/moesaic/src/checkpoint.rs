//! `moesaic inspect` and `moesaic quantize`.

use std::path::PathBuf;
use std::process::ExitCode;

use moesaic_model::quantize::{Options, to_fp8};
use moesaic_model::{ModelError, inspect as model_inspect};

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
