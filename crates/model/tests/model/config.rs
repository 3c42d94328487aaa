//! config.json: what is read, and each way to be wrong with the words it must give.

use std::path::Path;

use moesaic_kernels::{GateParams, GroupScore, Scoring};
use moesaic_model::{Config, Family, Quantization};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::{fixture, json as read_json};

fn parse(config: &Value) -> Result<Config, Vec<String>> {
    Config::parse(Path::new("config.json"), &config.to_string())
        .map_err(|problems| problems.iter().map(ToString::to_string).collect())
}

fn v3() -> Value {
    read_json(&fixture("v3").join("config.json"))
}

/// Sets a field of the v3 fixture, "a.b" for one inside; null removes it.
fn v3_with(field: &str, value: Value) -> Value {
    let mut config = v3();
    match field.split_once('.') {
        Some((section, inner)) => config[section][inner] = value,
        None => config[field] = value,
    }
    config
}

#[test]
fn every_wrong_field_is_named_with_its_value_and_what_was_expected() {
    let null = Value::Null;
    let table = [
        ("model_type", json!("qwen2"), "model_type is \"qwen2\", expected \"deepseek_v2\" or \"deepseek_v3\""),
        ("model_type", null.clone(), "model_type is missing, expected \"deepseek_v2\" or \"deepseek_v3\""),
        ("vocab_size", json!(0), "vocab_size is 0, expected a whole number from 1 to 16777216"),
        (
            "vocab_size",
            json!(1u64 << 62),
            "vocab_size is 4611686018427387904, expected a whole number from 1 to 16777216",
        ),
        ("hidden_size", null.clone(), "hidden_size is missing, expected a whole number from 1 to 131072"),
        ("hidden_size", json!(-64), "hidden_size is -64, expected a whole number from 1 to 131072"),
        ("hidden_size", json!(64.5), "hidden_size is 64.5, expected a whole number from 1 to 131072"),
        ("hidden_size", json!("64"), "hidden_size is \"64\", expected a whole number from 1 to 131072"),
        ("intermediate_size", json!(0), "intermediate_size is 0, expected a whole number from 1 to 1048576"),
        ("moe_intermediate_size", json!(0), "moe_intermediate_size is 0, expected a whole number from 1 to 16384"),
        ("num_hidden_layers", json!(0), "num_hidden_layers is 0, expected a whole number from 1 to 256"),
        ("num_nextn_predict_layers", json!(9), "num_nextn_predict_layers is 9, expected a whole number from 0 to 8"),
        ("num_attention_heads", json!(0), "num_attention_heads is 0, expected a whole number from 1 to 4096"),
        ("num_key_value_heads", json!(2), "num_key_value_heads is 2, expected num_attention_heads, 4"),
        ("q_lora_rank", json!(0), "q_lora_rank is 0, expected a whole number from 1 to 65536"),
        ("kv_lora_rank", json!(0), "kv_lora_rank is 0, expected a whole number from 1 to 65536"),
        ("qk_nope_head_dim", json!(0), "qk_nope_head_dim is 0, expected a whole number from 1 to 4096"),
        ("qk_rope_head_dim", json!(0), "qk_rope_head_dim is 0, expected a whole number from 2 to 4096"),
        ("qk_rope_head_dim", json!(7), "qk_rope_head_dim is 7, expected an even number"),
        ("v_head_dim", json!(1 << 20), "v_head_dim is 1048576, expected a whole number from 1 to 4096"),
        ("n_routed_experts", json!(0), "n_routed_experts is 0, expected at least 1, or null for a dense model"),
        ("n_routed_experts", json!(65536), "n_routed_experts is 65536, expected a whole number from 0 to 4096"),
        ("n_routed_experts", json!(30), "n_group is 4, expected a divisor of n_routed_experts, 30"),
        ("n_group", json!(0), "n_group is 0, expected a whole number from 1 to 32"),
        ("n_group", json!(5), "n_group is 5, expected a divisor of n_routed_experts, 32"),
        (
            "n_group",
            json!(32),
            "n_group is 32, expected at least 2 experts a group, because noaux_tc scores a group by its best two",
        ),
        ("topk_group", json!(5), "topk_group is 5, expected a whole number from 1 to 4"),
        ("topk_group", json!(0), "topk_group is 0, expected a whole number from 1 to 4"),
        ("num_experts_per_tok", json!(33), "num_experts_per_tok is 33, expected a whole number from 1 to 32"),
        (
            "num_experts_per_tok",
            json!(17),
            "num_experts_per_tok is 17, expected at most 16, the experts of the groups that are kept",
        ),
        ("num_experts_per_tok", json!(0), "num_experts_per_tok is 0, expected a whole number from 1 to 32"),
        ("n_shared_experts", json!(65), "n_shared_experts is 65, expected a whole number from 0 to 64"),
        ("first_k_dense_replace", json!(5), "first_k_dense_replace is 5, expected a whole number from 0 to 4"),
        ("moe_layer_freq", json!(0), "moe_layer_freq is 0, expected a whole number from 1 to 256"),
        ("routed_scaling_factor", json!(0), "routed_scaling_factor is 0, expected a number from 0.000001 to 1000000"),
        ("norm_topk_prob", json!(1), "norm_topk_prob is 1, expected true or false"),
        ("scoring_func", json!("tanh"), "scoring_func is \"tanh\", expected \"sigmoid\" or \"softmax\""),
        (
            "topk_method",
            json!("best"),
            "topk_method is \"best\", expected \"greedy\" or \"group_limited_greedy\" or \"noaux_tc\"",
        ),
        ("rms_norm_eps", json!(0), "rms_norm_eps is 0, expected a number from 0.000000000001 to 1"),
        ("rope_theta", json!(1), "rope_theta is 1, expected a number from 1.5 to 1000000000000"),
        ("rope_scaling", json!(4), "rope_scaling is 4, expected an object or null"),
        ("rope_scaling.type", json!("linear"), "rope_scaling.type is \"linear\", expected \"yarn\" or \"default\""),
        ("rope_scaling.factor", json!(0.5), "rope_scaling.factor is 0.5, expected a number from 1 to 1000000"),
        ("rope_scaling.factor", null.clone(), "rope_scaling.factor is missing, expected a number from 1 to 1000000"),
        (
            "rope_scaling.original_max_position_embeddings",
            json!(0),
            "rope_scaling.original_max_position_embeddings is 0, expected a whole number from 1 to 4194304",
        ),
        ("rope_scaling.beta_fast", json!(0.5), "rope_scaling.beta_fast is 0.5, expected at least beta_slow, 1"),
        ("rope_scaling.mscale", json!(-1), "rope_scaling.mscale is -1, expected a number from 0 to 100"),
        ("rope_scaling.attention_factor", json!(1.3), "rope_scaling.attention_factor is 1.3, expected null"),
        (
            "max_position_embeddings",
            json!(0),
            "max_position_embeddings is 0, expected a whole number from 1 to 4194304",
        ),
        ("eos_token_id", json!(512), "eos_token_id is 512, expected at most 16 token ids below vocab_size, 512"),
        (
            "eos_token_id",
            json!([1, "x"]),
            "eos_token_id is [1,\"x\"], expected at most 16 token ids below vocab_size, 512",
        ),
        ("bos_token_id", json!(-1), "bos_token_id is -1, expected at most 16 token ids below vocab_size, 512"),
        ("tie_word_embeddings", json!("no"), "tie_word_embeddings is \"no\", expected true or false"),
        ("hidden_act", json!("gelu"), "hidden_act is \"gelu\", expected \"silu\""),
        ("attention_bias", json!(true), "attention_bias is true, expected false"),
        (
            "quantization_config",
            json!({ "quant_method": "awq", "weight_block_size": [128, 128] }),
            "quantization_config.quant_method is \"awq\", expected \"fp8\"",
        ),
        (
            "quantization_config",
            json!({ "quant_method": "fp8" }),
            "quantization_config.weight_block_size is missing, expected two whole numbers from 1 to 65536",
        ),
        (
            "quantization_config",
            json!({ "quant_method": "fp8", "weight_block_size": [128, 0] }),
            "quantization_config.weight_block_size is [128,0], expected two whole numbers from 1 to 65536",
        ),
        (
            "quantization_config",
            json!({ "quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "e5m2" }),
            "quantization_config.scale_fmt is \"e5m2\", expected \"ue8m0\" or \"float\"",
        ),
    ];
    for (field, value, expected) in table {
        let problems = parse(&v3_with(field, value.clone())).expect_err(&format!("{field} = {value}"));
        assert_eq!(problems[0], format!("config.json: {expected}"), "{field} = {value}");
    }
}

#[test]
fn all_problems_are_found_at_once() {
    let mut config = v3();
    config["hidden_size"] = json!(0);
    config["v_head_dim"] = json!("x");
    config["rope_scaling"]["factor"] = json!(-1);
    let problems = parse(&config).unwrap_err();
    let fields: Vec<&str> = problems.iter().filter_map(|p| p.split(' ').nth(1)).collect();
    assert_eq!(fields, ["rope_scaling.factor", "hidden_size", "v_head_dim"]);
}

#[test]
fn another_family_is_one_problem() {
    let problems = parse(&json!({ "model_type": "qwen2", "hidden_size": "x" })).unwrap_err();
    assert_eq!(problems, ["config.json: model_type is \"qwen2\", expected \"deepseek_v2\" or \"deepseek_v3\""]);
}

#[test]
fn a_key_given_twice_and_broken_json_are_errors() {
    for (text, expected) in [
        (r#"{"hidden_size": 1, "hidden_size": 2}"#, "key \"hidden_size\" is given twice"),
        ("[]", "expected a JSON object"),
        ("{", "EOF while parsing"),
        ("", "EOF while parsing"),
    ] {
        let problems = Config::parse(Path::new("config.json"), text).unwrap_err();
        assert!(problems[0].to_string().contains(expected), "{text}: {}", problems[0]);
    }
}

#[test]
fn v3_is_read() {
    let config = parse(&v3()).unwrap();
    assert_eq!(config.model_type, Family::DeepseekV3);
    assert_eq!((config.eos_token_ids.as_slice(), config.bos_token_id), (&[1][..], Some(0)));
    assert_eq!(
        (config.is_moe(0), config.is_moe(1), config.latent_width(), config.logical_groups()),
        (false, true, 40, 4)
    );
    let gate = GateParams {
        scoring: Scoring::Sigmoid,
        groups: 4,
        groups_kept: 2,
        top_k: 4,
        group_score: GroupScore::TopTwoSum,
        mask: f32::NEG_INFINITY,
        normalize: true,
        scale: 2.5,
    };
    assert_eq!(config.gate_params(), gate);
}

#[test]
fn the_gates_of_v2() {
    let read = |name: &str| Config::read(&fixture(name)).unwrap().gate_params();
    let v2 = GateParams {
        scoring: Scoring::Softmax,
        groups: 4,
        groups_kept: 2,
        top_k: 3,
        group_score: GroupScore::Max,
        mask: 0.0,
        normalize: false,
        scale: 16.0,
    };
    assert_eq!(read("v2"), v2);
    let lite = read("v2-lite");
    assert_eq!((lite.groups, lite.groups_kept, lite.group_score, lite.mask), (1, 1, GroupScore::Max, 0.0));
    let mut normalized = read_json(&fixture("v2").join("config.json"));
    normalized["norm_topk_prob"] = json!(true);
    assert_eq!(parse(&normalized).unwrap().gate_params().scale, 1.0, "V2 scales only what it does not normalize");
}

#[test]
fn a_model_without_groups_is_summed_in_eight_blocks() {
    let config = Config::read(&fixture("v2-lite")).unwrap();
    assert_eq!(config.logical_groups(), 8);
}

#[test]
fn rope_is_read_in_all_its_spellings() {
    let yarn = parse(&v3()).unwrap();
    let scaling = v3()["rope_scaling"].clone();
    let mut renamed = scaling.clone();
    renamed["rope_type"] = json!("yarn");
    renamed["type"] = Value::Null;
    assert_eq!(parse(&v3_with("rope_scaling", renamed.clone())).unwrap(), yarn);
    renamed["rope_theta"] = json!(10000.0);
    let mut newer = v3_with("rope_parameters", renamed);
    newer["rope_scaling"] = Value::Null;
    newer["rope_theta"] = Value::Null;
    assert_eq!(parse(&newer).unwrap(), yarn);
    for plain in [v3_with("rope_scaling", Value::Null), v3_with("rope_scaling", json!({ "rope_type": "default" }))] {
        let config = parse(&plain).unwrap();
        assert_eq!(config.rope_scaling, None);
        assert_eq!(config.softmax_scale(), 24f32.powf(-0.5));
    }
    let mut bare = scaling;
    for field in ["beta_fast", "beta_slow", "mscale", "mscale_all_dim"] {
        bare[field] = Value::Null;
    }
    let bare = parse(&v3_with("rope_scaling", bare)).unwrap().rope_scaling.unwrap();
    assert_eq!((bare.beta_fast, bare.beta_slow, bare.mscale, bare.mscale_all_dim), (32.0, 1.0, 1.0, 0.0));
}

#[test]
fn lists_and_nulls() {
    assert_eq!(parse(&v3_with("eos_token_id", json!([1, 7]))).unwrap().eos_token_ids, [1, 7]);
    assert_eq!(parse(&v3_with("eos_token_id", Value::Null)).unwrap().eos_token_ids, [0u32; 0]);
    assert_eq!(parse(&v3_with("q_lora_rank", Value::Null)).unwrap().q_lora_rank, None);
    assert_eq!(parse(&v3_with("n_shared_experts", Value::Null)).unwrap().n_shared_experts, 0);
    let dense = parse(&v3_with("n_routed_experts", Value::Null)).unwrap();
    assert!((0..dense.num_hidden_layers).all(|layer| !dense.is_moe(layer)));
    let ue8m0 = json!({ "quant_method": "fp8", "weight_block_size": [128, 64], "scale_fmt": "ue8m0" });
    let config = parse(&v3_with("quantization_config", ue8m0)).unwrap();
    assert_eq!(config.quantization, Some(Quantization { block: [128, 64], ue8m0: true }));
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u64..70_000).prop_map(Value::from),
        ".{0,80}".prop_map(Value::from),
        proptest::collection::vec(any::<u32>(), 0..4).prop_map(Value::from),
        Just(json!({})),
    ]
}

proptest! {
    #[test]
    fn any_fields_give_a_config_that_computes_or_an_error(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any_value()), 1..6),
    ) {
        let mut config = v3();
        let names: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (at, value) in edits {
            config[at.get(&names)] = value;
        }
        if let Ok(config) = parse(&config) {
            let gate = config.gate_params();
            prop_assert!(gate.groups > 0 && gate.groups_kept <= gate.groups);
            prop_assert!(config.n_routed_experts.is_multiple_of(gate.groups));
            prop_assert!(config.softmax_scale().is_finite());
        }
    }
}
