//! The planned files and their index, written by all threads at once: each makes a piece of a tensor in its own buffer
//! and writes it at its place.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;

use super::plan::{Plan, Planned, PlannedFile};
use super::values::VALUES_PER_DRAW;
use crate::ModelError;
use crate::shards::INDEX_FILE;

/// Stays in a core's cache between making and writing. A multiple of every draw's bytes.
const PIECE_BYTES: u64 = 256 << 10;
const HEADER_ALIGNMENT: usize = 8;

pub(super) fn all(folder: &Path, plan: &Plan) -> Result<(), ModelError> {
    let write = |file: &PlannedFile| {
        let path = folder.join(&file.name);
        write_file(&path, file).map_err(|e| unwritten(&path, &e, plan))?;
        tracing::info!(file = file.name, "written");
        Ok(())
    };
    // Threads that write to different files do not wait for one another.
    plan.files.par_iter().try_for_each(write)?;
    if plan.files.len() > 1 {
        let path = folder.join(INDEX_FILE);
        write_index(&path, plan).map_err(|e| unwritten(&path, &e, plan))?;
    }
    Ok(())
}

fn unwritten(path: &Path, cause: &std::io::Error, plan: &Plan) -> ModelError {
    let detail = format!("cannot be written: {cause}; the checkpoint takes {} bytes on the disk", plan.bytes);
    ModelError::file(path, detail)
}

fn write_file(path: &Path, planned: &PlannedFile) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let header = header(planned)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let data_start = (size_of::<u64>() + header.len()) as u64;
    let begins = begins(planned).map(|begin| data_start + begin);
    let placed: Vec<(u64, &Planned)> = begins.zip(&planned.tensors).collect();
    placed.into_par_iter().try_for_each(|(begin, tensor)| write_tensor(&file, begin, tensor))
}

/// Where each tensor's data begins, from the start of all data.
fn begins(planned: &PlannedFile) -> impl Iterator<Item = u64> {
    planned.tensors.iter().scan(0, |end, tensor| {
        let begin = *end;
        *end += tensor.bytes();
        Some(begin)
    })
}

/// Padded, so that the data begins at a multiple of HEADER_ALIGNMENT.
fn header(planned: &PlannedFile) -> std::io::Result<Vec<u8>> {
    let info = |(begin, tensor): (u64, &Planned)| {
        let (begin, end) = (begin as usize, (begin + tensor.bytes()) as usize);
        let dtype = tensor.values.stored.dtype();
        (tensor.name.clone(), TensorInfo { dtype, shape: tensor.shape.clone(), data_offsets: (begin, end) })
    };
    let tensors = begins(planned).zip(&planned.tensors).map(info).collect();
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), tensors).map_err(std::io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    Ok(header)
}

fn write_tensor(file: &File, begin: u64, tensor: &Planned) -> std::io::Result<()> {
    const { assert!(PIECE_BYTES.is_multiple_of(VALUES_PER_DRAW * size_of::<f32>() as u64)) };
    let (bytes, value_bytes) = (tensor.bytes(), tensor.values.stored.bytes());
    let buffer = || vec![0; PIECE_BYTES.min(bytes) as usize];
    (0..bytes.div_ceil(PIECE_BYTES)).into_par_iter().try_for_each_init(buffer, |buffer, piece| {
        let offset = piece * PIECE_BYTES;
        let out = &mut buffer[..PIECE_BYTES.min(bytes - offset) as usize];
        tensor.values.fill(offset / value_bytes, out);
        file.write_all_at(out, begin + offset)
    })
}

#[derive(Serialize)]
struct Index<'a> {
    metadata: BTreeMap<&'a str, u64>,
    weight_map: BTreeMap<&'a str, &'a str>,
}

fn write_index(path: &Path, plan: &Plan) -> std::io::Result<()> {
    let mut weight_map = BTreeMap::new();
    for file in &plan.files {
        weight_map.extend(file.tensors.iter().map(|tensor| (tensor.name.as_str(), file.name.as_str())));
    }
    let index = Index { metadata: BTreeMap::from([("total_size", plan.bytes)]), weight_map };
    let mut json = std::io::BufWriter::new(File::create(path)?);
    serde_json::to_writer_pretty(&mut json, &index)?;
    json.flush()
}
