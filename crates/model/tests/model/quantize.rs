//! FP8 copies: within a bound of their source, in the public layout, and read back by the same code.

use std::fs;
use std::path::Path;

use moesaic_kernels::MatrixData;
use moesaic_model::quantize::{Options, to_fp8};
use moesaic_model::{Checkpoint, reference};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::parity::{argmax, logprob};
use crate::shards::sharded;
use crate::support::{copy, edit_config, edit_tensors, find, fixture, json as read_json, read_tensors};

fn quantized(src: &Path, options: Options) -> TempDir {
    let dir = TempDir::new().unwrap();
    to_fp8(src, &dir.path().join("fp8"), options).unwrap();
    dir
}

/// e4m3 has 3 bits after the leading one, and steps of 2^-9 near zero; a ue8m0 scale is up to twice as large.
fn check_block_errors(source: &Checkpoint, copy: &Checkpoint, ue8m0: bool) {
    let c = source.config();
    let moe = c.moe_layers().into_iter();
    for layer in moe {
        for expert in [0, c.n_routed_experts - 1] {
            let (a, b) = (source.expert(layer, expert).unwrap().down, copy.expert(layer, expert).unwrap().down);
            let MatrixData::Fp8 { scales, block, .. } = &b.data else { panic!("{:?}", b.data) };
            assert_eq!(*block, [128, 128]);
            let (across, (x, y)) = (b.cols.div_ceil(128), (a.to_f32(), b.to_f32()));
            for (i, (x, y)) in x.iter().zip(&y).enumerate() {
                let scale = scales[i / b.cols / 128 * across + i % b.cols / 128];
                let bound = (x.abs() / 16.0).max(scale / 1024.0) * 1.0001;
                assert!((x - y).abs() <= bound, "{x} became {y} with scale {scale}");
                assert!(x.abs() <= 448.0001 * scale, "{x} is beyond scale {scale}");
            }
            if ue8m0 {
                assert!(scales.iter().all(|s| s.to_bits().trailing_zeros() >= 23), "{scales:?}");
            }
        }
    }
}

#[test]
fn errors_are_bounded_block_by_block() {
    for (name, ue8m0) in [("v3", false), ("v2-lite", true), ("tiny-r1", false), ("tiny-r1", true)] {
        let dir = quantized(&fixture(name), Options { ue8m0 });
        let copy = Checkpoint::open(&dir.path().join("fp8")).unwrap();
        assert_eq!(copy.config().quantization.unwrap().ue8m0, ue8m0);
        check_block_errors(&Checkpoint::open(&fixture(name)).unwrap(), &copy, ue8m0);
    }
}

#[test]
fn only_linears_change() {
    let dir = quantized(&fixture("tiny-r1"), Options::default());
    let before = read_tensors(&fixture("tiny-r1").join("model.safetensors"));
    let mut after = read_tensors(&dir.path().join("fp8/model.safetensors"));
    let mut scales = 0;
    for t in &before {
        let kept = ["norm", "embed_tokens", "head", "gate.", "eh_proj"].iter().any(|part| t.name.contains(part));
        let new = find(&mut after, &t.name);
        if kept {
            assert_eq!(new, t);
        } else {
            assert_eq!((new.dtype, &new.shape), (Dtype::F8_E4M3, &t.shape), "{}", t.name);
            let scale = find(&mut after, &format!("{}_scale_inv", t.name));
            assert_eq!(scale.shape, [t.shape[0].div_ceil(128), t.shape[1].div_ceil(128)]);
            scales += 1;
        }
    }
    assert_eq!(after.len(), before.len() + scales);
}

#[test]
fn a_second_run_writes_the_same_bytes() {
    let (a, b) = (quantized(&fixture("v3"), Options::default()), quantized(&fixture("v3"), Options::default()));
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert_eq!(
            fs::read(a.path().join("fp8").join(file)).unwrap(),
            fs::read(b.path().join("fp8").join(file)).unwrap()
        );
    }
}

#[test]
fn sharded_stays_sharded() {
    let dir = quantized(sharded("v3", 3).path(), Options::default());
    let whole = quantized(&fixture("v3"), Options::default());
    let open = |dir: &TempDir| Checkpoint::open(&dir.path().join("fp8")).unwrap();
    assert!(dir.path().join("fp8/model-00003-of-00003.safetensors").is_file());
    assert_eq!(open(&dir).fingerprint(), open(&whole).fingerprint());
}

