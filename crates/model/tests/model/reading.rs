//! The same weights in every form that a checkpoint may have them give the same model.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use moesaic_model::{Checkpoint, MlpBlock, QueryBlock, reference};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::{Tensor, copy, edit_config, edit_tensors, find, fixture};

const TOKENS: [u32; 6] = [1, 2, 3, 400, 5, 6];

fn logits(dir: &Path) -> Vec<f32> {
    reference::forward(&Checkpoint::open(dir).unwrap(), &TOKENS).unwrap()
}

fn convert(t: &mut Tensor, dtype: Dtype, value: impl Fn(f32) -> Vec<u8>) {
    if t.dtype == Dtype::BF16 {
        let values = t.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32());
        t.bytes = values.flat_map(value).collect();
        t.dtype = dtype;
    }
}

#[test]
fn f32_weights_are_the_bf16_weights_widened() {
    let dir = copy("v3");
    edit_tensors(dir.path(), |t| {
        t.iter_mut().for_each(|t| convert(t, Dtype::F32, |x| x.to_le_bytes().to_vec()));
    });
    assert_eq!(logits(dir.path()), logits(&fixture("v3")));
}

#[test]
fn f16_weights() {
    let (half, wide) = (copy("v3"), copy("v3"));
    let rounded = f16::from_f32;
    edit_tensors(half.path(), |t| {
        t.iter_mut().for_each(|t| convert(t, Dtype::F16, |x| rounded(x).to_le_bytes().to_vec()));
    });
    edit_tensors(wide.path(), |t| {
        t.iter_mut().for_each(|t| convert(t, Dtype::F32, |x| rounded(x).to_f32().to_le_bytes().to_vec()));
    });
    assert_eq!(logits(half.path()), logits(wide.path()));
}

#[test]
fn no_rope_scaling_is_yarn_that_stretches_by_one() {
    let (none, one) = (copy("v2-lite"), copy("v2-lite"));
    edit_config(none.path(), |c| c["rope_scaling"] = Value::Null);
    edit_config(one.path(), |c| c["rope_scaling"]["factor"] = json!(1));
    assert_eq!(logits(none.path()), logits(one.path()));
    assert_ne!(logits(none.path()), logits(&fixture("v2-lite")));
}

#[test]
fn a_tied_head_is_the_embedding() {
    let (tied, twice) = (copy("v3"), copy("v3"));
    edit_config(tied.path(), |c| c["tie_word_embeddings"] = json!(true));
    edit_tensors(tied.path(), |t| t.retain(|t| t.name != "lm_head.weight"));
    edit_tensors(twice.path(), |t| {
        find(t, "lm_head.weight").bytes = find(t, "model.embed_tokens.weight").bytes.clone();
    });
    assert_eq!(logits(tied.path()), logits(twice.path()));
}

#[test]
fn blocks_have_the_parts_of_their_family() {
    let v3 = Checkpoint::open(&fixture("v3")).unwrap();
    let layer = v3.layer(1).unwrap();
    assert!(matches!(layer.mla.q, QueryBlock::LowRank { .. }));
    assert!(matches!(layer.mlp, MlpBlock::Moe { bias: Some(_), shared: Some(_), .. }));
    assert!(matches!(v3.layer(0).unwrap().mlp, MlpBlock::Dense(_)));
    let lite = Checkpoint::open(&fixture("v2-lite")).unwrap();
    let layer = lite.layer(1).unwrap();
    assert!(matches!(layer.mla.q, QueryBlock::Direct(_)));
    let MlpBlock::Moe { bias: None, shared: Some(shared), .. } = layer.mlp else { panic!("{:?}", layer.mlp) };
    assert_eq!((shared.gate.rows, lite.expert(1, 0).unwrap().gate.rows), (64, 32), "two shared experts in one network");
    assert_eq!(lite.name(), "v2-lite");
}

#[test]
fn a_token_beyond_the_vocabulary() {
    let error = reference::forward(&Checkpoint::open(&fixture("v3")).unwrap(), &[1, 512]).unwrap_err();
    assert_eq!(error.to_string(), "token 512 at position 1: the vocabulary has 512");
}

/// Hub caches store files as links into a folder of blobs.
#[cfg(unix)]
#[test]
fn files_may_be_links() {
    let dir = tempfile::TempDir::new().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::os::unix::fs::symlink(fs::canonicalize(fixture("v3").join(file)).unwrap(), dir.path().join(file)).unwrap();
    }
    assert_eq!(logits(dir.path()), logits(&fixture("v3")));
}

#[test]
fn a_folder_in_the_place_of_a_file() {
    for file in ["config.json", "model.safetensors"] {
        let dir = copy("v3");
        fs::remove_file(dir.path().join(file)).unwrap();
        fs::create_dir(dir.path().join(file)).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with(&format!("{file}: is not a file")), "{error}");
    }
}
