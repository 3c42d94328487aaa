//! Random checkpoints: whole by every reader's word, the same for the same seed, and models that compute and route.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moesaic_kernels::{MatrixData, rms_norm, route};
use moesaic_model::inspect::report;
use moesaic_model::synth::{SHARD_BYTES_MAX, SynthDtype, SynthOptions, SynthReport, synthesize};
use moesaic_model::{Checkpoint, Config, MlpBlock, reference};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{fixture, json as read_json, read_tensors};

const BF16: SynthOptions = SynthOptions { seed: 7, dtype: SynthDtype::Bf16, shard_bytes_max: SHARD_BYTES_MAX };
const FP8: SynthOptions = SynthOptions { dtype: SynthDtype::Fp8, ..BF16 };
/// Small enough for several files of any fixture's sizes.
const SHARDED: SynthOptions = SynthOptions { shard_bytes_max: 300_000, ..BF16 };
/// Every family and way to query and route, widths beyond an FP8 block, and an MTP layer.
const CONFIGS: [&str; 5] = ["v3", "v3-fp8", "v2", "v2-lite", "tiny-r1"];

struct Made {
    dir: TempDir,
    report: SynthReport,
}

impl Made {
    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn open(&self) -> Checkpoint {
        Checkpoint::open(&self.out()).unwrap()
    }

    /// By name; a file each.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let name_of = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let entries = fs::read_dir(self.out()).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| (name_of(&path), fs::read(&path).unwrap())).collect()
    }

    fn tensors(&self) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
        let names = self.files().into_keys().filter(|name| name.ends_with(".safetensors"));
        let tensors = names.flat_map(|name| read_tensors(&self.out().join(name)));
        tensors.map(|t| (t.name, (t.dtype, t.shape, t.bytes))).collect()
    }
}

/// From a fixture's config.json.
fn made(name: &str, options: SynthOptions) -> Made {
    made_with(name, options, |_| {})
}

fn made_with(name: &str, options: SynthOptions, edit: impl FnOnce(&mut Value)) -> Made {
    let dir = TempDir::new().unwrap();
    let report = synthesize(&config_file(dir.path(), name, edit), &options, &dir.path().join("out")).unwrap();
    Made { dir, report }
}

fn config_file(dir: &Path, name: &str, edit: impl FnOnce(&mut Value)) -> PathBuf {
    let mut config = read_json(&fixture(name).join("config.json"));
    edit(&mut config);
    let file = dir.join("given.json");
    fs::write(&file, config.to_string()).unwrap();
    file
}

#[test]
fn every_family_in_both_dtypes_and_in_one_file_or_many() {
    for name in CONFIGS {
        for options in [BF16, FP8, SHARDED, SynthOptions { shard_bytes_max: 200_000, ..FP8 }] {
            let made = made(name, options);
            let report = report(&made.out());
            let none: &[String] = &[];
            assert_eq!((report.problems.as_slice(), report.notes.as_slice()), (none, none), "{name} {options:?}");
            let bytes = report.bytes.attention + report.bytes.experts + report.bytes.mtp;
            assert_eq!((made.report.tensors, made.report.bytes), (report.tensors, bytes), "{name} {options:?}");
            assert_eq!(made.report.files, report.files, "{name} {options:?}");
            assert_eq!(report.files == 1, options.shard_bytes_max == SHARD_BYTES_MAX, "{name} {options:?}");
            assert_eq!(report.bytes.mtp > 0, name == "tiny-r1", "{name} {options:?}");
            assert!(made.report.seconds > 0.0);
            made.open();
        }
    }
}

#[test]
fn the_written_config_is_the_given_one() {
    for name in CONFIGS {
        let given = Config::read(&fixture(name)).unwrap();
        let quantization = Config::read(&fixture("v3-fp8")).unwrap().quantization;
        let bf16 = made(name, BF16).open().config().clone();
        assert_eq!(bf16, Config { quantization: None, ..given.clone() }, "{name}");
        let fp8 = made(name, FP8).open().config().clone();
        assert_eq!(fp8, Config { quantization, ..given }, "{name}");
    }
    let json = read_json(&made("v3", FP8).out().join("config.json"));
    let public = read_json(&fixture("v3-fp8").join("config.json"));
    assert_eq!(json["quantization_config"], public["quantization_config"]);
    assert_eq!(json["torch_dtype"], "bfloat16", "fields that nobody here reads stay");
}

