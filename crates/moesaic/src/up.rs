//! `moesaic up`: says what it will do, starts a cluster, says when it is ready and where, stops it in order.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use moesaic_kernels::DtypeChoice;
use moesaic_node::trace::Traces;
use moesaic_node::{Membership, Peer, View, stop};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::attention_worker_client::AttentionWorkerClient;
use moesaic_proto::v1::{LoadRequest, Role};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::certs;
use crate::cli::say;
use crate::node::{self, Node};
use crate::plan::{Plan, megabytes};
use crate::{here, processes};

const READY_POLL: Duration = Duration::from_millis(10);

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The checkpoint's folder; the demo model tiny-r1 if not given (or $MOESAIC_DEMO_MODEL)
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where to serve gRPC and HTTP; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// What the kernels compute in: f32; bf16, by the faster of bf16-fma and bf16-dp on a processor, or one of these;
    /// int8, on a processor
    #[arg(long, default_value = "bf16", value_parser = DtypeChoice::NAMES)]
    pub dtype: String,
    /// What computes: cpu, cuda:N, or auto for the first GPU if there is one
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Of --processes on a GPU, which they share: what each worker takes of its memory, as 8GiB
    #[arg(long, value_name = "SIZE", requires = "processes")]
    pub device_memory: Option<String>,
    /// Of --processes: how rows travel between workers: auto, grpc or nccl
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub transport: String,
    /// Attention workers: each owns sequences and their latent cache
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub attention_workers: usize,
    /// Expert workers: each owns a part of the routed experts
    #[arg(long, value_name = "M", default_value_t = 2)]
    pub expert_workers: usize,
    /// Workers that hold each expert: with 2 any one of them may die without a pause, and they need twice the memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub replicas: usize,
    /// Give each node a process of its own, over gRPC and etcd
    #[arg(long)]
    pub processes: bool,
    /// embedded, or etcd://HOST:PORT[,HOST:PORT]. Default: embedded; with --processes an etcd started for the time
    #[arg(long, value_name = "SPEC")]
    pub registry: Option<String>,
    /// The cluster's name in the registry: a-z, 0-9 and -. Drawn if not given
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<String>,
    /// A folder that `moesaic certs` has made: TLS between all nodes and to etcd. With --processes
    #[arg(long, value_name = "DIR", requires = "processes", conflicts_with_all = ["cluster", "registry"])]
    pub tls: Option<PathBuf>,
    /// A TOML file of API keys, as `moesaic key` prints them
    #[arg(long, value_name = "FILE")]
    pub keys: Option<PathBuf>,
    /// Serve whoever reaches --listen, with neither keys nor certificates
    #[arg(long)]
    pub allow_anyone: bool,
    /// http://host:port of an OpenTelemetry collector that takes OTLP over gRPC: every request is traced
    #[arg(long, value_name = "URL")]
    pub traces: Option<String>,
    /// Threads of the kernels, shared by all workers; with --processes of each worker. All cores if not given
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Tokens that an attention worker's latent cache holds
    #[arg(long, value_name = "N", conflicts_with = "memory")]
    pub cache_tokens: Option<usize>,
    /// Bytes of an attention worker's latent cache, such as 8GiB
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<String>,
}

/// What was started. Nodes are in the order of their start and stop in the opposite one.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub membership: Membership,
    pub address: SocketAddr,
}

pub async fn run(args: Args) -> Result<()> {
    let began = Instant::now();
    let stop = stop::on_signals()?;
    let plan = Plan::new(args)?;
    say(&plan.to_string());
    // With a process for each node they trace themselves.
    let collector = plan.args.traces.as_deref().filter(|_| !plan.args.processes);
    let traces = Traces::start(collector, "moesaic", None, 1.0)?;
    let start = async { if plan.args.processes { processes::start(&plan).await } else { here::start(&plan).await } };
    let Cluster { mut nodes, membership, address } = tokio::select! {
        cluster = start => cluster?,
        () = stop.cancelled() => return Ok(()),
    };
    let announce = async {
        until_ready(&membership, address).await;
        say(&announcement(&plan, &membership, address, began).await);
        std::future::pending::<()>().await;
    };
    let failure = tokio::select! {
        () = stop.cancelled() => None,
        failure = node::first_failure(&mut nodes) => Some(failure),
        () = announce => None,
    };
    // Before its etcd is stopped, which it would miss.
    drop(membership);
    let stopped = node::stop_all(nodes).await;
    traces.finish().await;
    match failure {
        Some(failure) => Err(failure),
        None => stopped,
    }
}