/// The demo model's FP8 copy chooses the very tokens of the reference, and is about as sure of them as its source.
#[test]
fn tiny_r1_fp8_thinks_as_tiny_r1() {
    const USER: u32 = 3;
    const ASSISTANT: u32 = 4;
    const FIRST_BYTE: u32 = 16;
    let (source, copy) =
        (Checkpoint::open(&fixture("tiny-r1")).unwrap(), Checkpoint::open(&fixture("tiny-r1-fp8")).unwrap());
    check_block_errors(&source, &copy, false);
    let vocab = source.config().vocab_size;
    let problems = fs::read_to_string(fixture("tiny-r1").join("problems.jsonl")).unwrap();
    let (mut off, mut n) = (0.0, 0);
    for problem in problems.lines().take(20) {
        let problem: Value = serde_json::from_str(problem).unwrap();
        let question = problem["question"].as_str().unwrap().bytes().map(|b| FIRST_BYTE + u32::from(b));
        let prompt: Vec<u32> = [0, USER].into_iter().chain(question).chain([ASSISTANT]).collect();
        let answer = problem["reference_tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
        let tokens: Vec<u32> = prompt.iter().copied().chain(answer).collect();
        let (a, b) = (reference::forward(&source, &tokens).unwrap(), reference::forward(&copy, &tokens).unwrap());
        for t in prompt.len() - 1..tokens.len() - 1 {
            let (a, b, next) = (&a[t * vocab..][..vocab], &b[t * vocab..][..vocab], tokens[t + 1]);
            assert_eq!((argmax(a), argmax(b)), (next, next), "{problem}, position {t}");
            off += (logprob(a, next) - logprob(b, next)).abs();
            n += 1;
        }
    }
    assert!(n > 1000 && off / f64::from(n) < 0.01, "log-probabilities are off by {off} in all of {n} tokens");
}

#[test]
fn the_shipped_copy_is_what_the_tool_makes() {
    let dir = quantized(&fixture("tiny-r1"), Options::default());
    let (made, shipped) = (dir.path().join("fp8"), fixture("tiny-r1-fp8"));
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(fs::read(made.join(file)).unwrap() == fs::read(shipped.join(file)).unwrap(), "{file}");
    }
    assert_eq!(read_json(&made.join("config.json")), read_json(&shipped.join("config.json")));
}

/// V3.1's scales, once as F32 powers of two and once in their own dtype.
#[test]
fn ue8m0_scales_are_read_in_both_dtypes() {
    let dir = quantized(&fixture("v3"), Options { ue8m0: true });
    let folder = dir.path().join("fp8");
    let tokens = [1, 2, 3, 4];
    let logits = |folder: &Path| reference::forward(&Checkpoint::open(folder).unwrap(), &tokens).unwrap();
    let as_f32 = logits(&folder);
    edit_tensors(&folder, |tensors| {
        for t in tensors.iter_mut().filter(|t| t.name.ends_with("_scale_inv")) {
            let exponent = |b: &[u8]| (u32::from_le_bytes(b.try_into().unwrap()) >> 23) as u8;
            t.bytes = t.bytes.chunks_exact(4).map(exponent).collect();
            t.dtype = Dtype::F8_E8M0;
        }
    });
    assert_eq!(logits(&folder), as_f32);
    edit_tensors(&folder, |t| find(t, "model.layers.0.mlp.up_proj.weight_scale_inv").bytes[0] = 255);
    let error = Checkpoint::open(&folder).unwrap().layer(0).unwrap_err().to_string();
    assert!(error.ends_with("weight_scale_inv has scale NaN in block 0, expected a finite number from 0"), "{error}");
}

#[test]
fn a_ue8m0_scale_that_is_no_power_of_two() {
    let dir = copy("v3-fp8");
    edit_config(dir.path(), |c| c["quantization_config"]["scale_fmt"] = json!("ue8m0"));
    let error = Checkpoint::open(dir.path()).unwrap().layer(0).unwrap_err().to_string();
    assert!(error.ends_with("in block 0, expected a power of two, because scale_fmt is ue8m0"), "{error}");
}

#[test]
fn what_cannot_be_quantized() {
    let out = TempDir::new().unwrap();
    let dst = out.path().join("fp8");
    let error_of = |src: &Path| to_fp8(src, &dst, Options::default()).unwrap_err().to_string();
    let again = error_of(&fixture("v3-fp8"));
    assert!(again.ends_with("quantization_config is given, expected a model that is not quantized"), "{again}");
    let nan = copy("v3");
    const NAME: &str = "model.layers.2.mlp.experts.9.up_proj.weight";
    edit_tensors(nan.path(), |t| find(t, NAME).bytes[..2].copy_from_slice(&[0xc0, 0x7f]));
    let error = error_of(nan.path());
    assert!(error.contains(&format!("tensor {NAME} has weights that are not finite")), "{error}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "a failure leaves nothing");
    fs::create_dir(&dst).unwrap();
    fs::write(dst.join("notes.txt"), "mine").unwrap();
    let exists = error_of(&fixture("v3"));
    assert!(exists.ends_with("exists, expected the name of a new folder, or an empty one"), "{exists}");
    assert_eq!(fs::read_dir(&dst).unwrap().count(), 1, "what was there is untouched");
}

#[test]
fn an_empty_folder_is_filled() {
    let out = TempDir::new().unwrap();
    let dst = out.path().join("fp8");
    fs::create_dir(&dst).unwrap();
    to_fp8(&fixture("v3"), &dst, Options::default()).unwrap();
    assert!(Checkpoint::open(&dst).unwrap().config().quantization.is_some());
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "nothing is left beside it");
}