/// As the public files have them.
#[test]
fn dtypes() {
    for (options, linear) in [(BF16, Dtype::BF16), (FP8, Dtype::F8_E4M3)] {
        let tensors = made("tiny-r1", options).tensors();
        for (name, expected) in [
            ("model.embed_tokens.weight", Dtype::BF16),
            ("model.layers.1.input_layernorm.weight", Dtype::BF16),
            ("model.layers.1.mlp.gate.weight", Dtype::BF16),
            ("model.layers.1.mlp.gate.e_score_correction_bias", Dtype::F32),
            ("model.layers.1.self_attn.kv_b_proj.weight", linear),
            ("model.layers.0.mlp.down_proj.weight", linear),
            ("model.layers.4.mlp.experts.31.up_proj.weight", linear),
            ("model.layers.4.mlp.shared_experts.up_proj.weight", linear),
            ("model.layers.5.eh_proj.weight", Dtype::BF16),
            ("model.layers.5.mlp.experts.0.up_proj.weight", linear),
        ] {
            assert_eq!(tensors[name].0, expected, "{name} {options:?}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let on_threads = |threads: usize, options: SynthOptions| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| made("v3-fp8", options))
    };
    for options in [BF16, FP8, SHARDED] {
        let one = on_threads(1, options);
        assert!(one.files() == on_threads(5, options).files(), "{options:?}");
        let other = made("v3-fp8", SynthOptions { seed: 8, ..options }).tensors();
        for (name, tensor) in one.tensors() {
            assert!(tensor.2 != other[&name].2, "{name} {options:?}");
        }
    }
}

#[test]
fn the_same_tensors_in_one_file_or_many() {
    let (one, many) = (made("v3", BF16), made("v3", SHARDED));
    assert_eq!((one.report.files, many.report.files), (1, 6));
    assert!(one.tensors() == many.tensors());
    assert_eq!(one.open().fingerprint(), many.open().fingerprint());
    let files = many.files();
    let data = |bytes: &[u8]| bytes.len() - 8 - u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for n in 1..=6 {
        assert!(data(&files[&format!("model-{n:05}-of-00006.safetensors")]) <= 300_000, "file {n}");
    }
    let index = read_json(&many.out().join("model.safetensors.index.json"));
    assert_eq!(index["metadata"]["total_size"], many.report.bytes);
}

/// A later version of the program makes the same checkpoint, so that measurements of months can be compared.
#[test]
fn the_bytes_of_a_seed_are_fixed() {
    let digest = |options| {
        let mut hasher = blake3::Hasher::new();
        for (name, (_, _, bytes)) in made("v3-fp8", options).tensors() {
            hasher.update(name.as_bytes()).update(&bytes);
        }
        hasher.finalize().to_hex()[..16].to_owned()
    };
    assert_eq!([digest(BF16), digest(FP8)], ["d9c04f737c288cc5", "8dfc7ec95599930a"]);
}

#[test]
fn an_mtp_layers_embedding_and_head_are_the_main_models() {
    let tensors = made("tiny-r1", BF16).tensors();
    for (copy, original) in [
        ("model.layers.5.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.5.shared_head.head.weight", "lm_head.weight"),
    ] {
        assert!(tensors[copy] == tensors[original], "{copy}");
    }
    assert!(tensors["lm_head.weight"].2 != tensors["model.embed_tokens.weight"].2);
}

fn mean_and_std(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    (mean, (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt())
}

/// Of matrices with thousands of values, so that 3 % are many times the error of the estimate. The scales of a few blocks
/// may all lie on one side.
#[test]
fn weights_have_mean_0_and_std_by_their_columns() {
    for (options, tolerance) in [(BF16, 0.03), (FP8, 0.1)] {
        let made = made("v3-fp8", options).open();
        let layer = made.layer(1).unwrap();
        let expert = made.expert(2, 3).unwrap();
        let hidden = 256f64.powf(-0.5);
        for (what, matrix, expected) in [
            ("embedding", made.embedding().unwrap(), 1.0),
            ("head", made.head().unwrap(), hidden),
            ("kv_a", layer.mla.kv_a, hidden),
            ("o", layer.mla.o, 64f64.powf(-0.5)),
            ("up", expert.up, hidden),
            ("down", expert.down, 160f64.powf(-0.5)),
        ] {
            let (mean, std) = mean_and_std(&matrix.to_f32());
            assert!((std / expected - 1.0).abs() < tolerance, "{what} {options:?}: std {std}, expected {expected}");
            assert!(mean.abs() < 0.03 * expected, "{what} {options:?}: mean {mean}");
        }
    }
}

#[test]
fn codes_reach_as_far_as_e4m3_and_scales_differ_by_block() {
    let made = made("v3-fp8", FP8).open();
    let MatrixData::Fp8 { q, scales, block } = made.expert(1, 0).unwrap().up.data else { panic!("not FP8") };
    assert_eq!((block, scales.len()), ([128, 128], 4));
    assert!(q.iter().all(|code| code & 0x7f != 0x7f), "a NaN");
    let distinct = q.iter().collect::<std::collections::BTreeSet<_>>().len();
    assert!(distinct > 80, "{distinct} of 254 codes");
    let mean = 2.44 / 16.0 / 448.0;
    assert!(scales.iter().all(|scale| (scale / mean - 1.0).abs() < 0.11), "{scales:?} around {mean}");
    assert!(scales.windows(2).all(|pair| pair[0] != pair[1]), "{scales:?}");
}

#[test]
fn vectors_are_near_1_and_biases_near_0() {
    let made = made("v3", BF16).open();
    let near = |values: &[f32], center: f32, reach: f32| {
        let farthest = values.iter().map(|x| (x - center).abs()).fold(0.0, f32::max);
        assert!(farthest > reach / 4.0 && farthest <= reach * 1.05, "{farthest} from {center}, expected {reach}");
    };
    near(&made.final_norm().unwrap(), 1.0, 0.1);
    let layer = made.layer(2).unwrap();
    near(&layer.input_norm, 1.0, 0.1);
    near(&layer.mla.kv_a_norm, 1.0, 0.1);
    let MlpBlock::Moe { bias: Some(bias), .. } = layer.mlp else { panic!("no bias") };
    near(&bias, 0.0, 0.01);
}

#[test]
fn logits_are_finite_and_spread() {
    let tied = |c: &mut Value| c["tie_word_embeddings"] = json!(true);
    let models = CONFIGS.iter().flat_map(|name| [made(name, BF16), made(name, FP8)]);
    for made in models.chain([made_with("v3", BF16, tied)]) {
        let checkpoint = made.open();
        let vocab = checkpoint.config().vocab_size;
        let tokens: Vec<u32> = (0..24).map(|n| n * 37 % vocab as u32).collect();
        let logits = reference::forward(&checkpoint, &tokens).unwrap();
        let mut best = std::collections::BTreeSet::new();
        for logits in logits.chunks_exact(vocab) {
            assert!(logits.iter().all(|x| x.is_finite()));
            let (mean, std) = mean_and_std(logits);
            assert!(
                mean.abs() < 0.3 && (0.7..1.4).contains(&std),
                "mean {mean}, std {std} of {:?}",
                checkpoint.config()
            );
            best.insert(crate::parity::argmax(logits));
        }
        assert!(best.len() > 8, "{} words after 24: the tokens make no difference", best.len());
    }
}

/// The gates' choices for every word of the vocabulary. Evenly spread, an expert would have top_k / experts of them.
#[test]
fn experts_are_chosen_evenly() {
    for (name, options) in [("v3", BF16), ("v3-fp8", FP8), ("v2", BF16), ("v2-lite", FP8), ("tiny-r1", FP8)] {
        let made = made(name, options).open();
        let c = made.config();
        let words = made.embedding().unwrap().to_f32();
        for layer in c.moe_layers() {
            let block = made.layer(layer).unwrap();
            let MlpBlock::Moe { gate, bias, .. } = block.mlp else { panic!("layer {layer} has no gate") };
            let mut chosen = vec![0usize; c.n_routed_experts];
            for word in words.chunks_exact(c.hidden_size) {
                for expert in experts_of(c, word, &block.post_norm, &gate, bias.as_deref()) {
                    chosen[expert] += 1;
                }
            }
            let even = c.num_experts_per_tok as f64 / c.n_routed_experts as f64;
            let share = |n: &usize| *n as f64 / c.vocab_size as f64 / even;
            let (least, most) = (share(chosen.iter().min().unwrap()), share(chosen.iter().max().unwrap()));
            assert!(least > 0.3 && most < 2.5, "{name} layer {layer}: {least} to {most} of an even share, {chosen:?}");
        }
    }
}

fn experts_of(c: &Config, word: &[f32], norm: &[f32], gate: &[f32], bias: Option<&[f32]>) -> Vec<usize> {
    let mut x = vec![0.0; word.len()];
    rms_norm(word, norm, c.rms_norm_eps, &mut x);
    let dot = |w: &[f32]| w.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>();
    let logits: Vec<f32> = gate.chunks_exact(x.len()).map(dot).collect();
    let mut choices = Vec::new();
    route(&logits, bias, &c.gate_params(), &mut choices);
    choices.iter().map(|choice| usize::from(choice.expert)).collect()
}

/// The coordinator's tests read such files; here is what they must say.
#[test]
fn a_tokenizer_of_words() {
    let made = made("v3", BF16);
    let read = |name: &str| read_json(&made.out().join(name));
    assert_eq!(read("tokenizer.json"), read_json(&fixture("v3").join("tokenizer.json")));
    assert_eq!(read("tokenizer_config.json"), read_json(&fixture("v3").join("tokenizer_config.json")));
    let no_ids = made_with("v3", BF16, |c| {
        c["bos_token_id"] = json!(null);
        c["eos_token_id"] = json!([5, 6]);
    });
    let config = read_json(&no_ids.out().join("tokenizer_config.json"));
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&json!(null), &json!("w5")));
}

#[test]
fn a_vocabulary_of_one_word() {
    let made = made_with("v3", BF16, |c| {
        c["vocab_size"] = json!(1);
        c["eos_token_id"] = json!(null);
    });
    assert_eq!(read_json(&made.out().join("tokenizer.json"))["model"]["vocab"], json!({"w0": 0}));
    assert_eq!(report(&made.out()).problems, Vec::<String>::new());
}

/// The error of a run that must leave `dir` as it was.
fn refused(dir: &Path, config_file: &Path, options: SynthOptions, out: &Path) -> String {
    let list = || {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = list();
    let error = synthesize(config_file, &options, out).unwrap_err().to_string();
    assert_eq!(list(), before, "a failure leaves nothing");
    error
}

#[test]
fn a_wrong_config_is_refused_by_name() {
    for (field, value, expected) in [
        ("hidden_size", json!(0), "given.json: hidden_size is 0, expected a whole number from 1 to 131072"),
        ("model_type", json!("qwen2"), "model_type is \"qwen2\", expected \"deepseek_v2\" or \"deepseek_v3\""),
        ("n_group", json!(5), "n_group is 5, expected a divisor of n_routed_experts, 32"),
        ("quantization_config", json!({"quant_method": "awq"}), "quant_method is \"awq\", expected \"fp8\""),
        (
            "num_hidden_layers",
            json!(256),
            "num_hidden_layers x n_routed_experts is 256 x 4096, expected a model of at most 262144 tensors",
        ),
    ] {
        let dir = TempDir::new().unwrap();
        let file = config_file(dir.path(), "v3", |c| {
            if field == "num_hidden_layers" {
                c["n_routed_experts"] = json!(4096);
            }
            c[field] = value;
        });
        let error = refused(dir.path(), &file, BF16, &dir.path().join("out"));
        assert!(error.contains(expected), "{error}");
    }
    let dir = TempDir::new().unwrap();
    let missing = refused(dir.path(), &dir.path().join("no.json"), BF16, &dir.path().join("out"));
    assert!(missing.contains("no.json: No such file or directory"), "{missing}");
}

#[test]
fn more_files_than_anyone_opens_are_refused() {
    let dir = TempDir::new().unwrap();
    let file = config_file(dir.path(), "v3", |c| c["n_routed_experts"] = json!(512));
    let options = SynthOptions { shard_bytes_max: 1, ..BF16 };
    let error = refused(dir.path(), &file, options, &dir.path().join("out"));
    assert!(
        error.contains("shard_bytes_max is 1, which makes 4665 files, expected at most 4096 files, so "),
        "{error}"
    );
    let advice = error.split(' ').rev().nth(2).unwrap().parse().unwrap();
    let taken = SynthOptions { shard_bytes_max: advice, ..BF16 };
    assert!(synthesize(&file, &taken, &dir.path().join("out")).unwrap().files > 2000);
}

#[test]
fn a_folder_that_is_not_empty_is_refused() {
    let dir = TempDir::new().unwrap();
    let file = config_file(dir.path(), "v3", |_| {});
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let error = refused(dir.path(), &file, BF16, &out);
    assert!(error.ends_with("out: exists, expected the name of a new folder, or an empty one"), "{error}");
    assert_eq!(fs::read(out.join("notes.txt")).unwrap(), b"mine");
    let is_file = refused(dir.path(), &file, BF16, &file);
    assert!(is_file.ends_with("given.json: exists, expected the name of a new folder, or an empty one"), "{is_file}");
    let below_a_file = refused(dir.path(), &file, BF16, &file.join("out"));
    assert!(below_a_file.contains("given.json: File exists"), "{below_a_file}");
    let nameless = refused(dir.path(), &file, BF16, Path::new("/"));
    assert!(nameless.starts_with("/: exists"), "{nameless}");
    fs::create_dir(dir.path().join("new.partial")).unwrap();
    let stopped = refused(dir.path(), &file, BF16, &dir.path().join("new"));
    assert!(stopped.ends_with("new.partial: exists: another run fills it, or was stopped; remove it"), "{stopped}");
}

#[test]
fn a_new_folder_deep_down_and_an_empty_one_are_filled() {
    let dir = TempDir::new().unwrap();
    let file = config_file(dir.path(), "v3", |_| {});
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    // With a slash at its end, as shells complete it.
    for out in [dir.path().join("a/b/c"), dir.path().join("empty/")] {
        synthesize(&file, &BF16, &out).unwrap();
        Checkpoint::open(&out).unwrap();
        let around = fs::read_dir(out.parent().unwrap()).unwrap();
        assert!(around.map(|e| e.unwrap().file_name()).all(|name| !name.to_string_lossy().contains("partial")));
    }
}
