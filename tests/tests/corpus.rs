//! The inputs of `tests/fuzz/corpus` through their targets, and some thousand changed ones: what fuzzing has found once
//! stays mended. `tests/fuzz/run` is the fuzzer itself.
#![allow(clippy::unwrap_used)]

use std::alloc::System;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use moesaic_tests::fuzz::{self, Target, seeds};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

/// Counts, for the targets' bounds. There is one test here, so that nobody else allocates meanwhile.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Changed inputs for each target.
const CHANGED: usize = 200;

/// A target's inputs, by name.
fn inputs(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = fuzz::corpus().join(name);
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}; every target has a corpus", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", folder.display());
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Whether the target keeps its promises; the panic's words have been printed.
fn is_kept(target: Target, input: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| target(input))).is_ok()
}

#[test]
fn every_input_keeps_its_targets_promises() {
    let mut known: Vec<String> =
        fs::read_dir(fuzz::corpus()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    known.retain(|name| fuzz::target(name).is_none());
    assert!(known.is_empty(), "no targets have the corpora {known:?}");

    let mut broken = Vec::new();
    let mut dice = 0x2545_f491_4f6c_dd1d;
    for (name, target) in fuzz::TARGETS {
        let inputs = inputs(name);
        for (path, input) in &inputs {
            if !is_kept(*target, input) {
                broken.push(path.display().to_string());
            }
        }
        for n in 0..CHANGED {
            let (path, input) = &inputs[n % inputs.len()];
            let changed = change(input.clone(), &mut dice);
            if !is_kept(*target, &changed) {
                broken.push(format!("{}, changed to \"{}\"", path.display(), changed.escape_ascii()));
                break;
            }
        }
    }
    assert!(broken.is_empty(), "these break their targets' promises:\n{}", broken.join("\n"));
}

/// A bit or a byte, a part taken out or repeated, or the end cut off.
fn change(mut input: Vec<u8>, dice: &mut u64) -> Vec<u8> {
    let mut draw = |below: usize| {
        *dice ^= *dice << 13;
        *dice ^= *dice >> 7;
        *dice ^= *dice << 17;
        (*dice % below.max(1) as u64) as usize
    };
    let len = input.len();
    let (at, n) = (draw(len), draw(16));
    let end = (at + n).min(len);
    match draw(5) {
        _ if len == 0 => input.push(n as u8),
        0 => input[at] ^= 1 << draw(8),
        1 => input[at] = draw(256) as u8,
        2 => drop(input.drain(at..end)),
        3 => {
            let part = input[at..end].to_vec();
            input.splice(at..at, part);
        }
        _ => input.truncate(at),
    }
    input
}

/// `cargo test -p moesaic-tests --test corpus -- --ignored`, after a change of what is encoded.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    for (target, name, input) in seeds::all() {
        let folder = fuzz::corpus().join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), input).unwrap();
    }
}
