//! What a person sets. Every default is here, or in `moesaic_node::membership`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::ArgAction;
use moesaic_node::{MemberSettings, config};

/// One coordinator.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// The checkpoint's folder: config.json, tokenizer.json, the chat template. No weights are read
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// The model's name for clients; the folder's name if not given
    #[arg(long, value_name = "NAME")]
    pub served_name: Option<String>,
    #[command(flatten)]
    pub member: MemberSettings,
    /// Where to serve gRPC and HTTP, both on this port; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// The share of requests that are traced, 0 to 1, of those whose callers send no `traceparent`
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    pub trace_ratio: f64,
    /// A TOML file of API keys, as `moesaic key` prints them; it is read again when it changes
    #[arg(long, value_name = "FILE")]
    pub keys: Option<PathBuf>,
    /// Serve whoever reaches --listen, with neither keys nor certificates; without it, that must be a loopback address then
    #[arg(
        long, num_args = 0..=1, default_value_t = false, default_missing_value = "true", value_name = "BOOL",
        action = ArgAction::Set
    )]
    pub allow_anyone: bool,
    /// Workers that should hold each expert: all but one may die without a pause
    // Fewer where there are fewer workers, or no room.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub replicas: usize,
    /// Expert workers to wait for before the first placement is made
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub expert_workers: usize,
    /// Sequences that may run or wait at a time, each choice of a request counted; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub sequences_max: usize,
    /// Bytes of one HTTP request
    // A prompt of DeepSeek-V3's whole context, as text or as ids.
    #[arg(long, value_name = "N", default_value_t = 4 << 20)]
    pub body_bytes_max: usize,
    /// Connections at a time; more wait to be accepted
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub connections_max: usize,
    /// How long running requests may go on after a stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_seconds: u64,
}

/// A value that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    #[error("config: model is not set; give the checkpoint's folder")]
    Model,
    #[error("config: {field} is 0; expected at least 1")]
    Zero { field: &'static str },
    #[error(
        "config: listen is {listen}, which others can reach, and nobody is asked who they are: set keys (`moesaic key` \
         makes one), or tls, or allow_anyone"
    )]
    Unguarded { listen: SocketAddr },
}

impl Default for Config {
    fn default() -> Self {
        config::defaults()
    }
}

impl Config {
    /// The checkpoint's folder.
    pub fn model(&self) -> Result<&Path, InvalidConfig> {
        self.model.as_deref().ok_or(InvalidConfig::Model)
    }

    /// Checks what the types do not.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.model()?;
        let is_guarded = self.keys.is_some() || self.member.tls.is_some() || self.allow_anyone;
        if !is_guarded && !self.listen.ip().is_loopback() {
            return Err(InvalidConfig::Unguarded { listen: self.listen });
        }
        let positive = [
            ("expert_workers", self.expert_workers),
            ("replicas", self.replicas),
            ("sequences_max", self.sequences_max),
            ("body_bytes_max", self.body_bytes_max),
            ("connections_max", self.connections_max),
        ];
        match positive.into_iter().find(|(_, value)| *value == 0) {
            Some((field, _)) => Err(InvalidConfig::Zero { field }),
            None => Ok(()),
        }
    }
}
