//! What `up` is going to run: the checkpoint, the numerics and each node's flags; and the lines that say so.

use std::ffi::OsString;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use moesaic_dispatch::nccl::Transport;
use moesaic_kernels::cuda::{DeviceChoice, UnknownDevice};
use moesaic_kernels::{Backend, DtypeChoice, Numerics, Pool, UnknownDtype};
use moesaic_model::inspect::Parameters;
use moesaic_model::{Checkpoint, Family};
use moesaic_node::identity::role_name;
use moesaic_node::{Tls, config};
use moesaic_proto::v1::Role;

use crate::certs;
use crate::cli::BadArguments;
use crate::up::Args;

/// Names the model to serve where `--model` does not.
const DEMO_VARIABLE: &str = "MOESAIC_DEMO_MODEL";
const DEMO_NAME: &str = "tiny-r1";
/// Workers choose their own ports: others find them through the registry.
const ANY_LOOPBACK_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const NODES_MAX: usize = 64;

pub struct Plan {
    pub args: Args,
    pub checkpoint: Arc<Checkpoint>,
    pub threads: usize,
    /// Unique to this `up` if the registry may hold other clusters.
    pub cluster: String,
    /// What the workers of this process compute on, together.
    pub backend: Backend,
}

/// One node: its settings as flags, for a process of its own, or to be read here.
pub struct NodeFlags {
    /// "expert-worker"
    pub role: &'static str,
    pub id: String,
    pub flags: Vec<OsString>,
}

impl Plan {
    pub fn new(args: Args) -> Result<Self> {
        check(&args)?;
        let model = args.model.clone().unwrap_or_else(demo_model);
        let checkpoint = Arc::new(Checkpoint::open(&model)?);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let drawn = || format!("up-{:08x}", uuid::Uuid::new_v4().as_fields().0);
        let cluster = match &args.tls {
            Some(dir) => Tls::open_as(&certs::operator_folder(dir), Role::Operator)?.own().cluster.clone(),
            None => args.cluster.clone().unwrap_or_else(drawn),
        };
        let threads = args.threads.unwrap_or(cores);
        let dtype: DtypeChoice = args.dtype.parse().map_err(|e: UnknownDtype| BadArguments(e.to_string()))?;
        let device: DeviceChoice = args.device.parse().map_err(|e: UnknownDevice| BadArguments(e.to_string()))?;
        // With a process for each node this one computes nothing.
        let (device_here, threads_here) = if args.processes { (DeviceChoice::Cpu, 1) } else { (device, threads) };
        let backend = Backend::open(device_here, dtype, None, || Pool::new(threads_here))
            .map_err(|missing| BadArguments(format!("--device is {}: {missing}", args.device)))?;
        Ok(Self { threads, args, checkpoint, cluster, backend })
    }

    pub fn model(&self) -> &Path {
        self.checkpoint.dir()
    }

    pub fn coordinator(&self, registry: &str, listen: SocketAddr) -> NodeFlags {
        let flags = self.node(Role::Coordinator, 0, registry, listen);
        flags
            .with("expert_workers", self.args.expert_workers)
            .with("replicas", self.args.replicas)
            .with_some("allow_anyone", self.args.allow_anyone.then_some(true))
            .with_path("keys", self.args.keys.as_deref())
    }

    pub fn attention_workers(&self, registry: &str) -> Vec<NodeFlags> {
        let worker = |number| {
            let flags = self.worker(Role::AttentionWorker, number, registry);
            flags.with_some("cache_tokens", self.args.cache_tokens).with_some("memory", self.args.memory.as_ref())
        };
        (0..self.args.attention_workers).map(worker).collect()
    }

    pub fn expert_workers(&self, registry: &str) -> Vec<NodeFlags> {
        (0..self.args.expert_workers).map(|number| self.worker(Role::ExpertWorker, number, registry)).collect()
    }

    fn worker(&self, role: Role, number: usize, registry: &str) -> NodeFlags {
        let flags = self
            .node(role, number, registry, ANY_LOOPBACK_PORT)
            .with("dtype", &self.args.dtype)
            .with("threads", self.threads)
            .with_some("device_memory", self.args.device_memory.as_ref());
        match self.args.processes {
            true => flags.with("device", &self.args.device).with("transport", &self.args.transport),
            // Workers of this process are given their device, and call each other.
            false => flags,
        }
    }

    fn node(&self, role: Role, number: usize, registry: &str, listen: SocketAddr) -> NodeFlags {
        let name = role_name(role);
        let id = format!("{}{number}", &name[..1]);
        let certificate = self.args.tls.as_ref().map(|dir| certs::folder(dir, role, &id));
        NodeFlags { role: name, id: id.clone(), flags: Vec::new() }
            .with("id", id)
            .with("cluster", &self.cluster)
            .with("listen", listen)
            .with("registry", registry)
            .with_some("traces", self.args.traces.as_ref())
            .with_path("model", Some(self.model()))
            .with_path("tls", certificate.as_deref())
    }

    /// Whether worker processes compute on one GPU.
    pub fn shares_gpu(&self) -> bool {
        self.args.processes && self.args.device != "cpu"
    }

