//! A checkpoint's files: `config.json`, safetensors and their index, packed experts.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use moesaic_attention_worker::engine::weights::Weights;
use moesaic_coordinator::model::Model;
use moesaic_kernels::{Dtype, Numerics};
use moesaic_model::packed::{self, Experts};
use moesaic_model::{Checkpoint, Config, inspect};
use serde_json::Value;

use super::checks::{Folder, check_error, tiny_checkpoint, within};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Of the data that a header is given.
const DATA_BYTES_MAX: u64 = 64 << 10;

thread_local! {
    static CONFIGS: Folder = Folder::new(&[]);
    static ONE_FILE: Folder = tiny_checkpoint(1);
    static MANY_FILES: Folder = tiny_checkpoint(2);
    static PACKED: Folder = tiny_checkpoint(1);
}

/// Every way of rounding, whatever processor this is.
fn numerics() -> Vec<Numerics> {
    let mut all = Numerics::all();
    let mut seen = BTreeSet::new();
    all.retain(|numerics| seen.insert(numerics.name()));
    all
}

/// What a worker reads, a coordinator reads, and they agree.
pub fn config_json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // JSON values take some 30 times a short number's text.
    match within(100 * data.len() + (64 << 10), || Config::parse(Path::new("config.json"), text)) {
        Err(problems) => {
            assert!(!problems.is_empty());
            problems.iter().for_each(check_error);
        }
        Ok(config) => {
            check_config(&config);
            check_coordinator(data, &config);
        }
    }
}

fn check_config(config: &Config) {
    let moe = config.moe_layers();
    assert!(moe.len() <= config.num_hidden_layers && moe.iter().all(|layer| config.is_moe(*layer)));
    assert!(config.softmax_scale().is_finite() && config.softmax_scale() > 0.0);
    let gate = config.gate_params();
    assert!(gate.scale.is_finite());
    if config.n_routed_experts > 0 {
        assert!((1..=config.n_routed_experts).contains(&gate.top_k));
        assert!(config.n_routed_experts.is_multiple_of(gate.groups) && (1..=gate.groups).contains(&gate.groups_kept));
        assert!(gate.top_k <= config.n_routed_experts / gate.groups * gate.groups_kept);
    }
    assert!(config.eos_token_ids.iter().all(|id| (*id as usize) < config.vocab_size));
    assert!(config.latent_width() > 0 && config.qk_head_dim() > 0 && config.logical_groups() > 0);
    assert!(config.quantization.is_none_or(|q| q.block.iter().all(|n| *n > 0)));
    // Fields of types that JSON has; what a fingerprint is made of.
    serde_json::to_vec(config).unwrap();
}

fn check_coordinator(data: &[u8], config: &Config) {
    CONFIGS.with(|folder| {
        folder.put("config.json", data);
        let model = match Model::open(folder.dir(), None) {
            // The least context that can have a prompt and an answer.
            Err(error) if config.max_position_embeddings < 2 => return check_error(error),
            other => other.unwrap_or_else(|error| panic!("the coordinator refuses what the worker reads: {error}")),
        };
        assert_eq!((model.vocabulary as usize, model.context_max), (config.vocab_size, config.max_position_embeddings));
        let layers: Vec<usize> = model.moe_layers.iter().map(|layer| usize::from(layer.0)).collect();
        assert_eq!((layers, model.experts), (config.moe_layers(), config.n_routed_experts));
        assert_eq!(model.eos, config.eos_token_ids);
    });
}

/// A whole file in place of the tiny checkpoint's weights.
pub fn safetensors(data: &[u8]) {
    ONE_FILE.with(|folder| {
        folder.put(WEIGHTS, data);
        check_checkpoint(folder.dir(), data.len());
    });
}

/// The JSON of a header, with as much data behind it as it asks for.
pub fn safetensors_header(data: &[u8]) {
    let ends = |header: &Value| -> Option<u64> {
        header.as_object()?.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max()
    };
    let asked = serde_json::from_slice(data).ok().as_ref().and_then(ends).unwrap_or(0);
    let mut file = (data.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(data);
    // 1.0 in bf16, a small number in f32, 0.0 or 1.0 in FP8.
    file.extend([0x00, 0x38].iter().cycle().take(asked.min(DATA_BYTES_MAX) as usize));
    safetensors(&file);
}

/// The index of a checkpoint in many files.
pub fn index_json(data: &[u8]) {
    MANY_FILES.with(|folder| {
        folder.put(INDEX, data);
        check_checkpoint(folder.dir(), data.len());
    });
}

fn check_checkpoint(dir: &Path, bytes: usize) {
    // Names, hashes and JSON of the header, and the tiny model's list of tensors.
    let opened = within(64 * bytes + (256 << 10), || Checkpoint::open(dir));
    let report = inspect::report(dir);
    report.problems.iter().for_each(check_error);
    match opened {
        Err(error) => {
            check_error(error);
            assert!(!report.problems.is_empty(), "inspect finds nothing wrong");
        }
        Ok(checkpoint) => load(checkpoint),
    }
}

/// All that workers do before they serve.
fn load(checkpoint: Checkpoint) {
    assert_eq!(checkpoint.fingerprint().len(), 32);
    let checkpoint = Arc::new(checkpoint);
    for numerics in numerics() {
        if let Err(error) = Weights::load(checkpoint.clone(), numerics) {
            check_error(error);
        }
        check_experts(&Experts::open(&checkpoint, numerics).unwrap(), &checkpoint);
    }
}

fn check_experts(experts: &Experts<'_>, checkpoint: &Checkpoint) {
    let config = checkpoint.config();
    for layer in config.moe_layers() {
        for expert in 0..config.n_routed_experts {
            match experts.get(layer, expert) {
                Err(error) => check_error(error),
                Ok((ffn, _)) => {
                    assert_eq!([ffn.gate.in_features(), ffn.down.out_features()], [config.hidden_size; 2]);
                }
            }
        }
        assert!(experts.get(layer, config.n_routed_experts).is_err());
    }
}

/// The file of packed experts beside the tiny checkpoint.
pub fn packed(data: &[u8]) {
    PACKED.with(|folder| {
        let checkpoint = Checkpoint::open(folder.dir()).unwrap();
        let numerics = Numerics::portable(Dtype::F32);
        folder.put("experts-f32.packed", data);
        match within(4 * data.len() + (64 << 10), || Experts::open(&checkpoint, numerics)) {
            Err(error) => check_error(error),
            Ok(experts) => {
                assert!(experts.are_packed());
                check_experts(&experts, &checkpoint);
            }
        }
    });
}

/// The tiny checkpoint's files, and the packed experts of it: what seeds are made of.
pub(super) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let read = |folder: &Folder, name: &str| std::fs::read(folder.path(name)).unwrap();
    let (one, many) = (tiny_checkpoint(1), tiny_checkpoint(2));
    let checkpoint = Checkpoint::open(one.dir()).unwrap();
    let written = packed::write(&checkpoint, Numerics::portable(Dtype::F32)).unwrap();
    let weights = read(&one, WEIGHTS);
    let header_bytes = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    vec![
        ("safetensors_header", "tiny", weights[8..8 + header_bytes].to_vec()),
        ("safetensors", "tiny", weights),
        ("index_json", "tiny", read(&many, INDEX)),
        ("packed", "tiny", std::fs::read(written.path).unwrap()),
        ("config_json", "tiny", read(&one, "config.json")),
    ]
}
