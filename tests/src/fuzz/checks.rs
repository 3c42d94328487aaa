//! What every target asserts, and the folders that parsers of files read.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use moesaic_model::synth::{SynthDtype, SynthOptions, synthesize};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region};
use tempfile::TempDir;

use crate::fixtures;

/// Longest text of an error: what a header of gRPC or a line of a log bears.
pub const ERROR_BYTES_MAX: usize = 2048;

/// An error says something, and does not repeat all of the input.
pub fn check_error(error: impl Display) {
    let text = error.to_string();
    assert!(!text.is_empty(), "an error without words");
    assert!(text.len() <= ERROR_BYTES_MAX, "an error of {} bytes: {:.300}...", text.len(), text);
}

/// Does the work and holds all that it allocated against a bound. Counts where the program has made `INSTRUMENTED_SYSTEM`
/// its global allocator.
pub fn within<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let region = Region::new(&INSTRUMENTED_SYSTEM);
    let result = work();
    let allocated = region.change().bytes_allocated;
    assert!(allocated <= bytes, "{allocated} bytes were allocated, expected at most {bytes}");
    result
}

/// A folder whose files a target replaces.
pub struct Folder(TempDir);

impl Folder {
    pub fn new(files: &[(&str, &[u8])]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        files.iter().for_each(|(name, bytes)| folder.put(name, bytes));
        folder
    }

    /// With some files of a fixture.
    pub fn of_fixture(model: &str, names: &[&str]) -> Self {
        let folder = Self::new(&[]);
        for name in names {
            folder.put(name, &std::fs::read(fixtures::folder(model).join(name)).unwrap());
        }
        folder
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }
}

/// The smallest model that has everything: one layer with experts in two groups, a shared one, and FP8 allowed. Blocks
/// with an odd number of columns are what no kernel multiplies in pairs.
pub const TINY_CONFIG: &str = r#"{
    "model_type": "deepseek_v3", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 4, "moe_intermediate_size": 2,
    "num_hidden_layers": 1, "num_attention_heads": 1, "kv_lora_rank": 2, "q_lora_rank": 2, "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 2, "v_head_dim": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "max_position_embeddings": 64, "eos_token_id": 1,
    "tie_word_embeddings": true,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 1]}
}"#;

/// Its checkpoint, of random weights in bf16. `files`: one, or as many as tensors need that have a file each.
pub fn tiny_checkpoint(files: usize) -> Folder {
    let (config, out) = (Folder::new(&[("config.json", TINY_CONFIG.as_bytes())]), Folder::new(&[]));
    let shard_bytes_max = if files == 1 { u64::MAX } else { 256 };
    let options = SynthOptions { seed: 1, dtype: SynthDtype::Bf16, shard_bytes_max };
    synthesize(&config.path("config.json"), &options, out.dir()).unwrap();
    out.put("config.json", TINY_CONFIG.as_bytes());
    out
}
