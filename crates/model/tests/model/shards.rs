//! A checkpoint in many files is the same checkpoint; an index that lies is refused.

use std::fs;
use std::path::Path;

use moesaic_model::{Checkpoint, reference};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::support::{copy, fixture, read_tensors, write_tensors};

const INDEX: &str = "model.safetensors.index.json";

/// The fixture in `files` files, tensors dealt out in turn.
pub fn sharded(name: &str, files: usize) -> TempDir {
    let dir = copy(name);
    let single = dir.path().join("model.safetensors");
    let tensors = read_tensors(&single);
    fs::remove_file(single).unwrap();
    let mut weight_map = Map::new();
    for shard in 0..files {
        let file = format!("model-{:05}-of-{files:05}.safetensors", shard + 1);
        let part: Vec<_> = tensors.iter().skip(shard).step_by(files).collect();
        write_tensors(&dir.path().join(&file), part.iter().copied());
        weight_map.extend(part.iter().map(|t| (t.name.clone(), Value::from(file.clone()))));
    }
    write_index(dir.path(), &json!({ "metadata": {}, "weight_map": weight_map }));
    dir
}

fn write_index(dir: &Path, index: &Value) {
    fs::write(dir.join(INDEX), index.to_string()).unwrap();
}

fn edit_index(dir: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let mut index = crate::support::json(&dir.join(INDEX));
    edit(index["weight_map"].as_object_mut().unwrap());
    write_index(dir, &index);
}

#[test]
fn sharded_is_the_same_model() {
    for name in ["v3", "v3-fp8"] {
        let dir = sharded(name, 3);
        let (one, many) = (Checkpoint::open(&fixture(name)).unwrap(), Checkpoint::open(dir.path()).unwrap());
        assert_eq!(one.fingerprint(), many.fingerprint());
        assert_eq!(one.fingerprint().len(), 32);
        assert_eq!(one.expert(2, 7).unwrap().down.to_f32(), many.expert(2, 7).unwrap().down.to_f32());
        assert_eq!(reference::forward(&one, &[1, 2, 3]).unwrap(), reference::forward(&many, &[1, 2, 3]).unwrap());
    }
}

#[test]
fn fingerprints_differ_by_content_and_by_config() {
    let of = |dir: &Path| Checkpoint::open(dir).unwrap().fingerprint().to_owned();
    let mut prints = vec![of(&fixture("v3")), of(&fixture("v2")), of(&fixture("v2-lite"))];
    let config = copy("v3");
    crate::support::edit_config(config.path(), |c| c["routed_scaling_factor"] = json!(2.0));
    prints.push(of(config.path()));
    let content = copy("v3");
    crate::support::edit_tensors(content.path(), |t| {
        let bytes = &mut crate::support::find(t, "lm_head.weight").bytes;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    });
    prints.push(of(content.path()));
    prints.sort();
    prints.dedup();
    assert_eq!(prints.len(), 5);
}

#[test]
fn an_index_that_lies() {
    const NORM: &str = "model.norm.weight";
    const OTHER: &str = "model-00002-of-00002.safetensors";
    for file in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "..",
        "",
        "./x.safetensors",
        "x.bin",
        "a\\x.safetensors",
    ] {
        let dir = sharded("v3", 2);
        edit_index(dir.path(), |map| map[NORM] = json!(file));
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        let expected =
            format!("{INDEX}: tensor {NORM} is said to be in {file:?}, expected the plain name of a .safetensors file");
        assert!(error.ends_with(&expected), "{error}");
    }
    let dir = sharded("v3", 2);
    edit_index(dir.path(), |map| map[NORM] = json!("model-00003-of-00002.safetensors"));
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model-00003-of-00002.safetensors: ") && error.contains("os error 2"), "{error}");
    let dir = sharded("v3", 2);
    edit_index(dir.path(), |map| map.insert("ghost".into(), json!(OTHER)).map(drop).unwrap_or_default());
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.ends_with(&format!("tensor ghost is not in {OTHER}, where the index has it")), "{error}");
}

#[test]
fn a_tensor_in_two_files() {
    let dir = sharded("v3", 2);
    let (first, second) =
        (dir.path().join("model-00001-of-00002.safetensors"), dir.path().join("model-00002-of-00002.safetensors"));
    let mut tensors = read_tensors(&second);
    let twice = read_tensors(&first).swap_remove(0);
    let name = twice.name.clone();
    tensors.push(twice);
    write_tensors(&second, &tensors);
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    let expected =
        format!("{}: tensor {name} is in {} too, expected it in one file", second.display(), first.display());
    assert_eq!(error, expected);
}

#[test]
fn an_index_with_a_tensor_twice_or_without_a_map() {
    let dir = sharded("v3", 2);
    for (index, expected) in [
        (r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#, "key \"a\" is given twice"),
        (r#"{"metadata":{}}"#, "missing field `weight_map`"),
        (r#"{"weight_map":[]}"#, "expected a JSON object"),
        (r#"{"weight_map":{"a":1}}"#, "a: invalid type: integer `1`, expected a string"),
    ] {
        fs::write(dir.path().join(INDEX), index).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(INDEX) && error.contains(expected), "{error}");
    }
}

#[test]
fn a_folder_without_weights() {
    let dir = copy("v3");
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.ends_with("has no weights, expected model.safetensors or model.safetensors.index.json"), "{error}");
    let nothing = Checkpoint::open(Path::new("/nowhere/at/all")).unwrap_err().to_string();
    assert!(nothing.starts_with("/nowhere/at/all/config.json: "), "{nothing}");
}
