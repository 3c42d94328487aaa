//! Which tensors there will be, from which values, and in which file.

use std::path::Path;

use super::values::{REACH_PER_STD, Stored, Stream, Values};
use super::{SynthDtype, SynthOptions};
use crate::names::{self, Kind, Spec};
use crate::shards::SINGLE_FILE;
use crate::{Config, ModelError};

/// FP8 blocks are BLOCK x BLOCK.
pub(super) const BLOCK: usize = 128;
/// DeepSeek-V3 in FP8 has 92,000; an index of more would be larger than readers take.
const TENSORS_MAX: usize = 1 << 18;
/// As many as readers open.
const FILES_MAX: usize = 4096;

const E4M3_MAX: f32 = 448.0;
const NORM_REACH: f32 = 0.1;
const BIAS_REACH: f32 = 0.01;
/// How far the scales of a tensor's blocks are from their mean, as part of it.
const SCALE_REACH: f32 = 0.1;

pub(super) struct Plan {
    pub files: Vec<PlannedFile>,
    pub tensors: usize,
    /// Of tensor data.
    pub bytes: u64,
}

pub(super) struct PlannedFile {
    pub name: String,
    /// In the order of their data.
    pub tensors: Vec<Planned>,
}

#[derive(Debug)]
pub(super) struct Planned {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Values,
}

impl Planned {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.values.stored.bytes()
    }
}

impl Plan {
    /// `config_file` is for the words of the errors only.
    pub fn new(config_file: &Path, config: &Config, options: &SynthOptions) -> Result<Self, ModelError> {
        let recipe = Recipe { config, seed: options.seed, fp8: options.dtype == SynthDtype::Fp8 };
        let specs = names::main_model(config).chain(names::mtp(config));
        // One more than allowed tells that there are too many, and a config may promise millions.
        let tensors: Vec<Planned> = specs.flat_map(|spec| recipe.tensors(spec)).take(TENSORS_MAX + 1).collect();
        if tensors.len() > TENSORS_MAX {
            return Err(ModelError::Field {
                file: config_file.to_owned(),
                field: "num_hidden_layers x n_routed_experts".to_owned(),
                value: format!("{} x {}", config.num_hidden_layers, config.n_routed_experts),
                expected: format!("a model of at most {TENSORS_MAX} tensors"),
            });
        }
        let (count, bytes) = (tensors.len(), tensors.iter().map(Planned::bytes).sum::<u64>());
        let mut parts = split(tensors, options.shard_bytes_max);
        if parts.len() > FILES_MAX {
            // Two neighbours are more than one file may hold, so twice the mean is always enough.
            let enough = (2 * bytes).div_ceil(FILES_MAX as u64 - 1);
            return Err(ModelError::Field {
                file: config_file.to_owned(),
                field: "shard_bytes_max".to_owned(),
                value: format!("{}, which makes {} files", options.shard_bytes_max, parts.len()),
                expected: format!("at most {FILES_MAX} files, so {enough} or more"),
            });
        }
        for part in &mut parts {
            // The widest first, so that every value lies at a multiple of its own width.
            part.sort_by_key(|tensor| std::cmp::Reverse(tensor.values.stored.bytes()));
        }
        let of = parts.len();
        let named = |(n, tensors)| PlannedFile { name: file_name(n + 1, of), tensors };
        Ok(Self { files: parts.into_iter().enumerate().map(named).collect(), tensors: count, bytes })
    }
}

fn file_name(n: usize, of: usize) -> String {
    if of == 1 { SINGLE_FILE.to_owned() } else { format!("model-{n:05}-of-{of:05}.safetensors") }
}

/// In order, and each part as long as it may be.
fn split(tensors: Vec<Planned>, bytes_max: u64) -> Vec<Vec<Planned>> {
    let mut parts: Vec<Vec<Planned>> = Vec::new();
    let mut part_bytes = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        match parts.last_mut() {
            Some(part) if part_bytes + bytes <= bytes_max => {
                part.push(tensor);
                part_bytes += bytes;
            }
            _ => {
                parts.push(vec![tensor]);
                part_bytes = bytes;
            }
        }
    }
    parts
}

/// What a tensor's values are.
struct Recipe<'a> {
    config: &'a Config,
    seed: u64,
    fp8: bool,
}

impl Recipe<'_> {
    /// The tensor, after its scales if it has them.
    fn tensors(&self, spec: Spec) -> Vec<Planned> {
        let stream = Stream::new(self.seed, &self.drawn_as(&spec));
        let values = |stored, center, reach| Values { stream, stored, center, reach };
        let values = match spec.kind {
            Kind::Vector if is_gate_bias(&spec) => values(Stored::F32, 0.0, BIAS_REACH),
            Kind::Vector => values(Stored::Bf16, 1.0, NORM_REACH),
            Kind::Linear if self.fp8 => values(Stored::E4m3, 0.0, E4M3_MAX),
            Kind::Linear | Kind::Plain => values(Stored::Bf16, 0.0, self.reach(&spec)),
        };
        let scales = (values.stored == Stored::E4m3).then(|| self.scales(&spec));
        let tensor = Planned { name: spec.name, shape: spec.shape, values };
        scales.into_iter().chain([tensor]).collect()
    }

    fn scales(&self, spec: &Spec) -> Planned {
        let mean = self.reach(spec) / E4M3_MAX;
        let name = spec.scale_name();
        let stream = Stream::new(self.seed, &name);
        let values = Values { stream, stored: Stored::F32, center: mean, reach: SCALE_REACH * mean };
        Planned { name, shape: spec.shape.iter().map(|n| n.div_ceil(BLOCK)).collect(), values }
    }

    /// Of a matrix's weights.
    fn reach(&self, spec: &Spec) -> f32 {
        let only_looked_up = is_embedding(spec) && !self.config.tie_word_embeddings;
        let columns = spec.shape.last().map_or(1.0, |&columns| columns as f32);
        REACH_PER_STD * if only_looked_up { 1.0 } else { columns.sqrt().recip() }
    }

    /// The name whose stream it takes. An MTP layer's embedding and head are copies of the main model's.
    fn drawn_as(&self, spec: &Spec) -> String {
        let tied = self.config.tie_word_embeddings;
        match spec.kind {
            Kind::Plain if is_embedding(spec) || (is_head(spec) && tied) => names::embedding(self.config).name,
            Kind::Plain if is_head(spec) => names::head(self.config).name,
            _ => spec.name.clone(),
        }
    }
}

/// The one vector that is no norm's weight.
fn is_gate_bias(spec: &Spec) -> bool {
    spec.kind == Kind::Vector && !spec.name.ends_with(".weight")
}

/// The main model's or an MTP layer's.
fn is_embedding(spec: &Spec) -> bool {
    spec.name.ends_with("embed_tokens.weight")
}

fn is_head(spec: &Spec) -> bool {
    spec.name.ends_with("head.weight")
}
