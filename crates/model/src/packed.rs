//! Experts in the layout that the kernels read, beside the checkpoint: a worker maps them instead of packing them again.
//!
//! ```text
//! experts-<numerics>.packed:   a page with the header as JSON, then for each layer with experts, for each expert:
//!                              gate, up, down, each padded to 64 bytes
//! ```
//! Only a copy: shapes and scales are read from the checkpoint, and a file that was made of another one, for other numerics or by another version is
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
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4096;
const ALIGNMENT: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    fingerprint: String,
    numerics: String,
    /// Of one expert's gate, up and down.
    bytes: [usize; 3],
}

impl Header {
    /// Where an expert's gate, up and down begin, and where it ends; from its own begin on.
    fn places(&self) -> [usize; 4] {
        let mut places = [0; 4];
        for (i, bytes) in self.bytes.iter().enumerate() {
            places[i + 1] = places[i] + bytes.next_multiple_of(ALIGNMENT);
        }
        places
    }
}

/// A checkpoint's experts, from the packed file if there is one.
pub struct Experts<'c> {
    checkpoint: &'c Checkpoint,
    numerics: Numerics,
    packed: Option<(Header, Bytes)>,
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
        let Some((header, bytes)) = &self.packed else {
            let ffn = Ffn::pack(&block.gate, &block.up, &block.down, self.numerics);
            self.checkpoint.release(block.matrices());
            return Ok((ffn, block.bytes()));
        };
        let places = header.places();
        let begin = HEADER_BYTES + index(self.checkpoint, layer, expert) * places[3];
        let part = |i: usize| bytes.slice(begin + places[i]..begin + places[i] + header.bytes[i]);
        Ffn::mapped([&block.gate, &block.up, &block.down], self.numerics, [part(0), part(1), part(2)])
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

fn read(checkpoint: &Checkpoint, numerics: Numerics, path: &Path) -> Result<(Header, Bytes), ModelError> {
    let bytes = Bytes::from_owner(map(path)?);
    let stale = |detail: String| stale(path.to_owned(), detail);
    let header = bytes.get(..HEADER_BYTES).ok_or_else(|| stale(format!("has {} bytes and no header", bytes.len())))?;
    let header = header.trim_ascii_end();
    if header.is_empty() {
        return Err(stale("header is empty".into()));
    }
    let header: Header = serde_json::from_slice(header).map_err(|e| stale(format!("header: {e}")))?;
    let expected = [VERSION.to_string(), checkpoint.fingerprint().to_owned(), numerics.name().to_owned()];
    let found = [header.version.to_string(), header.fingerprint.clone(), header.numerics.clone()];
    for ((field, found), expected) in ["version", "fingerprint", "numerics"].iter().zip(found).zip(expected) {
        if found != expected {
            return Err(stale(format!("{field} is {found}, expected {expected}")));
        }
    }
    if let Some(part) = header.bytes.iter().find(|part| **part > bytes.len()) {
        return Err(stale(format!("header: an expert with a matrix of {part} bytes, more than the file has")));
    }
    let experts = checkpoint.config().moe_layers().len() * checkpoint.config().n_routed_experts;
    let expected = HEADER_BYTES + experts * header.places()[3];
    if bytes.len() != expected {
        return Err(stale(format!("has {} bytes, expected {expected}", bytes.len())));
    }
    Ok((header, bytes))
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
    let Some(&(layer, expert)) = experts.first() else {
        return Err(ModelError::file(checkpoint.dir(), "has no routed experts, so there is nothing to pack"));
    };
    let header = Header {
        version: VERSION,
        fingerprint: checkpoint.fingerprint().to_owned(),
        numerics: numerics.name().to_owned(),
        bytes: from_matrices.get(layer, expert)?.0.packed().map(<[u8]>::len),
    };
    let path = path(checkpoint, numerics);
    let bytes = (HEADER_BYTES + experts.len() * header.places()[3]) as u64;
    let unwritten = |e: std::io::Error| {
        ModelError::file(&path, format!("cannot be written: {e}; it takes {bytes} bytes on the disk"))
    };
    let partial = path.with_extension("partial");
    let fill = || {
        let file = File::create(&partial).map_err(unwritten)?;
        let mut page = serde_json::to_vec(&header).expect("numbers and strings");
        page.resize(HEADER_BYTES, b' ');
        file.set_len(bytes).and_then(|()| file.write_all_at(&page, 0)).map_err(unwritten)?;
        let places = header.places();
        experts.par_iter().enumerate().try_for_each(|(index, &(layer, expert))| {
            let (ffn, _) = from_matrices.get(layer, expert)?;
            if ffn.packed().map(<[u8]>::len) != header.bytes {
                let detail = format!("layer {layer}, expert {expert} is stored unlike the first, expected all alike");
                return Err(ModelError::file(checkpoint.dir(), detail));
            }
            let begin = HEADER_BYTES + index * places[3];
            let mut parts = ffn.packed().into_iter().zip(places);
            parts.try_for_each(|(part, place)| file.write_all_at(part, (begin + place) as u64)).map_err(unwritten)
        })?;
        file.sync_all().and_then(|()| fs::rename(&partial, &path)).map_err(unwritten)
    };
    fill().inspect_err(|_| drop(fs::remove_file(&partial)))?;
    Ok(Written { path, experts: experts.len(), bytes })
}
