//! A random checkpoint of any config.json that this crate reads, for measuring sizes that nobody has trained. Its values
//! are chosen so that the model computes: activations stay of one size, logits spread, and experts are chosen evenly.
//!
//! ```text
//! matrices     std 1 / sqrt(columns); FP8: codes as far as 448, and a scale a block that gives the same std
//! embedding    std 1 (a tied one is the head too, and drawn as one)
//! norms        1 +- 0.1
//! gate's bias  0 +- 0.01
//! ```
//! The same seed gives the same tensors whatever the number of threads and files. Memory is a buffer a thread and the
//! list of tensors: what fits the disk can be made.

mod companions;
mod plan;
mod values;
mod write;

use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use crate::config::CONFIG_FILE;
use crate::folder;
use crate::json::read_text;
use crate::{Config, ModelError};
use plan::Plan;

/// Files are no larger than this unless told otherwise; a checkpoint that fits one is one file.
pub const SHARD_BYTES_MAX: u64 = 4 << 30;
const CONFIG_BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SynthDtype {
    /// All matrices in BF16.
    Bf16,
    /// The matrices that the public DeepSeek-V3 has in FP8 in blocks of 128 x 128, the others in BF16.
    Fp8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SynthOptions {
    pub seed: u64,
    pub dtype: SynthDtype,
    /// Of tensor data in one file; a larger tensor has a file of its own.
    pub shard_bytes_max: u64,
}

/// What was made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SynthReport {
    /// Scales count as tensors.
    pub tensors: usize,
    /// Of tensor data, without headers.
    pub bytes: u64,
    /// With tensors.
    pub files: usize,
    pub seconds: f64,
}

/// Makes `out`, which must not exist or be an empty folder; a failure leaves it as it was. Of `config_file` everything
/// is kept but `quantization_config`, which becomes what `options.dtype` needs.
pub fn synthesize(config_file: &Path, options: &SynthOptions, out: &Path) -> Result<SynthReport, ModelError> {
    let start = Instant::now();
    let (config, json) = read_config(config_file, options.dtype)?;
    let plan = Plan::new(config_file, &config, options)?;
    folder::make(out, |folder| {
        folder::write_json(&folder.join(CONFIG_FILE), &json)?;
        companions::write(folder, &config)?;
        write::all(folder, &plan)
    })?;
    let (tensors, bytes, files) = (plan.tensors, plan.bytes, plan.files.len());
    let seconds = start.elapsed().as_secs_f64();
    tracing::info!(out = %out.display(), tensors, bytes, files, seconds, "synthesized");
    Ok(SynthReport { tensors, bytes, files, seconds })
}

/// The config as it will be written, checked and as JSON.
fn read_config(file: &Path, dtype: SynthDtype) -> Result<(Config, Value), ModelError> {
    let first = |mut problems: Vec<ModelError>| problems.swap_remove(0);
    let text = read_text(file, CONFIG_BYTES_MAX)?;
    // As it was given: whoever gave it looks for problems there.
    Config::parse(file, &text).map_err(first)?;
    let mut json: Value = serde_json::from_str(&text).map_err(|e| ModelError::file(file, e.to_string()))?;
    companions::set_quantization(&mut json, dtype);
    let config = Config::parse(file, &json.to_string()).map_err(first)?;
    Ok((config, json))
}
