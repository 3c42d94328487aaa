//! What a person sets: flags over environment (`MOESAIC_*`) over a TOML file. Every default is here.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;

use serde::{Deserialize, Serialize};

/// One expert worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The checkpoint's folder.
    pub model: PathBuf,
    /// Unique among the cluster's expert workers; drawn if unset.
    pub id: Option<String>,
    pub cluster: String,
    /// Port 0: any free one.
    pub listen: SocketAddr,
    /// "host:port" that other nodes can reach; `listen` if unset.
    pub advertise: Option<String>,
    /// "f32" or "bf16"
    pub dtype: String,
    /// Threads of the kernels.
    pub threads: usize,
    /// Frames that may wait to be computed; more are refused as busy.
    pub inbox_frames: usize,
    /// "etcd://host:port[,host:port]", or "embedded" inside `moesaic up`.
    pub registry: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            id: None,
            cluster: "moesaic".into(),
            // The next port is the attention worker's.
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            dtype: "bf16".into(),
            threads: thread::available_parallelism().map_or(1, usize::from),
            // A few for each of the micro-batches of some dozen attention workers.
            inbox_frames: 256,
            registry: "etcd://127.0.0.1:2379".into(),
        }
    }
}

/// The same as flags. What is not given comes from the environment, the file or the defaults.
#[derive(Clone, Debug, Default, Serialize, clap::Args)]
pub struct Flags {
    /// The checkpoint's folder
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// Unique among the cluster's expert workers; drawn if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Where to serve the experts; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The address that other nodes can reach, if it is not the one to listen on
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// f32 or bf16
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Threads of the kernels; all cores if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Frames that may wait to be computed; more are refused as busy
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inbox_frames: Option<usize>,
    /// etcd://host:port[,host:port]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
}
