//! A checkpoint in BF16, F16 or F32 to FP8 e4m3 in blocks of 128 x 128, in the layout of the public DeepSeek-V3.
//!
//! ```text
//! scale = max|w of the block| / 448    (ue8m0: rounded up to a power of two);    code = e4m3(w / scale)
//! ```
//! Attention, dense, shared and expert matrices become FP8. Embedding, head, norms, gate, its bias and eh_proj stay.
//! One tensor at a time is in memory; files keep their names and their share of the tensors.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use moesaic_kernels::{Matrix, f32_to_e4m3};
use rayon::prelude::*;
use safetensors::View;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::config::CONFIG_FILE;
use crate::folder::{self, write_json};
use crate::json::read_text;
use crate::names::{self, Kind, Spec};
use crate::shards::{INDEX_FILE, SINGLE_FILE, Tensor};
use crate::{Checkpoint, ModelError};

const BLOCK: usize = 128;
const E4M3_MAX: f32 = 448.0;
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// What a folder has beside weights and config.json that a worker or coordinator reads.
const COMPANIONS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "LICENSE",
];

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Scales are powers of two, as in V3.1.
    pub ue8m0: bool,
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    pub files: usize,
    pub tensors_quantized: usize,
    pub tensors_copied: usize,
    pub bytes_before: u64,
    pub bytes_after: u64,
}

/// Makes `dst`, which must not exist or be an empty folder; a failure leaves it as it was.
pub fn to_fp8(src: &Path, dst: &Path, options: Options) -> Result<Summary, ModelError> {
    let checkpoint = Checkpoint::open(src)?;
    if checkpoint.config().quantization.is_some() {
        return Err(ModelError::Field {
            file: src.join(CONFIG_FILE),
            field: "quantization_config".to_owned(),
            value: "given".to_owned(),
            expected: "a model that is not quantized".to_owned(),
        });
    }
    folder::make(dst, |partial| write_all(&checkpoint, partial, options))
}

fn write_all(checkpoint: &Checkpoint, dst: &Path, options: Options) -> Result<Summary, ModelError> {
    let config = checkpoint.config();
    let linears: HashMap<String, Spec> = names::main_model(config)
        .chain(names::mtp(config))
        .filter(|spec| spec.kind == Kind::Linear)
        .map(|spec| (spec.name.clone(), spec))
        .collect();
    let mut by_file: BTreeMap<&Path, Vec<&str>> = BTreeMap::new();
    for name in checkpoint.shards().names() {
        if let Some(tensor) = checkpoint.shards().get(name) {
            by_file.entry(tensor.file).or_default().push(name);
        }
    }
    let mut summary = Summary::default();
    let mut index = BTreeMap::new();
    for (file, mut names) in by_file {
        names.sort_unstable();
        let outputs = outputs(checkpoint, &linears, &names, options)?;
        summary.count(&outputs);
        let file_name = file.file_name().map_or_else(|| SINGLE_FILE.into(), |n| n.to_string_lossy().into_owned());
        for (name, output) in &outputs {
            index.insert(name.clone(), file_name.clone());
            summary.bytes_after += output.data_len() as u64;
        }
        let path = dst.join(&file_name);
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(outputs, Some(metadata), &path)
            .map_err(|e| ModelError::file(&path, e.to_string()))?;
        // The writer leaves a file that only its owner can read; whoever could read the source can read the copy.
        fs::metadata(file)
            .and_then(|source| fs::set_permissions(&path, source.permissions()))
            .map_err(|e| ModelError::io(&path, e))?;
        tracing::info!(file = %path.display(), "written");
    }
    if index.values().any(|file| file != SINGLE_FILE) {
        let index = json!({ "metadata": { "total_size": summary.bytes_after }, "weight_map": index });
        write_json(&dst.join(INDEX_FILE), &index)?;
    }
    write_config(checkpoint.dir(), dst, options)?;
    copy_companions(checkpoint.dir(), dst)?;
    Ok(summary)
}

impl Summary {
    fn count(&mut self, outputs: &[(String, Output<'_>)]) {
        self.files += 1;
        for (_, output) in outputs {
            match output {
                Output::Copy(tensor) => {
                    self.tensors_copied += 1;
                    self.bytes_before += tensor.bytes.len() as u64;
                }
                Output::Codes { tensor, .. } => {
                    self.tensors_quantized += 1;
                    self.bytes_before += tensor.bytes.len() as u64;
                }
                Output::Scales { .. } => {}
            }
        }
    }
}

/// A tensor to write; its bytes are made when the writer comes to it.
enum Output<'a> {
    Copy(Tensor<'a>),
    Codes { tensor: Tensor<'a>, matrix: Matrix<'a>, scales: Vec<f32> },
    Scales { shape: Vec<usize>, scales: Vec<f32> },
}

impl View for Output<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Copy(tensor) => tensor.dtype,
            Self::Codes { .. } => Dtype::F8_E4M3,
            Self::Scales { .. } => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Copy(tensor) | Self::Codes { tensor, .. } => tensor.shape,
            Self::Scales { shape, .. } => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Copy(tensor) => Cow::Borrowed(tensor.bytes),
            Self::Codes { matrix, scales, .. } => Cow::Owned(codes(matrix, scales)),
            Self::Scales { scales, .. } => Cow::Owned(scales.iter().flat_map(|s| s.to_le_bytes()).collect()),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Copy(tensor) => tensor.bytes.len(),
            Self::Codes { matrix, .. } => matrix.rows * matrix.cols,
            Self::Scales { scales, .. } => size_of_val(&**scales),
        }
    }
}

