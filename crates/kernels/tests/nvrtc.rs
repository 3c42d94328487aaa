//! Every kernel for every architecture, compiled by the real compiler: no GPU is needed, NVRTC is. `tests/run cuda` installs
//! it; without it these tests are not run.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Mutex;

use moesaic_kernels::cuda::{ARCHITECTURES, compile, kernels};

/// Of a multiprocessor: threads and blocks share them.
const REGISTERS: u32 = 65_536;

/// What the compiler says of a kernel.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    registers: u32,
    stack: u32,
    spills: u32,
}

/// From lines as "Function properties for NAME", "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" and "Used 96
/// registers".
fn usages(log: &str) -> BTreeMap<String, Usage> {
    let number_before = |line: &str, what: &str| -> u32 {
        let before = line.split(what).next().unwrap();
        before.rsplit(|c: char| !c.is_ascii_digit()).find(|s| !s.is_empty()).unwrap().parse().unwrap()
    };
    let (mut usages, mut name) = (BTreeMap::<String, Usage>::new(), String::new());
    for line in log.lines() {
        if let Some((_, found)) = line.split_once("Function properties for ") {
            name = found.trim().to_owned();
        }
        if line.contains("Compiling entry function") {
            name = line.split('\'').nth(1).unwrap().to_owned();
        }
        let usage = usages.entry(name.clone()).or_default();
        if line.contains("spill stores") {
            usage.stack = number_before(line, " bytes stack frame");
            usage.spills = number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        }
        if line.contains("Used ") && line.contains(" registers") {
            usage.registers = number_before(line, " registers");
        }
    }
    usages
}

#[test]
#[ignore = "needs NVRTC: tests/run cuda"]
fn every_kernel_compiles_for_every_architecture_within_its_registers() {
    let all = ARCHITECTURES
        .iter()
        .flat_map(|(architecture, _)| kernels().map(|(source, list)| (*architecture, source, list)));
    let next = Mutex::new(all);
    let work = || {
        let take = || next.lock().unwrap().next();
        while let Some((architecture, source, kernels)) = take() {
            let compiled = compile(source, architecture, None).unwrap();
            assert!(compiled.image.starts_with(b"\x7fELF"), "{source:?} for {architecture} is no CUBIN");
            let usages = usages(&compiled.log);
            for kernel in kernels {
                let Some(Usage { registers, stack, spills }) = usages.get(kernel.name).copied() else {
                    panic!("{} is not in {source:?} for {architecture}: {}", kernel.name, compiled.log);
                };
                println!("{architecture:7} {:22} {registers:3} registers, {stack} bytes of stack", kernel.name);
                // Registers are given out to warps 8 a thread at a time.
                let budget = (REGISTERS / (kernel.threads * kernel.blocks_each) / 8 * 8).min(255);
                assert!(
                    (1..=budget).contains(&registers),
                    "{} for {architecture}: {registers} of {budget}",
                    kernel.name
                );
                assert_eq!((stack, spills), (0, 0), "{} for {architecture} keeps values in memory", kernel.name);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
}

#[test]
#[ignore = "needs NVRTC: tests/run cuda"]
fn kernels_are_kept_and_found_again() {
    let cache = tempfile::tempdir().unwrap();
    let (source, _) = kernels()[3].clone();
    let first = compile(source, "sm_90a", Some(cache.path())).unwrap();
    let files: Vec<_> = std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let name = files[0].to_str().unwrap();
    assert!(name.contains("-sm_90a-nvrtc") && name.ends_with(".cubin"), "{name}");
    let again = compile(source, "sm_90a", Some(cache.path())).unwrap();
    assert_eq!((again.image, again.log.as_str()), (first.image, ""), "it was compiled again");
    compile(source, "sm_80", Some(cache.path())).unwrap();
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 2);
}
