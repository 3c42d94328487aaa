//! Experts in the layout that the kernels read, beside the checkpoint: a worker maps them instead of packing them again.
//!
//! ```text
//! experts-<numerics>.packed:   a page with the header as JSON
//!                              the bytes of each matrix, u64: for each layer with experts, for each expert, of gate, up and down
//!                              the matrices in that order; all is padded to 64 bytes
//! ```
//! Only a copy: shapes, and scales of FP8, are read from the checkpoint, and a file that was made of another one, for other numerics or by another version is
//! refused.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use moesaic_kernels::{Ffn, Numerics};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::shards::map;
use crate::{Checkpoint, ModelError};

/// Of the layout of panels and of this file.
const VERSION: u32 = 4;
const HEADER_BYTES: usize = 4096;
const ALIGNMENT: usize = 64;
const PARTS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header<T> {
    version: u32,
    fingerprint: T,
    numerics: T,
}

impl<'a> Header<&'a str> {
    fn of(checkpoint: &'a Checkpoint, numerics: Numerics) -> Self {
        Self { version: VERSION, fingerprint: checkpoint.fingerprint(), numerics: numerics.name() }
    }
}

/// A checkpoint's experts, from the packed file if there is one.
pub struct Experts<'c> {
    checkpoint: &'c Checkpoint,
    numerics: Numerics,
    /// Of each expert in their order, gate, up and down.
    packed: Option<Vec<[Bytes; PARTS]>>,
}

impl<'c> Experts<'c> {
    pub fn open(checkpoint: &'c Checkpoint, numerics: Numerics) -> Result<Self, ModelError> {
        let path = path(checkpoint, numerics);
        let packed = if path.exists() { Some(read(checkpoint, numerics, &path)?) } else { None };
        Ok(Self { checkpoint, numerics, packed })
    }

    pub fn are_packed(&self) -> bool {
        self.packed.is_some()
    }

    /// The expert, and how many bytes of the checkpoint it is.
    pub fn get(&self, layer: usize, expert: usize) -> Result<(Ffn, u64), ModelError> {
        let block = self.checkpoint.expert(layer, expert)?;
        let Some(packed) = &self.packed else {
            let ffn = Ffn::pack(&block.gate, &block.up, &block.down, self.numerics);
            self.checkpoint.release(block.matrices());
            return Ok((ffn, block.bytes()));
        };
        let parts = packed[index(self.checkpoint, layer, expert)].clone();
        Ffn::mapped([&block.gate, &block.up, &block.down], self.numerics, parts)
            .map(|ffn| (ffn, block.bytes()))
            .map_err(|unfit| stale(path(self.checkpoint, self.numerics), unfit.to_string()))
    }
}

/// Beside the checkpoint's own files.
fn path(checkpoint: &Checkpoint, numerics: Numerics) -> PathBuf {
    checkpoint.dir().join(format!("experts-{}.packed", numerics.name()))
}

/// An expert's place among all of them.
fn index(checkpoint: &Checkpoint, layer: usize, expert: usize) -> usize {
    let before = checkpoint.config().moe_layers().into_iter().filter(|moe| *moe < layer).count();
    before * checkpoint.config().n_routed_experts + expert
}

fn stale(path: PathBuf, detail: impl std::fmt::Display) -> ModelError {
    ModelError::file(path, format!("{detail}; delete it, or make it again with `moesaic pack`"))
}

