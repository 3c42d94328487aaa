//! What a person sets: flags over environment (`MOESAIC_*`) over a TOML file. Every default is here.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use moesaic_dispatch::nccl::{Fabric, InvalidTransport, Transport};
use moesaic_kernels::cuda::{DeviceChoice, Missing, UnknownDevice};
use moesaic_kernels::{Backend, DtypeChoice, Pool, UnknownDtype};
use moesaic_node::config::{InvalidAddress, InvalidBytes, check_address, read_bytes};
use moesaic_node::membership::Settings;
use moesaic_proto::limits::FRAME_ROWS_MAX;
use moesaic_proto::v1::Role;
use serde::{Deserialize, Serialize};

use crate::engine::memory::CacheSize;

/// Tokens in the latent cache if neither `cache_tokens` nor `memory` is set: some dozen conversations.
const CACHE_TOKENS: usize = 65_536;
/// A micro-batch is a number of one byte in frames, and more than a few only cost memory.
const MICRO_BATCHES_MAX: usize = 16;

/// One attention worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The checkpoint's folder.
    pub model: PathBuf,
    /// Unique among the cluster's attention workers; drawn if unset.
    pub id: Option<String>,
    pub cluster: String,
    /// Port 0: any free one.
    pub listen: SocketAddr,
    /// "host:port" that other nodes can reach; `listen` if unset.
    pub advertise: Option<String>,
    /// "f32"; "bf16", or one of its ways on a processor: "bf16-fma", "bf16-dp"; "int8".
    pub dtype: String,
    /// "cpu", "cuda:N" or "auto": the first GPU if there is one. A GPU computes bf16.
    pub device: String,
    /// Bytes of a GPU's memory that the worker takes at its start: a number, with or without KiB, MiB, GiB or TiB.
    /// Nine tenths of what is free if unset.
    pub device_memory: Option<String>,
    /// How rows travel between workers: "grpc"; "nccl", from GPU to GPU where both have one; "auto": that if it is there.
    pub transport: String,
    /// What expert workers say that they compute, if it is not what this worker does: "bf16-sm_90a".
    pub expert_numerics: Option<String>,
    /// Threads of the kernels.
    pub threads: usize,
    /// Whether each of them keeps to a core of its own.
    pub pin: bool,
    /// "etcd://host:port[,host:port]", "etcds://..." over TLS, or "embedded" inside `moesaic up`.
    pub registry: String,
    /// Probes (/livez, /startupz, /readyz) and Prometheus' /metrics, without TLS. Unset: none.
    pub metrics_listen: Option<SocketAddr>,
    /// "http://host:port" of an OpenTelemetry collector, which gets spans over OTLP's gRPC. Unset: nothing is traced.
    pub traces: Option<String>,
    /// A folder with this node's certificate: tls.crt, tls.key, ca.crt and, if there is one, ca.crl. Unset: no TLS.
    pub tls: Option<PathBuf>,
    /// The authorities of etcd's certificate, in PEM; `tls`' ca.crt if unset.
    pub registry_ca: Option<PathBuf>,
    /// Tokens that the latent cache holds.
    pub cache_tokens: Option<usize>,
    /// Bytes of the latent cache, instead of `cache_tokens`: a number, with or without KiB, MiB, GiB or TiB.
    pub memory: Option<String>,
    /// Micro-batches in flight at a time, at most.
    pub micro_batches: usize,
    /// Rows that each should have before there are several.
    pub micro_batch_rows: usize,
    /// Tokens in a micro-batch.
    pub token_budget: usize,
    /// Tokens of one sequence in a micro-batch.
    pub chunk: usize,
    /// Requests that may wait for pages; more are refused.
    pub waiting_max: usize,
    /// How long the experts of a layer may take, all their holders tried and waited for; then the rows' requests fail.
    pub layer_deadline_ms: u64,
    /// What the worker stands on and may fail with. Its own id if unset.
    pub node: Option<String>,
    /// How long a sequence whose coordinator is gone is kept for another one to resume.
    pub orphan_seconds: u64,
    /// How long running sequences may go on after a stop; those that are left then go on elsewhere.
    pub drain_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            id: None,
            cluster: "moesaic".into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            dtype: "bf16".into(),
            device: "cpu".into(),
            device_memory: None,
            transport: "auto".into(),
            expert_numerics: None,
            threads: thread::available_parallelism().map_or(1, usize::from),
            // Two workers on one machine would share their first cores.
            pin: false,
            registry: "etcd://127.0.0.1:2379".into(),
            metrics_listen: None,
            traces: None,
            tls: None,
            registry_ca: None,
            cache_tokens: None,
            memory: None,
            // One computes while the other waits for its experts.
            micro_batches: 2,
            // Below, another micro-batch reads most experts' weights once more and computes little with them.
            micro_batch_rows: 128,
            // Enough rows for each expert to be worth reading its weights; and what a decoding sequence waits for at
            // worst, per turn.
            token_budget: 512,
            chunk: 512,
            waiting_max: 256,
            // Lost experts are loaded elsewhere by then.
            layer_deadline_ms: 30_000,
            node: None,
            // Clients come back within seconds, and latents are memory that others wait for.
            orphan_seconds: 10,
            drain_seconds: 20,
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
    /// Unique among the cluster's attention workers; drawn if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The cluster that it belongs to: a-z, 0-9 and -
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Where to serve; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The address that other nodes can reach, if it is not the one to listen on
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// f32; bf16, by the faster of bf16-fma and bf16-dp on a processor, or one of these;
    /// int8, on a processor
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// cpu, cuda:N or auto: the first GPU if there is one
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How much of a GPU's memory to take, as 64GiB; nine tenths of what is free if not given
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<String>,
    /// How rows travel between workers: grpc; nccl, from GPU to GPU where both have one; auto: that if it is there
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
    /// What expert workers compute, if it is not what this worker does: as bf16-sm_90a
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_numerics: Option<String>,
    /// Threads of the kernels; all cores if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Keep each of them to a core of its own, among those that the process may use
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
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
    /// A folder with this node's certificate: tls.crt, tls.key, ca.crt and, if there is one, ca.crl
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<PathBuf>,
    /// The authorities of etcd's certificate, in PEM, if they are not those of --tls
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry_ca: Option<PathBuf>,
    /// Tokens that the latent cache holds
    #[arg(long, value_name = "N", conflicts_with = "memory")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<usize>,
    /// Bytes of the latent cache, such as 8GiB
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Micro-batches in flight at a time, at most
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batches: Option<usize>,
    /// Rows that each micro-batch should have before there are several
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_rows: Option<usize>,
    /// Tokens in a micro-batch
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_budget: Option<usize>,
    /// Tokens of one sequence in a micro-batch
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk: Option<usize>,
    /// Requests that may wait for pages; more are refused
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_max: Option<usize>,
    /// How long the experts of a layer may take, all their holders tried
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_deadline_ms: Option<u64>,
    /// What it stands on and may fail with (a host, a rack); its own id if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How long a sequence whose coordinator is gone is kept for another one to resume
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orphan_seconds: Option<u64>,
    /// How long running sequences may go on after a stop
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_seconds: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    #[error("model is not set; give the checkpoint's folder")]
    Model,
    #[error("{field} is {given}; expected {min} to {max}")]
    Range { field: &'static str, given: u64, min: u64, max: u64 },
    #[error("cache_tokens ({tokens}) and memory ({memory}) are both set; expected one of them")]
    CacheTwice { tokens: usize, memory: String },
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    #[error(transparent)]
    Dtype(#[from] UnknownDtype),
    #[error(transparent)]
    Device(#[from] UnknownDevice),
    #[error(transparent)]
    Bytes(#[from] InvalidBytes),
    #[error(transparent)]
    Transport(#[from] InvalidTransport),
    #[error("device is {device:?}: {missing}")]
    NoDevice { device: String, missing: Missing },
}

impl Config {
    /// Opens the device.
    pub fn backend(&self) -> Result<Backend, InvalidConfig> {
        let pool = || if self.pin { Pool::pinned(self.threads) } else { Pool::new(self.threads) };
        Backend::open(self.device()?, self.dtype()?, self.device_memory()?, pool)
            .map_err(|missing| InvalidConfig::NoDevice { device: self.device.clone(), missing })
    }

    /// Opens what moves rows from GPU to GPU, if there is to be any.
    pub fn fabric(&self, backend: &Backend) -> Result<Option<Arc<dyn Fabric>>, InvalidConfig> {
        let device = backend.gpu();
        let gpu = device.map(|_| self.device().map(DeviceChoice::number)).transpose()?;
        Ok(self.transport()?.open(gpu, device, self.tls.is_some())?)
    }

    /// What makes it a member of its cluster.
    pub fn membership(&self) -> Settings<'_> {
        Settings {
            cluster: &self.cluster,
            role: Role::AttentionWorker,
            id: self.id.as_deref(),
            registry: &self.registry,
            tls: self.tls.as_deref(),
            registry_ca: self.registry_ca.as_deref(),
        }
    }

    /// Checks what the types do not.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let ranges = [
            ("threads", self.threads as u64, 1024),
            ("micro_batches", self.micro_batches as u64, MICRO_BATCHES_MAX as u64),
            ("micro_batch_rows", self.micro_batch_rows as u64, FRAME_ROWS_MAX as u64),
            ("token_budget", self.token_budget as u64, FRAME_ROWS_MAX as u64),
            ("chunk", self.chunk as u64, FRAME_ROWS_MAX as u64),
            ("waiting_max", self.waiting_max as u64, 1 << 20),
            ("layer_deadline_ms", self.layer_deadline_ms, 3_600_000),
        ];
        if let Some(&(field, given, max)) = ranges.iter().find(|(_, given, max)| !(1..=*max).contains(given)) {
            return Err(InvalidConfig::Range { field, given, min: 1, max });
        }
        check_address(self.listen, self.advertise.as_deref())?;
        self.dtype()?;
        self.device()?;
        self.device_memory()?;
        self.transport()?;
        self.cache_size().map(drop)
    }

    fn device(&self) -> Result<DeviceChoice, InvalidConfig> {
        Ok(self.device.parse()?)
    }

    fn transport(&self) -> Result<Transport, InvalidConfig> {
        Ok(self.transport.parse()?)
    }

    fn device_memory(&self) -> Result<Option<usize>, InvalidConfig> {
        let read = |given: &String| Ok(read_bytes("device_memory", given)? as usize);
        self.device_memory.as_ref().map(read).transpose()
    }

    pub fn dtype(&self) -> Result<DtypeChoice, InvalidConfig> {
        Ok(self.dtype.parse()?)
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
        let table: [(Change, &str); 10] = [
            (|c| c.transport = "rdma".into(), "transport `rdma` is none of `auto`, `grpc` and `nccl`"),
            (|c| c.micro_batches = 17, "micro_batches is 17; expected 1 to 16"),
            (|c| c.micro_batch_rows = 0, "micro_batch_rows is 0; expected 1 to 4096"),
            (|c| c.token_budget = 0, "token_budget is 0; expected 1 to 4096"),
            (|c| c.chunk = 5000, "chunk is 5000; expected 1 to 4096"),
            (|c| (c.cache_tokens, c.memory) = (Some(1), Some("1".into())), "are both set"),
            (|c| c.memory = Some("lots".into()), "memory is \"lots\""),
            (|c| c.advertise = Some("nowhere".into()), "advertise is \"nowhere\""),
            (|c| c.listen = SocketAddr::from(([0, 0, 0, 0], 1)), "set advertise"),
            (|c| c.dtype = "f8".into(), "dtype `f8`"),
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