/// What becomes of a file's tensors. Reads all weights once, for their scales.
fn outputs<'a>(
    checkpoint: &'a Checkpoint,
    linears: &HashMap<String, Spec>,
    names: &[&str],
    options: Options,
) -> Result<Vec<(String, Output<'a>)>, ModelError> {
    let mut outputs = Vec::new();
    for &name in names {
        let Some(tensor) = checkpoint.shards().get(name) else { continue };
        let Some(spec) = linears.get(name) else {
            outputs.push((name.to_owned(), Output::Copy(tensor)));
            continue;
        };
        let matrix = checkpoint.typed().matrix(spec)?;
        let scales = scales(&matrix, options).ok_or_else(|| {
            ModelError::tensor(tensor.file, name, "has weights that are not finite, which FP8 blocks cannot hold")
        })?;
        let shape = vec![matrix.rows.div_ceil(BLOCK), matrix.cols.div_ceil(BLOCK)];
        outputs.push((spec.scale_name(), Output::Scales { shape, scales: scales.clone() }));
        outputs.push((name.to_owned(), Output::Codes { tensor, matrix, scales }));
    }
    Ok(outputs)
}

/// [ceil(rows / BLOCK), ceil(cols / BLOCK)]; None if a weight is not finite.
fn scales(m: &Matrix<'_>, options: Options) -> Option<Vec<f32>> {
    let bands: Option<Vec<Vec<f32>>> =
        (0..m.rows.div_ceil(BLOCK)).into_par_iter().map(|band| band_scales(m, band, options)).collect();
    Some(bands?.concat())
}

fn band_scales(m: &Matrix<'_>, band: usize, options: Options) -> Option<Vec<f32>> {
    let mut largest = vec![0f32; m.cols.div_ceil(BLOCK)];
    for row in band_values(m, band).chunks_exact(m.cols) {
        for (largest, block) in largest.iter_mut().zip(row.chunks(BLOCK)) {
            for weight in block {
                if !weight.is_finite() {
                    return None;
                }
                *largest = largest.max(weight.abs());
            }
        }
    }
    Some(largest.into_iter().map(|largest| scale(largest, options)).collect())
}

fn scale(largest: f32, options: Options) -> f32 {
    if largest == 0.0 {
        return 1.0;
    }
    // Never a denormal, whose quotients would be coarse.
    let scale = (largest / E4M3_MAX).max(f32::MIN_POSITIVE);
    if options.ue8m0 { up_to_power_of_two(scale) } else { scale }
}

/// `x` is a normal number far below the largest.
fn up_to_power_of_two(x: f32) -> f32 {
    const MANTISSA: u32 = (1 << 23) - 1;
    f32::from_bits((x.to_bits() + MANTISSA) & !MANTISSA)
}

fn codes(m: &Matrix<'_>, scales: &[f32]) -> Vec<u8> {
    let across = m.cols.div_ceil(BLOCK);
    let mut codes = vec![0; m.rows * m.cols];
    codes.par_chunks_mut(BLOCK * m.cols).zip(scales.par_chunks(across)).enumerate().for_each(
        |(band, (codes, scales))| {
            let values = band_values(m, band);
            for (codes, row) in codes.chunks_exact_mut(m.cols).zip(values.chunks_exact(m.cols)) {
                for ((codes, row), scale) in codes.chunks_mut(BLOCK).zip(row.chunks(BLOCK)).zip(scales) {
                    for (code, weight) in codes.iter_mut().zip(row) {
                        *code = f32_to_e4m3(weight / scale);
                    }
                }
            }
        },
    );
    codes
}

fn band_values(m: &Matrix<'_>, band: usize) -> Vec<f32> {
    m.rows_slice(band * BLOCK..m.rows.min((band + 1) * BLOCK)).to_f32()
}

/// The source's config.json with `quantization_config`.
fn write_config(src: &Path, dst: &Path, options: Options) -> Result<(), ModelError> {
    let file = src.join(CONFIG_FILE);
    let text = read_text(&file, CONFIG_BYTES_MAX)?;
    let mut config: Value = serde_json::from_str(&text).map_err(|e| ModelError::file(&file, e.to_string()))?;
    let mut quantization = json!({
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    });
    if options.ue8m0 {
        quantization["scale_fmt"] = json!("ue8m0");
    }
    config["quantization_config"] = quantization;
    write_json(&dst.join(CONFIG_FILE), &config)
}

fn copy_companions(src: &Path, dst: &Path) -> Result<(), ModelError> {
    for name in COMPANIONS {
        let from = src.join(name);
        if from.is_file() {
            fs::copy(&from, dst.join(name)).map_err(|e| ModelError::io(from, e))?;
        }
    }
    Ok(())
}
