//! Tensor files that lie: each gives an error that names file and tensor, and none a panic.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use moesaic_model::{Checkpoint, inspect, reference};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Tensor, copy, edit_config, edit_tensors, file_bytes, find, write_tensors};

/// The error of opening the v3 fixture with this file in place of its weights.
fn open_with(bytes: &[u8]) -> String {
    let dir = copy("v3");
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path()).unwrap_err().to_string()
}

#[test]
fn headers() {
    let tensor = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let deep = format!("{{\"__metadata__\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let two = |second: &str| format!("{{{tensor},\"b\":{second}}}");
    let one = |tensor: &str| format!("{{\"a\":{tensor}}}");
    let table: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "has 0 bytes, expected at least the 8 of a header's length"),
        (vec![1, 2, 3], "has 3 bytes, expected at least the 8 of a header's length"),
        (file_bytes(b"", b""), "header: EOF"),
        (u64::MAX.to_le_bytes().to_vec(), "header length is 18446744073709551615, expected at most 100000000"),
        (100u64.to_le_bytes().to_vec(), "header length is 100, expected at most 0, the rest of the file"),
        (file_bytes(b"{\"\xff\"}", b""), "header is not UTF-8"),
        (file_bytes(b"{\"a\":", b""), "header: tensor a: EOF"),
        (file_bytes(b"[]", b""), "header: invalid type: sequence, expected a JSON object of tensors"),
        (file_bytes(deep.as_bytes(), b""), "header: invalid type: sequence"),
        (file_bytes(b"{\"__metadata__\":{\"a\":1}}", b""), "header: invalid type: integer"),
        (file_bytes(format!("{{{tensor},{tensor}}}").as_bytes(), &[0; 4]), "\"a\" is given twice"),
        (
            file_bytes(one(r#"{"dtype":"F99","shape":[1],"data_offsets":[0,4]}"#).as_bytes(), &[0; 4]),
            "tensor a: unknown variant `F99`",
        ),
        (
            file_bytes(one(r#"{"dtype":"F32","data_offsets":[0,4]}"#).as_bytes(), &[0; 4]),
            "tensor a: missing field `shape`",
        ),
        (
            file_bytes(one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#).as_bytes(), &[0; 4]),
            "tensor a: invalid value",
        ),
        (
            file_bytes(one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#).as_bytes(), &[0; 3]),
            "tensor a is truncated: data_offsets end at 4, and the file has 3 bytes of data",
        ),
        (
            file_bytes(one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#).as_bytes(), &[0; 5]),
            "has 5 bytes of data, expected 4 by its header",
        ),
        (
            file_bytes(one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#).as_bytes(), &[0; 4]),
            "tensor a leaves a gap before it: data_offsets begin at 4, expected 0",
        ),
        (
            file_bytes(one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#).as_bytes(), &[0; 4]),
            "tensor a has data_offsets [0, 4], expected 8 bytes for F32 [2]",
        ),
        (
            file_bytes(
                one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}"#).as_bytes(),
                &[0; 4],
            ),
            "tensor a has a shape [4294967296, 4294967296] that no file can hold",
        ),
        (
            file_bytes(one(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}"#).as_bytes(), &[0; 4]),
            "tensor a has a shape [1, 1, 1, 1, 1, 1, 1, 1, 1] that no file can hold",
        ),
        (
            file_bytes(two(r#"{"dtype":"F32","shape":[1],"data_offsets":[8,12]}"#).as_bytes(), &[0; 12]),
            "tensor b leaves a gap before it: data_offsets begin at 8, expected 4",
        ),
        (
            file_bytes(two(r#"{"dtype":"F32","shape":[1],"data_offsets":[2,6]}"#).as_bytes(), &[0; 6]),
            "tensor b overlaps the tensor before it: data_offsets begin at 2, expected 4",
        ),
    ];
    for (bytes, expected) in table {
        let error = open_with(&bytes);
        assert!(error.contains("model.safetensors: ") && error.contains(expected), "{error}\nexpected: {expected}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = fs::read(crate::support::fixture("v3").join("model.safetensors")).unwrap();
    for cut in [1, bytes.len() / 1000, bytes.len() / 2, bytes.len() - 1] {
        let error = open_with(&bytes[..cut]);
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn tensors_that_do_not_fit_the_config() {
    type Edit = fn(&mut Vec<Tensor>);
    let table: [(Edit, &str); 6] = [
        (|t| t.retain(|t| t.name != "model.norm.weight"), "tensor model.norm.weight is missing"),
        (
            |t| t.retain(|t| t.name != "model.layers.3.mlp.experts.31.up_proj.weight"),
            "tensor model.layers.3.mlp.experts.31.up_proj.weight is missing",
        ),
        (
            |t| find(t, "lm_head.weight").shape = vec![64, 512],
            "tensor lm_head.weight has shape [64, 512], expected [512, 64] by config.json",
        ),
        (
            |t| find(t, "model.norm.weight").shape = vec![1, 64],
            "tensor model.norm.weight has shape [1, 64], expected [64] by config.json",
        ),
        (
            |t| find(t, "model.layers.0.mlp.up_proj.weight").dtype = Dtype::I16,
            "tensor model.layers.0.mlp.up_proj.weight has dtype I16, expected F32, F16, BF16 or F8_E4M3",
        ),
        (
            |t| find(t, "model.norm.weight").dtype = Dtype::U16,
            "tensor model.norm.weight has dtype U16, expected F32, F16 or BF16",
        ),
    ];
    for (edit, expected) in table {
        let dir = copy("v3");
        edit_tensors(dir.path(), edit);
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}\nexpected: {expected}");
    }
}

#[test]
fn values_that_cannot_be_computed_with() {
    fn first(t: &mut [Tensor], name: &str, value: f32) {
        let t = find(t, name);
        let bytes = value.to_le_bytes();
        match t.dtype {
            Dtype::F32 => t.bytes[..4].copy_from_slice(&bytes),
            Dtype::BF16 => t.bytes[..2].copy_from_slice(&bytes[2..]),
            other => panic!("{other}"),
        }
    }
    const SCALE: &str = "model.layers.1.self_attn.q_a_proj.weight_scale_inv";
    const NORM: &str = "model.layers.1.input_layernorm.weight";
    const GATE: &str = "model.layers.1.mlp.gate.weight";
    const BIAS: &str = "model.layers.1.mlp.gate.e_score_correction_bias";
    for (name, value, expected) in [
        (SCALE, f32::NAN, "has scale NaN in block 0, expected a finite number from 0"),
        (SCALE, f32::INFINITY, "has scale inf in block 0, expected a finite number from 0"),
        (SCALE, -1.0, "has scale -1 in block 0, expected a finite number from 0"),
        (NORM, f32::NAN, "has NaN at 0, expected finite numbers"),
        (GATE, f32::NEG_INFINITY, "has -inf at 0, expected finite numbers"),
        (BIAS, f32::NAN, "has NaN at 0, expected finite numbers"),
    ] {
        let dir = copy("v3-fp8");
        edit_tensors(dir.path(), |t| first(t, name, value));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let error = checkpoint.layer(1).unwrap_err().to_string();
        assert!(error.ends_with(&format!("model.safetensors: tensor {name} {expected}")), "{error}");
        checkpoint.layer(2).unwrap();
    }
}

#[test]
fn fp8_without_what_it_needs() {
    const WEIGHT: &str = "model.layers.0.mlp.down_proj.weight";
    let scale = format!("{WEIGHT}_scale_inv");
    let error_of = |edit: &dyn Fn(&Path)| {
        let dir = copy("v3-fp8");
        edit(dir.path());
        Checkpoint::open(dir.path()).unwrap_err().to_string()
    };
    let no_scales = error_of(&|dir| edit_tensors(dir, |t| t.retain(|t| t.name != scale)));
    assert!(
        no_scales.ends_with(&format!("tensor {WEIGHT} is F8_E4M3, expected its scales beside it as {scale}")),
        "{no_scales}"
    );
    let shape = error_of(&|dir| edit_tensors(dir, |t| find(t, &scale).shape = vec![3, 2]));
    assert!(shape.ends_with(&format!("tensor {scale} has shape [3, 2], expected [2, 3] by config.json")), "{shape}");
    let dtype = error_of(&|dir| edit_tensors(dir, |t| find(t, &scale).dtype = Dtype::I32));
    assert!(dtype.ends_with(&format!("tensor {scale} has dtype I32, expected F32 or F8_E8M0")), "{dtype}");
    let no_config = error_of(&|dir| edit_config(dir, |c| c["quantization_config"] = json!(null)));
    assert!(
        no_config.contains("is F8_E4M3, expected quantization_config.weight_block_size in config.json"),
        "{no_config}"
    );
    let block = error_of(&|dir| edit_config(dir, |c| c["quantization_config"]["weight_block_size"] = json!([64, 64])));
    assert!(block.contains("_scale_inv has shape"), "{block}");
}

#[test]
fn layers_and_experts_that_are_not_there() {
    let checkpoint = Checkpoint::open(&crate::support::fixture("tiny-r1")).unwrap();
    let mtp_layer = checkpoint.layer(5).unwrap_err().to_string();
    assert_eq!(mtp_layer, "layer 5 of 5: there is no such block");
    for (layer, expert) in [(0, 0), (1, 32), (5, 0), (usize::MAX, usize::MAX)] {
        let error = checkpoint.expert(layer, expert).unwrap_err().to_string();
        assert_eq!(error, format!("layer {layer} of 5, expert {expert} of 32: there is no such block"));
    }
}

/// A whole model of a few hundred bytes: one dense layer, one of four experts, FP8 in blocks of 2 x 3.
const SMALL_CONFIG: &str = r#"{"model_type":"deepseek_v3","vocab_size":5,"hidden_size":4,"intermediate_size":3,
    "moe_intermediate_size":2,"num_hidden_layers":2,"num_attention_heads":1,"kv_lora_rank":2,"qk_nope_head_dim":2,
    "qk_rope_head_dim":2,"v_head_dim":2,"n_routed_experts":4,"num_experts_per_tok":2,"n_group":2,"topk_group":1,
    "first_k_dense_replace":1,"max_position_embeddings":16,
    "quantization_config":{"quant_method":"fp8","weight_block_size":[2,3]}}"#;

static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut tensors = Vec::new();
    let mut put = |name: &str, dtype: Dtype, shape: &[usize]| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let value = if dtype == Dtype::F32 { &0.5f32.to_le_bytes()[..] } else { &[0x38] };
        let bytes = value.iter().copied().cycle().take(bytes).collect();
        tensors.push(Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes });
    };
    for (name, shape) in [
        ("model.embed_tokens.weight", &[5, 4][..]),
        ("model.norm.weight", &[4]),
        ("lm_head.weight", &[5, 4]),
        ("model.layers.1.mlp.gate.weight", &[4, 4]),
        ("model.layers.1.mlp.gate.e_score_correction_bias", &[4]),
    ] {
        put(name, Dtype::F32, shape);
    }
    let mut linears = vec![("0.mlp".to_owned(), [3, 4])];
    linears.extend((0..4).map(|expert| (format!("1.mlp.experts.{expert}"), [2, 4])));
    let mut matrices: Vec<(String, [usize; 2])> = Vec::new();
    for (prefix, [width, hidden]) in linears {
        for (name, shape) in [("gate", [width, hidden]), ("up", [width, hidden]), ("down", [hidden, width])] {
            matrices.push((format!("{prefix}.{name}_proj"), shape));
        }
    }
    for layer in 0..2 {
        for (name, values) in [("input_layernorm", 4), ("post_attention_layernorm", 4), ("self_attn.kv_a_layernorm", 2)]
        {
            put(&format!("model.layers.{layer}.{name}.weight"), Dtype::F32, &[values]);
        }
        for (name, shape) in
            [("q_proj", [4, 4]), ("kv_a_proj_with_mqa", [4, 4]), ("kv_b_proj", [4, 2]), ("o_proj", [4, 2])]
        {
            matrices.push((format!("{layer}.self_attn.{name}"), shape));
        }
    }
    for (name, [rows, cols]) in matrices {
        put(&format!("model.layers.{name}.weight"), Dtype::F8_E4M3, &[rows, cols]);
        put(&format!("model.layers.{name}.weight_scale_inv"), Dtype::F32, &[rows.div_ceil(2), cols.div_ceil(3)]);
    }
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("small.safetensors");
    write_tensors(&file, &tensors);
    fs::read(file).unwrap()
});

fn small(config: &str, weights: &[u8]) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    fs::write(dir.path().join("model.safetensors"), weights).unwrap();
    dir
}

/// Everything that a worker, `inspect` and the reference do with a folder. The error of opening it, if any.
fn use_all_of(dir: &Path) -> Option<String> {
    let problems = inspect::report(dir).problems;
    assert!(!problems.is_empty(), "the small model has no tokenizer");
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return Some(error.to_string()),
    };
    assert_eq!(checkpoint.fingerprint().len(), 32);
    for layer in 0..checkpoint.config().num_hidden_layers {
        checkpoint.layer(layer).ok();
        for expert in 0..checkpoint.config().n_routed_experts {
            checkpoint.expert(layer, expert).ok();
        }
    }
    reference::forward(&checkpoint, &[0, 0]).ok();
    None
}

#[test]
fn the_small_model_is_whole() {
    let dir = small(SMALL_CONFIG, &SMALL);
    assert_eq!(use_all_of(dir.path()), None);
    let logits = reference::forward(&Checkpoint::open(dir.path()).unwrap(), &[0, 4]).unwrap();
    assert!(logits.len() == 10 && logits.iter().all(|x| x.is_finite()), "{logits:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Whatever is done to the bytes of the weights: no panic, and what the format's own reader refuses is refused by name.
    #[test]
    fn mutated_weights(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in proptest::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = SMALL.clone();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let error = use_all_of(small(SMALL_CONFIG, &bytes).path());
        if SafeTensors::read_metadata(&bytes).is_err() {
            prop_assert!(error.is_some_and(|error| error.contains("model.safetensors: ")));
        }
    }

    /// Numbers of config.json that the weights were not made for: an error, or a model that computes.
    #[test]
    fn mutated_configs(edits in proptest::collection::vec((any::<prop::sample::Index>(), 0u64..9), 1..4)) {
        let mut config: Value = serde_json::from_str(SMALL_CONFIG).unwrap();
        let names: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (at, value) in edits {
            config[at.get(&names)] = json!(value);
        }
        use_all_of(small(&config.to_string(), &SMALL).path());
    }
}
