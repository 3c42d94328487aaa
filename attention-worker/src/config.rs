//! What a person sets. Every default is here, or in `moesaic_worker::settings`.

use moesaic_node::config::{self, InvalidBytes, OutOfRange, check_ranges, read_bytes};
use moesaic_proto::limits::FRAME_ROWS_MAX;
use moesaic_worker::{InvalidSettings, WorkerSettings};

use crate::engine::memory::CacheSize;

/// Tokens in the latent cache if neither `cache_tokens` nor `memory` is set: some dozen conversations.
const CACHE_TOKENS: usize = 65_536;
/// A micro-batch is a number of one byte in frames, and more than a few only cost memory.
const MICRO_BATCHES_MAX: u64 = 16;

/// One attention worker.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    #[command(flatten)]
    pub worker: WorkerSettings,
    /// What expert workers compute, if it is not what this worker does: as bf16-sm_90a
    #[arg(long, value_name = "NAME")]
    pub expert_numerics: Option<String>,
    /// Tokens that the latent cache holds; 65536 if --memory is not given either
    #[arg(long, value_name = "N")]
    pub cache_tokens: Option<usize>,
    /// Bytes of the latent cache, such as 8GiB, instead of --cache-tokens
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<String>,
    /// Micro-batches in flight at a time, at most
    // One computes while the other waits for its experts.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub micro_batches: usize,
    /// Rows that each micro-batch should have before there are several
    // Below, another micro-batch reads most experts' weights once more and computes little with them.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub micro_batch_rows: usize,
    /// Tokens in a micro-batch
    // Enough rows for each expert to be worth reading its weights; and what a decoding sequence waits for at worst, per turn.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub token_budget: usize,
    /// Tokens of one sequence in a micro-batch
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub chunk: usize,
    /// Requests that may wait for pages; more are refused
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub waiting_max: usize,
    /// How long the experts of a layer may take, all their holders tried and waited for; then the rows' requests fail
    // Lost experts are loaded elsewhere by then.
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    pub layer_deadline_ms: u64,
    /// How long a sequence whose coordinator is gone is kept for another one to resume
    // Clients come back within seconds, and latents are memory that others wait for.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub orphan_seconds: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    #[error(transparent)]
    Worker(#[from] InvalidSettings),
    #[error(transparent)]
    Range(#[from] OutOfRange),
    #[error("cache_tokens ({tokens}) and memory ({memory}) are both set; expected one of them")]
    CacheTwice { tokens: usize, memory: String },
    #[error(transparent)]
    Bytes(#[from] InvalidBytes),
}

impl Default for Config {
    fn default() -> Self {
        config::defaults()
    }
}

impl Config {
    /// Checks what the types do not.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.worker.validate()?;
        check_ranges(&[
            ("micro_batches", self.micro_batches as u64, MICRO_BATCHES_MAX),
            ("micro_batch_rows", self.micro_batch_rows as u64, FRAME_ROWS_MAX as u64),
            ("token_budget", self.token_budget as u64, FRAME_ROWS_MAX as u64),
            ("chunk", self.chunk as u64, FRAME_ROWS_MAX as u64),
            ("waiting_max", self.waiting_max as u64, 1 << 20),
            ("layer_deadline_ms", self.layer_deadline_ms, 3_600_000),
        ])?;
        self.cache_size().map(drop)
    }

    pub fn cache_size(&self) -> Result<CacheSize, InvalidConfig> {
        match (self.cache_tokens, &self.memory) {
            (Some(tokens), Some(memory)) => Err(InvalidConfig::CacheTwice { tokens, memory: memory.clone() }),
            (tokens, None) => Ok(CacheSize::Tokens(tokens.unwrap_or(CACHE_TOKENS))),
            (None, Some(given)) => Ok(CacheSize::Bytes(read_bytes("memory", given)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_named_with_its_bounds() {
        type Change = fn(&mut Config);
        let table: [(Change, &str); 7] = [
            (|c| c.worker.threads = 1025, "threads is 1025; expected 1 to 1024"),
            (|c| c.micro_batches = 17, "micro_batches is 17; expected 1 to 16"),
            (|c| c.micro_batch_rows = 0, "micro_batch_rows is 0; expected 1 to 4096"),
            (|c| c.token_budget = 0, "token_budget is 0; expected 1 to 4096"),
            (|c| c.chunk = 5000, "chunk is 5000; expected 1 to 4096"),
            (|c| (c.cache_tokens, c.memory) = (Some(1), Some("1".into())), "are both set"),
            (|c| c.memory = Some("lots".into()), "memory is \"lots\""),
        ];
        Config::default().validate().unwrap();
        for (change, expected) in table {
            let mut config = Config::default();
            change(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
