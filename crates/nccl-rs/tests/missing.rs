//! No library: each entry answers the error that says what to do, and nothing panics.

use std::process::Command;
use std::time::Duration;

use nccl_rs::{Channel, Communicator, Config, Error, UniqueId, available, version};

/// What `ask` says in a process of its own, where the library is searched for so.
fn ask_with(library: Option<&str>) -> String {
    let mut ask = Command::new(std::env::current_exe().expect("this test is a program"));
    ask.args(["--ignored", "--exact", "ask", "--nocapture"]).env_remove("LD_LIBRARY_PATH").env_remove("NCCL_LIBRARY");
    let output = ask.envs(library.map(|path| ("NCCL_LIBRARY", path))).output().expect("this test runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
#[ignore = "run by the other tests"]
fn ask() {
    let error = version().expect_err("there is no library");
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert_eq!(UniqueId::new(), Err(error.clone()));
    let id = UniqueId::from_bytes([0; UniqueId::BYTES]);
    let connected = Communicator::connect(&id, 0, 1, &Config::default(), Duration::from_secs(1));
    assert_eq!(connected.expect_err("there is no library"), error);
    // Without a driver, that is what is said first.
    let unavailable = available(0).expect_err("there is no library");
    assert!(unavailable == error || matches!(unavailable, Error::Gpu { .. }), "{unavailable}");
    let connected = Channel::connect(0, &id, 0, 1, &Config::default(), Duration::from_secs(1));
    assert_eq!(connected.expect_err("there is no library"), unavailable);
    println!("{unavailable}");
    println!("{error}");
}

#[test]
fn a_path_that_leads_nowhere_is_named() {
    let text = ask_with(Some("/nowhere/libnccl.so.2"));
    assert!(text.contains("NCCL is not found (tried /nowhere/libnccl.so.2: cannot open"), "{text}");
    assert!(text.contains("install NVIDIA's libnccl2 package"), "{text}");
}

#[test]
#[ignore = "needs a machine where NCCL is not installed"]
fn both_names_are_tried() {
    let text = ask_with(None);
    assert!(text.contains("(tried libnccl.so.2: ") && text.contains("; libnccl.so: "), "{text}");
}
