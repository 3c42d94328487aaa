//! The tensor files of a folder as one map from name to bytes: `model.safetensors`, or the files that
//! `model.safetensors.index.json` names. Owns the memory maps and checks where files lie; never what tensors mean.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::Dtype;
use serde::Deserialize;

use crate::ModelError;
use crate::json::{Entries, check_is_file, read_text};
use crate::safetensors::{Entry, read_header};

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
const INDEX_BYTES_MAX: u64 = 64 << 20;
const SHARDS_MAX: usize = 4096;
/// A multiple of what any system has, so that a page at the edge of two tensors stays.
const PAGE_BYTES: usize = 64 << 10;

#[derive(Debug, Default)]
pub(crate) struct Shards {
    files: Vec<Shard>,
    tensors: HashMap<String, (usize, Entry)>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// One tensor, mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<'a> {
    pub file: &'a Path,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

#[derive(Deserialize)]
struct Index {
    weight_map: Entries<String>,
}

impl Shards {
    /// What can be opened, and all that is wrong with the rest.
    pub fn open(dir: &Path) -> (Self, Vec<ModelError>) {
        let mut shards = Self::default();
        let mut problems = Vec::new();
        let single = dir.join(SINGLE_FILE);
        if single.exists() {
            problems.extend(shards.add(single).err());
            return (shards, problems);
        }
        match read_index(dir) {
            Err(problem) => problems.push(problem),
            Ok(index) => {
                let files: BTreeSet<&str> = index.iter().map(|(_, file)| file.as_str()).collect();
                for file in files {
                    problems.extend(shards.add(dir.join(file)).err());
                }
                if problems.is_empty() {
                    problems.extend(index.iter().filter_map(|(tensor, file)| shards.check_listed(dir, tensor, file)));
                }
            }
        }
        (shards, problems)
    }

    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let (shard, entry) = self.tensors.get(name)?;
        let shard = self.files.get(*shard)?;
        let bytes = shard.map.get(entry.range.clone())?;
        Some(Tensor { file: &shard.path, dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// Takes the pages of some mapped bytes out of this process's memory; the file's cache keeps them, and reading them
    /// again brings them back.
    #[allow(unsafe_code)]
    pub fn release(&self, bytes: &[u8]) {
        let address = bytes.as_ptr().addr();
        let within = |shard: &&Shard| {
            let start = shard.map.as_ptr().addr();
            start <= address && address + bytes.len() <= start + shard.map.len()
        };
        let Some(map) = self.files.iter().find(within).map(|shard| &shard.map) else { return };
        let begin = (address - map.as_ptr().addr()).next_multiple_of(PAGE_BYTES);
        let end = (address - map.as_ptr().addr() + bytes.len()) / PAGE_BYTES * PAGE_BYTES;
        if begin < end {
            // SAFETY: the map is read-only and of a file: a page that is dropped is read from the file again.
            let released = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
            // It is an advice: without it the pages stay until the system wants them.
            let _ = released;
        }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|shard| shard.path.as_path())
    }

    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    fn add(&mut self, path: PathBuf) -> Result<(), ModelError> {
        let map = map(&path)?;
        let tensors = read_header(&path, &map)?;
        let shard = self.files.len();
        for (name, _) in &tensors {
            if let Some((other, _)) = self.tensors.get(name) {
                let other = self.files[*other].path.display();
                return Err(ModelError::tensor(&path, name, format!("is in {other} too, expected it in one file")));
            }
        }
        self.tensors.extend(tensors.into_iter().map(|(name, entry)| (name, (shard, entry))));
        self.files.push(Shard { path, map });
        Ok(())
    }

    /// The index's word for where a tensor is.
    fn check_listed(&self, dir: &Path, tensor: &str, file: &str) -> Option<ModelError> {
        let found = self.get(tensor).is_some_and(|t| t.file.file_name().is_some_and(|name| name == file));
        (!found).then(|| {
            let detail = format!("is not in {file}, where the index has it");
            ModelError::tensor(dir.join(INDEX_FILE), tensor, detail)
        })
    }
}

/// (tensor, file) pairs; every file is a plain name.
fn read_index(dir: &Path) -> Result<Vec<(String, String)>, ModelError> {
    let path = dir.join(INDEX_FILE);
    if !path.exists() {
        return Err(ModelError::file(dir, format!("has no weights, expected {SINGLE_FILE} or {INDEX_FILE}")));
    }
    let text = read_text(&path, INDEX_BYTES_MAX)?;
    let index: Index = serde_json::from_str(&text).map_err(|e| ModelError::file(&path, e.to_string()))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in &index.weight_map.0 {
        if !is_plain_name(file) {
            let detail = format!("is said to be in {file:?}, expected the plain name of a .safetensors file");
            return Err(ModelError::tensor(path, tensor, detail));
        }
        files.insert(file);
    }
    if files.len() > SHARDS_MAX {
        return Err(ModelError::file(&path, format!("names {} files, expected at most {SHARDS_MAX}", files.len())));
    }
    Ok(index.weight_map.0)
}

/// A file of this very folder: one component, no way out. It may be a link, as hub caches have them: those are the
/// folder owner's, the index is whoever's.
fn is_plain_name(file: &str) -> bool {
    let mut components = Path::new(file).components();
    let plain =
        matches!(components.next(), Some(Component::Normal(name)) if name == file) && components.next().is_none();
    plain && file.ends_with(".safetensors") && !file.contains(['\\', '\0', ':'])
}

#[allow(unsafe_code)]
pub(crate) fn map(path: &Path) -> Result<Mmap, ModelError> {
    check_is_file(path)?;
    let file = File::open(path).map_err(|e| ModelError::io(path, e))?;
    // SAFETY: the map is read-only and private to this struct, and its bytes are only read as plain integers, so no value
    // of them is invalid. Whoever writes into or truncates a checkpoint's file while it is served breaks the one
    // assumption that every reader by mmap makes; a checkpoint is replaced by renaming a new one over it.
    unsafe { Mmap::map(&file) }.map_err(|e| ModelError::io(path, e))
}
