//! Packed experts: the same bits as packing them gives; and no file that does not fit is read.

use std::fs;
use std::path::{Path, PathBuf};

use moesaic_kernels::{DtypeChoice, Numerics, Pool, RowsRef};
use moesaic_model::Checkpoint;
use moesaic_model::packed::{Experts, write};
use safetensors::tensor::Dtype;
use tempfile::TempDir;

use crate::support::{copy, edit_tensors};

fn numerics() -> [Numerics; 3] {
    [DtypeChoice::F32, DtypeChoice::Bf16, DtypeChoice::Int8].map(DtypeChoice::numerics)
}

/// All experts' outputs for the same rows.
fn outputs(checkpoint: &Checkpoint, experts: &Experts<'_>) -> Vec<f32> {
    let c = checkpoint.config();
    let x: Vec<f32> = (0..2 * c.hidden_size).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut all = Vec::new();
    for layer in c.moe_layers() {
        for expert in 0..c.n_routed_experts {
            let mut y = vec![0.0; x.len()];
            let (ffn, bytes) = experts.get(layer, expert).unwrap();
            assert_eq!(bytes, checkpoint.expert(layer, expert).unwrap().bytes());
            ffn.forward(&Pool::new(1), RowsRef::F32(&x), &mut y);
            all.extend(y);
        }
    }
    all
}

#[test]
fn mapped_experts_are_the_experts() {
    for name in ["v3", "v3-fp8", "v2", "v2-lite", "tiny-r1"] {
        let dir = copy(name);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for n in numerics() {
            let packed_now = Experts::open(&checkpoint, n).unwrap();
            assert!(!packed_now.are_packed());
            let expected = outputs(&checkpoint, &packed_now);
            let written = write(&checkpoint, n).unwrap();
            assert_eq!(fs::metadata(&written.path).unwrap().len(), written.bytes);
            let mapped = Experts::open(&checkpoint, n).unwrap();
            assert!(mapped.are_packed());
            let same = outputs(&checkpoint, &mapped).iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}, {n:?}");
        }
        // Beside the checkpoint, and no part of it.
        assert_eq!(Checkpoint::open(dir.path()).unwrap().fingerprint(), checkpoint.fingerprint());
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.iter().all(|path| path.extension().is_none_or(|e| e != "partial")), "{left:?}");
    }
}

fn packed(name: &str) -> (TempDir, PathBuf) {
    let dir = copy(name);
    let path = write(&Checkpoint::open(dir.path()).unwrap(), numerics()[1]).unwrap().path;
    (dir, path)
}

fn open_error(dir: &Path) -> String {
    let checkpoint = Checkpoint::open(dir).unwrap();
    match Experts::open(&checkpoint, numerics()[1]) {
        Err(error) => error.to_string(),
        // A length that fits the file but not the matrix is noticed where the expert is read.
        Ok(experts) => experts.get(checkpoint.config().moe_layers()[0], 0).unwrap_err().to_string(),
    }
}

#[test]
fn a_file_that_does_not_fit_is_refused_by_name() {
    let header = |bytes: &mut Vec<u8>, from: &str, to: &str| {
        let text = String::from_utf8(bytes[..4096].to_vec()).unwrap();
        assert!(text.contains(from), "{text}");
        let text = format!("{:<4096}", text.replace(from, to).trim_end());
        bytes[..4096].copy_from_slice(text.as_bytes());
    };
    type Spoil = Box<dyn Fn(&mut Vec<u8>)>;
    let table: [(&str, Spoil); 10] = [
        ("has 0 bytes and no header", Box::new(|b| b.clear())),
        ("has 100 bytes and no header", Box::new(|b| b.truncate(100))),
        ("header is empty", Box::new(|b| b[..4096].fill(b' '))),
        ("header: ", Box::new(|b| b[..4096].fill(0xff))),
        ("less than its matrices take", Box::new(|b| b.truncate(4100))),
        ("less than its matrices take", Box::new(|b| b.truncate(b.len() - 64))),
        ("less than its matrices take", Box::new(|b| b[4096..4104].fill(0xff))),
        ("expected", Box::new(|b| b.extend([0; 64]))),
        ("version is 9", Box::new(move |b| header(b, "\"version\":", "\"version\":9"))), // whatever it was: a 9 before it
        ("numerics is f32, expected", Box::new(move |b| header(b, numerics()[1].name(), "f32"))),
    ];
    for (expected, spoil) in table {
        let (dir, path) = packed("v3");
        let mut bytes = fs::read(&path).unwrap();
        spoil(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let error = open_error(dir.path());
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        assert!(error.contains(".packed") && error.contains("moesaic pack"), "{error}");
    }
}

/// Some of a matrix's bytes given to the next one: the file's length is right, each matrix's is not.
#[test]
fn lengths_that_only_add_up_are_refused() {
    let (dir, path) = packed("v3");
    let mut bytes = fs::read(&path).unwrap();
    for (at, by) in [(4096, -64), (4104, 64)] {
        let length = i64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        bytes[at..at + 8].copy_from_slice(&(length + by).to_le_bytes());
    }
    fs::write(&path, bytes).unwrap();
    let error = open_error(dir.path());
    assert!(error.contains("packed bytes for a matrix") && error.contains("moesaic pack"), "{error}");
}

#[test]
fn another_checkpoints_file_is_refused() {
    let (dir, _) = packed("v3");
    edit_tensors(dir.path(), |tensors| {
        let middle = tensors[0].bytes.len() / 2;
        tensors[0].bytes[middle] ^= 1;
    });
    let error = open_error(dir.path());
    assert!(error.contains("fingerprint is ") && error.contains("moesaic pack"), "{error}");
}

/// An expert may be stored unlike the others.
#[test]
fn each_expert_is_mapped_as_it_was_packed() {
    let dir = copy("tiny-r1");
    edit_tensors(dir.path(), |tensors| {
        let odd = tensors.iter_mut().find(|t| t.name.contains("mlp.experts.7.gate_proj")).unwrap();
        assert_eq!(odd.dtype, Dtype::BF16);
        odd.bytes = odd.bytes.chunks_exact(2).flat_map(|x| [0, 0, x[0], x[1]]).collect();
        odd.dtype = Dtype::F32;
    });
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let n = numerics()[0];
    let expected = outputs(&checkpoint, &Experts::open(&checkpoint, n).unwrap());
    write(&checkpoint, n).unwrap();
    assert_eq!(outputs(&checkpoint, &Experts::open(&checkpoint, n).unwrap()), expected);
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let dir = copy("tiny-r1");
    let taken = dir.path().join(format!("experts-{}.packed", numerics()[0].name()));
    fs::create_dir(&taken).unwrap();
    let error = write(&Checkpoint::open(dir.path()).unwrap(), numerics()[0]).unwrap_err().to_string();
    assert!(error.contains("cannot be written"), "{error}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.iter().all(|path| path.extension().is_none_or(|e| e != "partial")), "{left:?}");
}
