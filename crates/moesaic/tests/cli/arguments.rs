//! What cannot work is refused with a reason that names it, and with the exit code of its kind.

use std::net::TcpListener;
use std::path::PathBuf;

use crate::process::{finish, moesaic};

fn demo() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/tiny-r1")
}

#[test]
fn errors_name_what_is_wrong() {
    for (line, code, expected) in [
        ("up --attention-workers 0", 2, "--attention-workers is 0"),
        ("up --registry redis://x", 2, "redis://x"),
        ("up --processes --registry embedded", 2, "--registry embedded"),
        ("up --dtype f64", 2, "f64"),
        ("up --no-such-flag", 2, "--no-such-flag"),
        ("up --device gpu", 2, "device `gpu` is none of"),
        ("up --device cuda:99", 2, "--device is cuda:99: "),
        ("up --device cuda:0 --dtype f32", 2, "set dtype to bf16, or device to cpu"),
        ("up --device cuda:0 --dtype bf16-dp", 2, "set dtype to bf16, or device to cpu"),
        ("up --dtype bf16_dp", 2, "bf16-dp"),
        ("up --device cuda:0 --processes", 2, "--device-memory"),
        ("up --model /nonexistent", 1, "/nonexistent"),
        ("up --registry etcd://127.0.0.1:1", 1, "127.0.0.1:1"),
        ("inspect /nonexistent", 1, ""),
        ("quantize /nonexistent --out /nonexistent-copy", 1, "/nonexistent"),
        ("pack /nonexistent", 1, "/nonexistent"),
        ("pack /nonexistent --dtype f64", 2, "f64"),
        ("chat --server http://127.0.0.1:1 hello", 1, "http://127.0.0.1:1"),
        ("chat --server : hello", 2, "--server"),
        ("expert-worker --registry embedded", 2, "model is not set"),
        ("expert-worker --registry embedded --threads 0", 2, "threads is 0"),
        ("expert-worker --registry embedded --device-memory lots", 2, "device_memory is \"lots\""),
        ("attention-worker --registry embedded --chunk 0", 2, "chunk is 0"),
        ("attention-worker --registry embedded --device gpu", 2, "device `gpu` is none of"),
        ("up --transport rdma", 2, "transport `rdma` is none of"),
        ("bench --rank expert --config /nonexistent", 1, "/nonexistent"),
        ("expert-worker --registry embedded --transport rdma", 2, "transport `rdma` is none of"),
        (
            "attention-worker --model /nonexistent --transport nccl",
            2,
            "the worker computes on the processor: set device",
        ),
        ("coordinator --registry embedded", 2, "model"),
        ("coordinator --config /nonexistent.toml", 2, "/nonexistent.toml"),
    ] {
        let (exit, _, errors) = finish(moesaic().args(line.split(' ')));
        assert_eq!(exit, Some(code), "{line}: {errors}");
        assert!(errors.contains(expected), "{line}: {errors:?} does not contain {expected:?}");
        assert!(!errors.contains("panicked"), "{line}: {errors}");
    }
}

#[test]
fn flags_count_more_than_the_environment_and_that_more_than_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let run = |text: &str, environment: Option<&str>, flag: Option<&str>| {
        std::fs::write(file.path(), text).unwrap();
        let mut command = moesaic();
        command.arg("coordinator").arg("--model").arg(demo()).arg("--config").arg(file.path());
        command.envs(environment.map(|value| ("MOESAIC_REGISTRY", value)));
        finish(command.args(flag.iter().flat_map(|value| ["--registry", *value]))).2
    };
    let from_file = "registry = 'file://'";
    assert!(run("nmae = 1", None, None).contains("nmae"));
    assert!(run(from_file, None, None).contains("file://"));
    assert!(run(from_file, Some("environment://"), None).contains("environment://"));
    assert!(run(from_file, Some("environment://"), Some("flag://")).contains("flag://"));
}

#[test]
fn processes_without_an_etcd_say_how_to_get_one() {
    let (exit, _, errors) = finish(moesaic().args(["up", "--processes"]).env_remove("MOESAIC_ETCD").env("PATH", ""));
    assert_eq!(exit, Some(2), "{errors}");
    assert!(errors.contains("apt-get install etcd-server"), "{errors}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (exit, _, errors) = finish(moesaic().args(["up", "--listen", &address]));
    assert_eq!(exit, Some(1), "{errors}");
    assert!(errors.contains(&address) && errors.contains("in use"), "{errors}");
}

#[test]
fn a_quantized_copy_is_a_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("fp8");
    let (exit, said, errors) = finish(moesaic().arg("quantize").arg(demo()).arg("--out").arg(&copy));
    assert_eq!(exit, Some(0), "{errors}");
    assert!(said.contains("tensors quantized"), "{said}");
    let (exit, said, _) = finish(moesaic().arg("inspect").arg(&copy));
    assert_eq!(exit, Some(0));
    assert!(said.contains("FP8 in blocks of 128 x 128") && said.contains("problems     none"), "{said}");
}
