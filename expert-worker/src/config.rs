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
use moesaic_proto::v1::Role;
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
    /// "f32"; "bf16", or one of its ways on a processor: "bf16-fma", "bf16-dp"; "int8".
    pub dtype: String,
    /// "cpu", "cuda:N" or "auto": the first GPU if there is one. A GPU computes bf16.
    pub device: String,
    /// Bytes of a GPU's memory that the worker takes at its start: a number, with or without KiB, MiB, GiB or TiB.
    /// Nine tenths of what is free if unset.
    pub device_memory: Option<String>,
    /// How rows travel between workers: "grpc"; "nccl", from GPU to GPU where both have one; "auto": that if it is there.
    pub transport: String,
    /// Threads of the kernels.
    pub threads: usize,
    /// Whether each of them keeps to a core of its own.
    pub pin: bool,
    /// Frames that may wait to be computed; more are refused as busy.
    pub inbox_frames: usize,
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
    /// What the worker stands on and may fail with: copies of an expert go to different nodes. Its own id if unset.
    pub node: Option<String>,
    /// Experts that it can hold, over all layers; 0 for as many as it is given.
    pub expert_slots: u32,
    /// MiB of experts that are loaded in a second while others are served; 0 for no bound. Lost experts are loaded
    /// without one.
    pub load_mib_per_second: u64,
    /// How long, after a stop, others may take to load what this worker alone has, and then frames in hand.
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
            threads: thread::available_parallelism().map_or(1, usize::from),
            // Two workers on one machine would share their first cores.
            pin: false,
            // A few for each of the micro-batches of some dozen attention workers.
            inbox_frames: 256,
            registry: "etcd://127.0.0.1:2379".into(),
            metrics_listen: None,
            traces: None,
            tls: None,
            registry_ca: None,
            node: None,
            expert_slots: 0,
            // A part of what a disk and one core give: serving keeps the rest.
            load_mib_per_second: 512,
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
    /// Unique among the cluster's expert workers; drawn if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The cluster that it belongs to: a-z, 0-9 and -
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
    /// Threads of the kernels; all cores if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Keep each of them to a core of its own, among those that the process may use
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Frames that may wait to be computed; more are refused as busy
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inbox_frames: Option<usize>,
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
    /// What it stands on and may fail with (a host, a rack); its own id if not given
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Experts that it can hold, over all layers; 0 for as many as it is given
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_slots: Option<u32>,
    /// MiB of experts that are loaded in a second while others are served; 0 for no bound
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_mib_per_second: Option<u64>,
    /// How long others may take to load what this worker alone has, after a stop
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_seconds: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    #[error("model is not set; give the checkpoint's folder")]
    Model,
    #[error("{field} is {given}; expected 1 to {max}")]
    Range { field: &'static str, given: usize, max: usize },
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
            role: Role::ExpertWorker,
            id: self.id.as_deref(),
            registry: &self.registry,
            tls: self.tls.as_deref(),
            registry_ca: self.registry_ca.as_deref(),
        }
    }

    /// Checks what the types do not.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let ranges = [("threads", self.threads, 1024), ("inbox_frames", self.inbox_frames, 1 << 20)];
        if let Some(&(field, given, max)) = ranges.iter().find(|(_, given, max)| !(1..=*max).contains(given)) {
            return Err(InvalidConfig::Range { field, given, max });
        }
        check_address(self.listen, self.advertise.as_deref())?;
        self.device_memory()?;
        self.transport()?;
        self.device()?;
        self.dtype().map(drop)
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_named_with_its_bounds() {
        type Change = fn(&mut Config);
        let table: [(Change, &str); 8] = [
            (|c| c.transport = "rdma".into(), "transport `rdma` is none of `auto`, `grpc` and `nccl`"),
            (|c| c.threads = 0, "threads is 0; expected 1 to 1024"),
            (|c| c.inbox_frames = 0, "inbox_frames is 0; expected 1 to 1048576"),
            (|c| c.dtype = "f8".into(), "dtype `f8`"),
            (|c| c.device = "gpu".into(), "device `gpu` is none of"),
            (|c| c.device_memory = Some("8 apples".into()), "device_memory is \"8 apples\""),
            (|c| c.advertise = Some("nowhere".into()), "advertise is \"nowhere\""),
            (|c| c.listen = SocketAddr::from(([0, 0, 0, 0], 1)), "set advertise"),
        ];
        Config::default().validate().unwrap();
        let f32_on_gpu = Config { device: "cuda:0".into(), dtype: "f32".into(), ..Config::default() };
        let error = f32_on_gpu.backend().unwrap_err().to_string();
        assert_eq!(error, "device is \"cuda:0\": it computes bf16 in its own way; set dtype to bf16, or device to cpu");
        for (change, expected) in table {
            let mut config = Config::default();
            change(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
