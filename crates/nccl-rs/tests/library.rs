//! The real library, on a machine without a GPU. Needs libnccl.so.2 where the linker finds it, so it runs only when
//! asked: `LD_LIBRARY_PATH=… cargo test -p nccl-rs --test library -- --ignored`.

use std::time::{Duration, Instant};

use nccl_rs::{Code, Communicator, Config, Error, UniqueId, Version, version};

#[test]
#[ignore = "needs libnccl.so.2"]
fn the_version_is_one_that_is_supported() {
    let version = version().expect("the library is there");
    assert!(version >= Version::new(2, 27, 0), "{version}");
    println!("NCCL {version}");
}

#[test]
#[ignore = "needs libnccl.so.2"]
fn identifiers_differ() {
    let (one, other) = (UniqueId::new().expect("there is a network"), UniqueId::new().expect("there is a network"));
    assert_ne!(one, other);
    assert_eq!(UniqueId::from_bytes(*one.as_bytes()), one);
}

/// Twice on one thread: the first failure may not leave anything behind.
#[test]
#[ignore = "needs libnccl.so.2, and no GPU"]
fn without_a_gpu_the_error_says_so() {
    let id = UniqueId::new().expect("there is a network");
    for _ in 0..2 {
        let start = Instant::now();
        let timeout = Duration::from_secs(60);
        let error = Communicator::connect(&id, 0, 2, &Config::default(), timeout).expect_err("there is no GPU");
        let Error::Nccl { function: "ncclCommInitRankConfig", code: Code::UnhandledCudaError, detail } = &error else {
            panic!("{error}");
        };
        assert!(detail.to_lowercase().contains("cuda"), "{error}");
        assert!(start.elapsed() < timeout / 2);
        println!("{error}");
    }
}
