//! libFuzzer over one of `moesaic_tests::fuzz::TARGETS`: the one that `MOESAIC_FUZZ_TARGET` names.
#![no_main]

use std::alloc::System;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use moesaic_tests::fuzz::{self, Target};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

/// Counts, so that a target can hold an allocation against the input's size.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("MOESAIC_FUZZ_TARGET").expect("MOESAIC_FUZZ_TARGET names a target");
    fuzz::target(&name).expect("MOESAIC_FUZZ_TARGET is one of moesaic_tests::fuzz::TARGETS")
});

fuzz_target!(
    init: {
        // libfuzzer-sys ends the process at any panic. One that the product catches is no failure; one that gets out of
        // the target still is.
        drop(std::panic::take_hook());
    },
    |data: &[u8]| {
        TARGET(data);
    }
);
