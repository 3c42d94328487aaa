//! The numbers that papers give, from config.json alone; and every problem of a folder at once.

use std::fs;
use std::path::Path;

use moesaic_model::Config;
use moesaic_model::inspect::{Cache, Parameters, report};
use serde_json::json;

use crate::support::{copy, edit_config, edit_tensors, find, fixture, json as read_json};

fn published_json() -> serde_json::Value {
    read_json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v3.json"))
}

fn published(edit: impl FnOnce(&mut serde_json::Value)) -> Config {
    let mut config = published_json();
    edit(&mut config);
    Config::parse(Path::new("config.json"), &config.to_string()).unwrap()
}

fn billions(n: u64) -> f64 {
    (n as f64 / 1e8).round() / 10.0
}

#[test]
fn v3_has_671_billion_parameters_and_uses_37() {
    let config = published(|_| {});
    let p = Parameters::of(&config);
    assert_eq!(
        (billions(p.total), billions(p.active), billions(p.experts), billions(p.mtp)),
        (671.0, 36.6, 653.9, 11.6)
    );
    assert_eq!(Cache::of(&config), Cache { latent: 70_272, multi_head: 4_997_120 });
}

/// The sizes of the public V2-Lite.
fn v2_lite(c: &mut serde_json::Value) {
    for (field, value) in [
        ("model_type", json!("deepseek_v2")),
        ("vocab_size", json!(102400)),
        ("hidden_size", json!(2048)),
        ("intermediate_size", json!(10944)),
        ("moe_intermediate_size", json!(1408)),
        ("num_hidden_layers", json!(27)),
        ("num_nextn_predict_layers", json!(null)),
        ("num_attention_heads", json!(16)),
        ("num_key_value_heads", json!(16)),
        ("n_routed_experts", json!(64)),
        ("n_shared_experts", json!(2)),
        ("num_experts_per_tok", json!(6)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("first_k_dense_replace", json!(1)),
        ("q_lora_rank", json!(null)),
        ("scoring_func", json!("softmax")),
        ("topk_method", json!("greedy")),
    ] {
        c[field] = value;
    }
}

#[test]
fn v2_lite_has_15_7_billion_parameters_and_uses_2_4() {
    let p = Parameters::of(&published(v2_lite));
    assert_eq!((billions(p.total), p.active / 10_000_000, p.mtp), (15.7, 245, 0));
}

/// What a person sees of the published models, from a folder with nothing but config.json.
#[test]
fn the_words_of_published_sizes() {
    let words = |config: &serde_json::Value| {
        let dir = tempfile::TempDir::new().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        report(dir.path()).to_string()
    };
    let mut config = published_json();
    let text = words(&config);
    let expected = "671B total, 36.6B active a token, 654B in routed experts, 11.6B in MTP layers";
    assert!(text.contains(expected), "{text}");
    v2_lite(&mut config);
    let text = words(&config);
    assert!(text.contains("15.7B total, 2.45B active a token, 14.4B in routed experts, no MTP layers"), "{text}");
}

#[test]
fn a_good_folder_has_no_problems() {
    for name in ["v3", "v3-fp8", "v2", "v2-lite", "tiny-r1", "tiny-r1-fp8"] {
        let report = report(&fixture(name));
        assert_eq!((report.problems.as_slice(), report.notes.as_slice()), (&[][..], &[][..]), "{name}");
        assert_eq!(report.fingerprint.as_ref().map(String::len), Some(32), "{name}");
    }
}

#[test]
fn bytes_by_owner_add_up_to_the_file() {
    let bytes = |name: &str| report(&fixture(name)).bytes;
    let tiny = bytes("tiny-r1");
    let p = report(&fixture("tiny-r1")).parameters().unwrap();
    assert_eq!(tiny.experts, 2 * p.experts);
    let data: usize =
        crate::support::read_tensors(&fixture("tiny-r1").join("model.safetensors")).iter().map(|t| t.bytes.len()).sum();
    assert_eq!(tiny.attention + tiny.experts + tiny.mtp, data as u64);
    let fp8 = bytes("tiny-r1-fp8");
    // A code a weight, and one F32 scale for each of an expert's three matrices, which fit one block.
    assert_eq!(fp8.experts, p.experts + 4 * 3 * 32 * 4);
}

#[test]
fn every_problem_is_listed() {
    let dir = copy("v3");
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    edit_tensors(dir.path(), |tensors| {
        tensors.retain(|t| t.name != "lm_head.weight");
        find(tensors, "model.norm.weight").shape = vec![2, 32];
        let mut extra = find(tensors, "model.embed_tokens.weight").clone();
        extra.name = "surprise".to_owned();
        tensors.push(extra);
    });
    edit_config(dir.path(), |c| c["num_nextn_predict_layers"] = json!(1));
    let report = report(dir.path());
    let text = report.to_string();
    assert_eq!(report.problems.len(), 3, "{text}");
    for expected in [
        "tokenizer.json: is missing",
        "tensor lm_head.weight is missing",
        "tensor model.norm.weight has shape [2, 32], expected [64] by config.json",
        "config.json has 1 MTP layers, and the files have no tensors of them",
        "1 tensors are read by no worker, surprise for one",
        "problems     3",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    assert_eq!(report.fingerprint, None);
}

/// 255 layers of 4096 experts are promised; the fixture has 3 of 32. The rest is counted, not listed.
#[test]
fn a_config_that_promises_millions_of_tensors() {
    let dir = copy("v3");
    edit_config(dir.path(), |c| {
        c["num_hidden_layers"] = json!(256);
        c["n_routed_experts"] = json!(4096);
    });
    let problems = report(dir.path()).problems;
    assert_eq!(problems.len(), 10_001);
    // Three tensors an expert, 14 others a layer; and the layers that are there have a smaller gate and bias.
    let wrong = 3 * (255 * 4096 - 3 * 32) + 14 * 252 + 2 * 3;
    assert!(problems[10_000].ends_with(&format!(": {} more tensors are missing or do not fit", wrong - 10_000)));
}

#[test]
fn values_are_looked_at_when_the_shapes_are_right() {
    let dir = copy("v3-fp8");
    const SCALES: [&str; 2] = [
        "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv",
        "model.layers.2.mlp.experts.5.down_proj.weight_scale_inv",
    ];
    edit_tensors(dir.path(), |tensors| {
        for name in SCALES {
            find(tensors, name).bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
    });
    let problems = report(dir.path()).problems;
    assert_eq!(problems.len(), 2, "{problems:?}");
    for (problem, name) in problems.iter().zip(SCALES) {
        assert!(problem.contains(&format!("tensor {name} has scale NaN in block 0")), "{problem}");
    }
}

#[test]
fn all_of_a_broken_config_is_listed_and_a_folder_of_nothing_too() {
    let dir = copy("v3");
    edit_config(dir.path(), |c| {
        c["hidden_size"] = json!(0);
        c["n_group"] = json!(5);
    });
    let broken = report(dir.path());
    assert_eq!(broken.problems.len(), 2, "{:?}", broken.problems);
    assert_eq!((broken.parameters(), broken.cache()), (None, None));
    let nothing = report(Path::new("/nowhere/at/all")).problems;
    assert_eq!(nothing.len(), 3, "{nothing:?}");
}

#[test]
fn the_words() {
    let text = report(&fixture("tiny-r1")).to_string();
    for expected in [
        "family       deepseek_v3, not quantized",
        "layers       5 (1 dense, 4 of 32 experts, 4 of them and 1 shared a token)",
        "cache        800 bytes a token in bf16; ordinary multi-head attention 3200 bytes, 4.0 times as many",
        "problems     none",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    assert!(report(&fixture("v3-fp8")).to_string().contains("deepseek_v3, FP8 in blocks of 128 x 128"));
}