fn read(checkpoint: &Checkpoint, numerics: Numerics, path: &Path) -> Result<Vec<[Bytes; PARTS]>, ModelError> {
    let bytes = Bytes::from_owner(map(path)?);
    let stale = |detail: String| stale(path.to_owned(), detail);
    let header = bytes.get(..HEADER_BYTES).ok_or_else(|| stale(format!("has {} bytes and no header", bytes.len())))?;
    let header = header.trim_ascii_end();
    if header.is_empty() {
        return Err(stale("header is empty".into()));
    }
    let header: Header<String> = serde_json::from_slice(header).map_err(|e| stale(format!("header: {e}")))?;
    let expected = Header::of(checkpoint, numerics);
    for (field, found, expected) in [
        ("version", &*header.version.to_string(), &*expected.version.to_string()),
        ("fingerprint", &header.fingerprint, expected.fingerprint),
        ("numerics", &header.numerics, expected.numerics),
    ] {
        if found != expected {
            return Err(stale(format!("{field} is {found}, expected {expected}")));
        }
    }
    let experts = checkpoint.config().moe_layers().len() * checkpoint.config().n_routed_experts;
    let (lengths, mut begin) = (HEADER_BYTES, HEADER_BYTES + lengths_bytes(experts));
    let missing = || stale(format!("has {} bytes, less than its matrices take", bytes.len()));
    let lengths = bytes.get(lengths..begin).ok_or_else(missing)?;
    let mut packed = Vec::with_capacity(experts);
    for lengths in lengths.as_chunks().0.as_chunks::<PARTS>().0.iter().take(experts) {
        let mut parts = [const { Bytes::new() }; PARTS];
        for (part, length) in parts.iter_mut().zip(lengths) {
            let end = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|length| begin.checked_add(length));
            let end = end.filter(|end| *end <= bytes.len()).ok_or_else(missing)?;
            *part = bytes.slice(begin..end);
            begin = end.next_multiple_of(ALIGNMENT);
        }
        packed.push(parts);
    }
    if begin != bytes.len() {
        return Err(stale(format!("has {} bytes, expected {begin}", bytes.len())));
    }
    Ok(packed)
}

/// Of the lengths of so many experts' matrices.
fn lengths_bytes(experts: usize) -> usize {
    (experts * PARTS * size_of::<u64>()).next_multiple_of(ALIGNMENT)
}

/// What [`write`] made.
#[derive(Debug)]
pub struct Written {
    pub path: PathBuf,
    pub experts: usize,
    pub bytes: u64,
}

/// Packs all experts into the file that [`Experts::open`] looks for. It appears under its name when it is whole.
pub fn write(checkpoint: &Checkpoint, numerics: Numerics) -> Result<Written, ModelError> {
    let config = checkpoint.config();
    let of_layer = |layer| (0..config.n_routed_experts).map(move |expert| (layer, expert));
    let experts: Vec<(usize, usize)> = config.moe_layers().into_iter().flat_map(of_layer).collect();
    let from_matrices = Experts { checkpoint, numerics, packed: None };
    if experts.is_empty() {
        return Err(ModelError::file(checkpoint.dir(), "has no routed experts, so there is nothing to pack"));
    }
    let path = path(checkpoint, numerics);
    let partial = path.with_extension("partial");
    let mut page = serde_json::to_vec(&Header::of(checkpoint, numerics)).expect("a number and strings");
    page.resize(HEADER_BYTES, b' ');
    let fill = || {
        let mut end = HEADER_BYTES + lengths_bytes(experts.len());
        let unwritten = |e: std::io::Error| ModelError::file(&path, format!("cannot be written: {e}"));
        let file = File::create(&partial).map_err(unwritten)?;
        file.write_all_at(&page, 0).map_err(unwritten)?;
        let mut lengths: Vec<u8> = Vec::new();
        for some in experts.chunks(2 * rayon::current_num_threads()) {
            let some: Result<Vec<_>, _> =
                some.par_iter().map(|(layer, expert)| from_matrices.get(*layer, *expert)).collect();
            for (ffn, _) in some? {
                for part in ffn.packed() {
                    file.write_all_at(part, end as u64).map_err(unwritten)?;
                    lengths.extend((part.len() as u64).to_le_bytes());
                    end = (end + part.len()).next_multiple_of(ALIGNMENT);
                }
            }
        }
        file.write_all_at(&lengths, HEADER_BYTES as u64).map_err(unwritten)?;
        file.set_len(end as u64).and_then(|()| file.sync_all()).map_err(unwritten)?;
        fs::rename(&partial, &path).map_err(unwritten)?;
        Ok(end as u64)
    };
    let bytes = fill().inspect_err(|_| drop(fs::remove_file(&partial)))?;
    Ok(Written { path, experts: experts.len(), bytes })
}
