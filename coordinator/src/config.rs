//! What a person sets: flags over environment (`MOESAIC_*`) over a TOML file. Every default is here.

use std::net::SocketAddr;
use std::path::PathBuf;

use moesaic_node::membership::Settings;
use moesaic_proto::v1::Role;
use serde::{Deserialize, Serialize};

/// One coordinator.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The checkpoint's folder: config.json, tokenizer.json, the chat template. No weights are read.
    pub model: PathBuf,
    /// The model's name for clients; the folder's name if unset.
    pub served_name: Option<String>,
    /// Unique among the cluster's coordinators; drawn if unset.
    pub id: Option<String>,
    pub cluster: String,
    /// gRPC and HTTP, both on this port. Port 0: any free one.
    pub listen: SocketAddr,
    /// "etcd://host:port[,host:port]", "etcds://..." over TLS, or "embedded" inside `moesaic up`.
    pub registry: String,
    /// Probes (/livez, /startupz, /readyz) and Prometheus' /metrics, without TLS. Unset: none.
    pub metrics_listen: Option<SocketAddr>,
    /// "http://host:port" of an OpenTelemetry collector, which gets spans over OTLP's gRPC. Unset: nothing is traced.
    pub traces: Option<String>,
    /// The share of requests that are traced, 0 to 1; callers that send a `traceparent` say it for theirs.
    pub trace_ratio: f64,
    /// A folder with this node's certificate: tls.crt, tls.key, ca.crt and, if there is one, ca.crl. Unset: no TLS.
    pub tls: Option<PathBuf>,
    /// The authorities of etcd's certificate, in PEM; `tls`' ca.crt if unset.
    pub registry_ca: Option<PathBuf>,
    /// A TOML file of API keys, as `moesaic key` prints them; it is read again when it changes. Unset: none.
    pub keys: Option<PathBuf>,
    /// Serve whoever reaches `listen`, with neither keys nor certificates. Without it `listen` must be a loopback address
    /// then.
    pub allow_anyone: bool,
    /// "host:port" that other coordinators can reach; `listen` if unset.
    pub advertise: Option<String>,
    /// Expert workers to wait for before the first placement is made.
    pub expert_workers: usize,
    /// Workers that should hold each expert: all but one may die without a pause. Fewer where there are fewer workers, or
    /// no room.
    pub replicas: usize,
    /// Sequences that may run or wait at a time, each choice of a request counted; more are refused with 429.
    pub sequences_max: usize,
    /// Bytes of one HTTP request.
    pub body_bytes_max: usize,
    /// Connections at a time; more wait to be accepted.
    pub connections_max: usize,
    /// How long running requests may go on after a stop.
    pub drain_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            served_name: None,
            id: None,
            cluster: "moesaic".into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            registry: "etcd://127.0.0.1:2379".into(),
            metrics_listen: None,
            traces: None,
            trace_ratio: 1.0,
            tls: None,
            registry_ca: None,
            keys: None,
            allow_anyone: false,
            advertise: None,
            expert_workers: 1,
            replicas: 2,
            sequences_max: 1024,
            // A prompt of DeepSeek-V3's whole context, as text or as ids.
            body_bytes_max: 4 << 20,
            connections_max: 2048,
            drain_seconds: 30,
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
    /// The model's name for clients; the folder's name if not given
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served_name: Option<String>,
    /// Unique among the cluster's coordinators; drawn if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The cluster that it belongs to: a-z, 0-9 and -
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Where to serve gRPC and HTTP; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// etcd://host:port[,host:port], or etcds://... over TLS
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// Where to serve probes and metrics, without TLS
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// http://host:port of an OpenTelemetry collector that takes OTLP over gRPC
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traces: Option<String>,
    /// The share of requests that are traced, 0 to 1, of those whose callers do not say
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_ratio: Option<f64>,
    /// A folder with this node's certificate: tls.crt, tls.key, ca.crt and, if there is one, ca.crl
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<PathBuf>,
    /// The authorities of etcd's certificate, in PEM, if they are not those of --tls
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry_ca: Option<PathBuf>,
    /// A TOML file of API keys, as `moesaic key` prints them
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys: Option<PathBuf>,
    /// Serve whoever reaches --listen, with neither keys nor certificates
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_anyone: Option<bool>,
    /// The address that other coordinators can reach, if it is not the one to listen on
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Workers that should hold each expert
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<usize>,
    /// Expert workers to wait for before the first placement is made
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_workers: Option<usize>,
    /// Sequences that may run or wait at a time; more are refused with 429
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequences_max: Option<usize>,
    /// Bytes of one HTTP request
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_bytes_max: Option<usize>,
    /// Connections at a time
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_max: Option<usize>,
    /// How long running requests may go on after a stop
    #[arg(long, value_name = "S")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_seconds: Option<u64>,
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

impl Config {
    /// What makes it a member of its cluster.
    pub fn membership(&self) -> Settings<'_> {
        Settings {
            cluster: &self.cluster,
            role: Role::Coordinator,
            id: self.id.as_deref(),
            registry: &self.registry,
            tls: self.tls.as_deref(),
            registry_ca: self.registry_ca.as_deref(),
        }
    }

    pub fn validate(&self) -> Result<(), InvalidConfig> {
        if self.model.as_os_str().is_empty() {
            return Err(InvalidConfig::Model);
        }
        let is_guarded = self.keys.is_some() || self.tls.is_some() || self.allow_anyone;
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
