//! What a person sets. Every default is here, or in `moesaic_worker::settings`.

use moesaic_node::config::{self, OutOfRange, check_ranges};
use moesaic_worker::{InvalidSettings, WorkerSettings};

/// One expert worker.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    #[command(flatten)]
    pub worker: WorkerSettings,
    /// Frames that may wait to be computed; more are refused as busy
    // A few for each of the micro-batches of some dozen attention workers.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub inbox_frames: usize,
    /// Experts that it can hold, over all layers; 0 for as many as it is given
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub expert_slots: u32,
    /// MiB of experts that are loaded in a second while others are served, lost ones excepted; 0 for no bound
    // A part of what a disk and one core give: serving keeps the rest.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub load_mib_per_second: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    #[error(transparent)]
    Worker(#[from] InvalidSettings),
    #[error(transparent)]
    Range(#[from] OutOfRange),
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
        Ok(check_ranges(&[("inbox_frames", self.inbox_frames as u64, 1 << 20)])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_named_with_its_bounds() {
        Config::default().validate().unwrap();
        let error = Config { inbox_frames: 0, ..Config::default() }.validate().unwrap_err().to_string();
        assert_eq!(error, "inbox_frames is 0; expected 1 to 1048576");
        let worker = WorkerSettings { threads: 0, ..WorkerSettings::default() };
        let error = Config { worker, ..Config::default() }.validate().unwrap_err().to_string();
        assert_eq!(error, "threads is 0; expected 1 to 1024");
    }
}