/// Waits until the coordinator says that a token could be produced.
pub async fn until_ready(membership: &Membership, address: SocketAddr) {
    let peer = Peer { role: Role::Coordinator, id: None, address: reachable(address).to_string() };
    let endpoint = peer.endpoint().expect("an address makes a URL");
    let mut client = HealthClient::new(membership.connector().connect_lazy(&peer, &endpoint));
    loop {
        let answer = client.check(HealthCheckRequest::default()).await;
        if answer.is_ok_and(|answer| answer.get_ref().status() == ServingStatus::Serving) {
            return;
        }
        tokio::time::sleep(READY_POLL).await;
    }
}

/// Who holds what, and where to connect.
async fn announcement(plan: &Plan, membership: &Membership, address: SocketAddr, began: Instant) -> String {
    let view = membership.registry.view().borrow().clone();
    let scheme = if membership.tls.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{}", reachable(address));
    let model = serde_json::Value::from(plan.checkpoint.name());
    let mut flags = if url == "http://127.0.0.1:8080" { String::new() } else { format!(" --server {url}") };
    let mut known = String::new();
    if let Some(dir) = &plan.args.tls {
        let _ = write!(known, " --cacert {}", dir.join("ca.crt").display());
        let _ = write!(flags, " --tls {}", certs::operator_folder(dir).display());
    }
    if plan.args.keys.is_some() {
        known.push_str(" -H 'authorization: Bearer KEY'");
        if plan.args.tls.is_none() {
            flags.push_str(" --key KEY");
        }
    }
    let mut text = experts(&view) + &caches(plan, membership, &view).await;
    let _ = write!(
        text,
        "ready     after {:.2} s at {url} (gRPC and HTTP)\n\n  \
         curl{known} {url}/v1/chat/completions -H 'content-type: application/json' -d '{{\"model\": {model}, \"temperature\": \
         0, \"messages\": [{{\"role\": \"user\", \"content\": \"What is 347 + 586?\"}}]}}'\n  \
         moesaic chat{flags} \"What is 347 + 586?\"\n\nCtrl-C stops it.\n",
        began.elapsed().as_secs_f64(),
    );
    text
}

/// Which experts each worker holds: of every layer the same in a first placement, so one layer is shown.
fn experts(view: &View) -> String {
    let Some(placement) = &view.placement else { return String::new() };
    let held = |worker: &WorkerId| {
        let shard = placement.shard(worker);
        let held = shard.values().next().map(Vec::as_slice).unwrap_or_default();
        let ranges = held.chunk_by(|a, b| a.0 + 1 == b.0).map(|range| match range {
            [one] => one.to_string(),
            _ => format!("{} to {}", range[0], range[range.len() - 1]),
        });
        let ranges: Vec<_> = ranges.collect();
        if ranges.is_empty() {
            format!("{worker} holds none")
        } else {
            format!("{worker} holds {}", ranges.join(" and "))
        }
    };
    let workers: Vec<_> = placement.workers().iter().map(held).collect();
    format!("experts   {} of each layer: {}\n", placement.experts(), workers.join(", "))
}

/// The latent caches, as the attention workers sized them.
async fn caches(plan: &Plan, membership: &Membership, view: &View) -> String {
    let mut text = String::new();
    for member in view.of_role(Role::AttentionWorker) {
        let peer = member.peer();
        let Ok(endpoint) = peer.endpoint() else { continue };
        let Ok(channel) = membership.connector().connect(&peer, &endpoint).await else { continue };
        let mut client = AttentionWorkerClient::new(channel);
        let Ok(load) = client.load(LoadRequest {}).await else { continue };
        let tokens = u64::from(load.get_ref().pages_total) * u64::from(load.get_ref().page_tokens);
        let bytes = plan.cache_bytes_per_token();
        let size = megabytes(tokens * bytes);
        let _ = writeln!(text, "cache     {}: {tokens} tokens of {bytes} bytes, {size}", member.id);
    }
    text
}

/// Where a client on this machine connects to what listens on `address`.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
