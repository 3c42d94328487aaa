//! A model's name by content: what two workers compare to know that they serve the same weights.
//!
//! ```text
//! blake3(config as JSON; then for every tensor, by name: its name, dtype, shape, SAMPLE_BYTES from its middle), cut short
//! ```
//! A sample, because reading 600 GB at start is no price for a handshake: it tells checkpoints apart, and is no proof
//! against forgery.

use rayon::prelude::*;

use crate::Config;
use crate::shards::{Shards, Tensor};

const SAMPLE_BYTES: usize = 64;
const HEX_DIGITS: usize = 32;

pub(crate) fn of(config: &Config, shards: &Shards) -> String {
    let mut names: Vec<&str> = shards.names().collect();
    names.par_sort_unstable();
    // In parallel, because each sample may wait for a page of the disk.
    let tensors: Vec<blake3::Hash> = names.par_iter().map(|name| of_tensor(name, shards.get(name))).collect();
    let mut hasher = blake3::Hasher::new();
    let config = serde_json::to_vec(config).expect("a config is plain fields with string keys");
    put(&mut hasher, &config);
    for tensor in tensors {
        hasher.update(tensor.as_bytes());
    }
    hasher.finalize().to_hex()[..HEX_DIGITS].to_owned()
}

fn of_tensor(name: &str, tensor: Option<Tensor<'_>>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    put(&mut hasher, name.as_bytes());
    if let Some(tensor) = tensor {
        put(&mut hasher, tensor.dtype.to_string().as_bytes());
        put(&mut hasher, format!("{:?}", tensor.shape).as_bytes());
        let start = tensor.bytes.len().saturating_sub(SAMPLE_BYTES) / 2;
        let sample = &tensor.bytes[start..tensor.bytes.len().min(start + SAMPLE_BYTES)];
        put(&mut hasher, sample);
    }
    hasher.finalize()
}

/// Length first, so that no two lists of fields run together to the same bytes.
fn put(hasher: &mut blake3::Hasher, field: &[u8]) {
    hasher.update(&(field.len() as u64).to_le_bytes());
    hasher.update(field);
}
