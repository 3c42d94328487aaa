//! The house's own rules, read from its files: arrows run downwards only, unsafe code stays in its rooms, files stay
//! readable, and ARCHITECTURE.md's map is the map.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every Rust file of the project, as (path from the root, text).
fn rust_files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["proto", "coordinator", "attention-worker", "expert-worker", "crates", "tests"].map(|d| root().join(d)).into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    files
}

/// ARCHITECTURE.md's table "| room | uses |": room -> rooms that it may depend on.
fn map() -> BTreeMap<String, BTreeSet<String>> {
    let text = read("ARCHITECTURE.md");
    let rows =
        text.lines().skip_while(|l| !l.starts_with("| room | uses |")).skip(2).take_while(|l| l.starts_with('|'));
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let room = |s: &str| s.trim_matches('`').to_owned();
        (room(cells[0]), cells[1].split(", ").filter(|s| *s != "-").map(room).collect())
    };
    let map: BTreeMap<_, _> = rows.map(row).collect();
    assert!(map.len() >= 10, "the table of rooms in ARCHITECTURE.md was not found");
    map
}

#[test]
fn arrows_run_as_the_map_says() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap();
    let package = |member: &str| {
        let manifest: toml::Table = read(format!("{member}/Cargo.toml")).parse().unwrap();
        (manifest["package"]["name"].as_str().unwrap().to_owned(), manifest)
    };
    let rooms: BTreeMap<String, String> =
        members.iter().map(|m| m.as_str().unwrap()).map(|m| (package(m).0, m.to_owned())).collect();
    let map = map();
    assert_eq!(
        map.keys().collect::<BTreeSet<_>>(),
        rooms.values().collect(),
        "ARCHITECTURE.md's rooms and the members"
    );

    for room in rooms.values() {
        let (_, manifest) = package(room);
        for section in ["dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(section).and_then(|t| t.as_table()) else { continue };
            for used in table.keys().filter_map(|name| rooms.get(name)) {
                assert!(map[room].contains(used), "{room} uses {used}: ARCHITECTURE.md has no such arrow");
            }
        }
    }
}

/// The fuzzer is built with `--locked` from a lock file of its own, which nothing else would miss.
#[test]
fn the_fuzzers_lock_file_knows_what_the_rooms_use() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let lock: toml::Table = read("tests/fuzz/Cargo.lock").parse().unwrap();
    let locked = |package: &str| {
        let entry = lock["package"].as_array().unwrap().iter().find(|p| p["name"].as_str() == Some(package))?;
        let used = entry.get("dependencies").and_then(|d| d.as_array()).into_iter().flatten();
        // "name", or "name version" where there are several.
        let names = used.map(|d| d.as_str().unwrap().split(' ').next().unwrap().to_owned());
        Some(names.collect::<BTreeSet<_>>())
    };
    for member in manifest["workspace"]["members"].as_array().unwrap() {
        let room: toml::Table = read(format!("{}/Cargo.toml", member.as_str().unwrap())).parse().unwrap();
        let package = room["package"]["name"].as_str().unwrap();
        let tables = ["dependencies", "build-dependencies"].iter().filter_map(|section| room.get(*section)?.as_table());
        let used: BTreeSet<_> = tables.flat_map(|table| table.keys().cloned()).collect();
        let Some(locked) = locked(package) else { continue };
        assert_eq!(locked, used, "{package}: run `cargo metadata --manifest-path tests/fuzz/Cargo.toml`");
    }
}

#[test]
fn the_map_has_no_circle() {
    let map = map();
    let mut standing = map.clone();
    while !standing.is_empty() {
        let free: Vec<String> = standing
            .iter()
            .filter(|(_, uses)| uses.iter().all(|u| !standing.contains_key(u)))
            .map(|(r, _)| r.clone())
            .collect();
        assert!(!free.is_empty(), "these rooms use each other in a circle: {:?}", standing.keys());
        free.iter().for_each(|room| drop(standing.remove(room)));
    }
}

/// Unsafe code: the kernels, the emulator that runs some of them, NCCL, and the one memory map of a checkpoint's file.
#[test]
fn unsafe_code_stays_in_its_rooms() {
    let marker = ["allow(", "unsafe_code)"].concat();
    let outside: Vec<String> = rust_files()
        .into_iter()
        .filter(|(_, text)| text.contains(&marker))
        .filter(|(name, _)| {
            // The last one: where a lane says to NCCL what memory is whose.
            let rooms = ["crates/kernels/", "crates/emulator/", "crates/nccl-rs/", "crates/dispatch/src/nccl/gpu.rs"];
            !rooms.iter().any(|room| name.starts_with(room))
        })
        .map(|(name, _)| name)
        .collect();
    assert!(outside.len() == 1 && outside[0].starts_with("crates/model/src/"), "unsafe code is allowed in {outside:?}");
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let too_long: Vec<String> = rust_files()
        .iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > 600)
        .map(|(name, lines)| format!("{name}: {lines}"))
        .collect();
    assert!(too_long.is_empty(), "files over 600 lines: {too_long:?}");
    assert!(read("ARCHITECTURE.md").lines().count() <= 400, "ARCHITECTURE.md is over 400 lines");
}

#[test]
fn every_module_says_what_it_owns() {
    let silent: Vec<String> = rust_files()
        .into_iter()
        .filter(|(_, text)| !text.trim_start().starts_with("//!"))
        .map(|(name, _)| name)
        .collect();
    assert!(silent.is_empty(), "files without a //! head: {silent:?}");
}