    /// What computes, for people.
    pub fn device(&self) -> String {
        match &self.backend {
            Backend::Cpu(..) => format!("{}, {} threads", self.backend.device(), self.threads),
            Backend::Gpu(_) => self.backend.device(),
        }
    }

    /// The processor's.
    pub fn numerics(&self) -> Numerics {
        match &self.backend {
            Backend::Cpu(numerics, _) => *numerics,
            Backend::Gpu(_) => Numerics::detect(self.backend.dtype()),
        }
    }

    /// Bytes of the latent cache that one token takes in all layers.
    pub fn cache_bytes_per_token(&self) -> u64 {
        let config = self.checkpoint.config();
        (config.num_hidden_layers * config.latent_width() * self.backend.activations().bytes()) as u64
    }
}

impl NodeFlags {
    /// "expert worker e0"
    pub fn title(&self) -> String {
        format!("{} {}", self.role.replace('-', " "), self.id)
    }

    fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.flags.push(config::flag(key, value.to_string()));
        self
    }

    fn with_some(self, key: &str, value: Option<impl fmt::Display>) -> Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    fn with_path(mut self, key: &str, path: Option<&Path>) -> Self {
        self.flags.extend(path.map(|path| config::flag(key, path)));
        self
    }
}

fn check(args: &Args) -> Result<(), BadArguments> {
    let refuse = |text: String| Err(BadArguments(text));
    for (name, value) in [
        ("--attention-workers", args.attention_workers),
        ("--expert-workers", args.expert_workers),
        ("--replicas", args.replicas),
    ] {
        if !(1..=NODES_MAX).contains(&value) {
            return refuse(format!("{name} is {value}; expected 1 to {NODES_MAX}"));
        }
    }
    if args.processes && args.device != "cpu" && args.device_memory.is_none() {
        return refuse("--device with --processes: set --device-memory, which each worker takes of it".into());
    }
    args.transport.parse::<Transport>().map_err(|unknown| BadArguments(unknown.to_string()))?;
    if args.threads == Some(0) {
        return refuse("--threads is 0; expected at least 1".into());
    }
    match args.registry.as_deref() {
        Some("embedded") if args.processes => {
            refuse("--registry embedded lives in one process; --processes needs etcd (leave --registry out)".into())
        }
        None | Some("embedded") => Ok(()),
        Some(spec) if spec.starts_with("etcd://") => Ok(()),
        Some(spec) => refuse(format!("--registry is {spec:?}; expected embedded or etcd://HOST:PORT[,HOST:PORT]")),
    }
}

/// The model that ships with the program: named by the environment, in the source tree, or installed beside it.
fn demo_model() -> PathBuf {
    if let Some(named) = std::env::var_os(DEMO_VARIABLE) {
        return named.into();
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(DEMO_NAME);
    let installed = || Some(std::env::current_exe().ok()?.parent()?.join("../share/moesaic").join(DEMO_NAME));
    if source.is_dir() { source } else { installed().unwrap_or(source) }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.checkpoint.config();
        let family = match config.model_type {
            Family::DeepseekV2 => "deepseek_v2",
            Family::DeepseekV3 => "deepseek_v3",
        };
        let p = Parameters::of(config);
        let (total, active) = (millions(p.total), millions(p.active));
        let (weights, stored) = match &self.backend {
            Backend::Cpu(n, _) if n.quantises() => ("INT8", 1),
            _ if config.quantization.is_some() => ("FP8", 1),
            _ => (&*self.args.dtype, self.backend.dtype().bytes() as u64),
        };
        let a = self.args.attention_workers;
        let e = self.args.expert_workers;
        let place = match (self.args.processes, self.args.registry.as_deref()) {
            (true, None) => "a process each, with an etcd of their own".to_owned(),
            (true, Some(spec)) => format!("a process each, cluster {} at {spec}", self.cluster),
            (false, None | Some("embedded")) => "in one process".to_owned(),
            (false, Some(spec)) => format!("in one process, cluster {} at {spec}", self.cluster),
        };
        writeln!(f, "model     {} ({family}), {total} parameters, {active} active a token", self.checkpoint.name())?;
        writeln!(f, "          {}", self.model().display())?;
        match self.shares_gpu() {
            true => writeln!(f, "numerics  {} on {}, which the workers share", self.args.dtype, self.args.device)?,
            false => writeln!(f, "numerics  {} on {}", self.backend.numerics(), self.device())?,
        }
        writeln!(f, "cluster   1 coordinator, {a} x attention worker, {e} x expert worker, {place}")?;
        writeln!(
            f,
            "memory    about {} of {weights} weights for an attention worker, {} for an expert worker",
            megabytes((p.total - p.experts) * stored),
            megabytes(p.experts * stored * self.args.replicas.min(e) as u64 / e as u64),
        )
    }
}

fn millions(n: u64) -> String {
    if n >= 1_000_000_000 { format!("{:.1}B", n as f64 / 1e9) } else { format!("{:.1}M", n as f64 / 1e6) }
}

pub fn megabytes(bytes: u64) -> String {
    if bytes >= 1_000_000_000 {
        format!("{:.2} GB", bytes as f64 / 1e9)
    } else {
        format!("{:.2} MB", bytes as f64 / 1e6)
    }
}
