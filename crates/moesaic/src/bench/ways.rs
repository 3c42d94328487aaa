//! `moesaic bench --transport all`: what each way between an attention worker and an expert worker takes for itself, by the rows
//! of a frame. The expert worker answers zeros; over sockets and from GPU to GPU it is a process of its own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::future::try_join_all;
use moesaic_dispatch::nccl::{self, Fabric, QUEUES, QUEUES_MAX, Transport};
use moesaic_dispatch::{
    Addends, CombineOps, DispatchConfig, Dispatcher, ExpertHost, Holder, Hub, ReplySender, RequestFrame, Route, Rows,
    Shape, Values, grpc,
};
use moesaic_kernels::cuda::{self, Buffer, Device, DeviceChoice, GpuBytes, Parcel};
use moesaic_kernels::{DtypeChoice, add, bf16, combine_first, combine_next};
use moesaic_node::{Connector, handshake, server};
use moesaic_proto::limits::FRAME_ROWS_MAX;
use moesaic_proto::v1::{Hello, Role};
use moesaic_proto::{Epoch, ExpertId, LayerId, Placement, WorkerId};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::Args;
use crate::roles;

/// A row's values, if no model is named: V3's.
const HIDDEN: usize = 7168;
/// How long one number of rows is measured, and how many calls at least.
const TIME: Duration = Duration::from_millis(700);
const CALLS_MIN: usize = 20;
/// Calls at a time, where bytes a second are measured.
const AT_ONCE: usize = 4;
/// For rows and answers on the GPU.
const DEVICE_MEMORY: usize = 2 << 30;
const UP_TIMEOUT: Duration = Duration::from_secs(60);
/// What the planner takes a network of 400 Gbit/s to give: bytes a second one way, and seconds for a crossing.
const PLANNED: (f64, f64) = (35e9, 25e-6);

/// One way, for one number of rows.
struct Measured {
    way: &'static str,
    rows: usize,
    /// Of a call there and back: in the middle, and of a hundred the slowest but one.
    p50: Duration,
    p99: Duration,
    /// Bytes of rows there and back, with several calls at a time.
    bytes_per_s: f64,
}

pub async fn run(args: &Args) -> Result<()> {
    let hidden = args.model_config()?.map_or(HIDDEN, |config| config.hidden_size);
    let rows = if args.rows.is_empty() { vec![1, 8, 32, 128, 512] } else { args.rows.clone() };
    ensure!(rows.iter().all(|rows| (1..=FRAME_ROWS_MAX).contains(rows)), "--rows: expected 1 to {FRAME_ROWS_MAX}");
    let mut measured = Vec::new();
    measured.extend(measure("local", &local(hidden)?, hidden, &rows, None).await?);
    let (dispatcher, _peer) = remote(args, hidden, None).await?;
    measured.extend(measure("grpc", &dispatcher, hidden, &rows, None).await?);
    if let Some(fabric) = fabric(args)? {
        let (dispatcher, _peer) = remote(args, hidden, Some(fabric.clone())).await?;
        measured.extend(measure("nccl", &dispatcher, hidden, &rows, fabric.device()).await?);
    }
    crate::cli::say(&if args.json { json(hidden, &measured) } else { table(hidden, &measured) });
    Ok(())
}

/// Of the GPU that is named, if one is.
fn fabric(args: &Args) -> Result<Option<Arc<dyn Fabric>>> {
    let Some(device) = &args.device else { return Ok(None) };
    let device: DeviceChoice = device.parse()?;
    let transport = if device == DeviceChoice::Cpu { Transport::Grpc } else { Transport::Nccl };
    let gpu = device.open(DtypeChoice::Bf16, Some(DEVICE_MEMORY))?;
    Ok(transport.open(Some(device.number()), gpu.as_ref(), false)?)
}

/// Bytes of a call: bf16 there, f32 back.
fn call_bytes(hidden: usize, rows: usize) -> (usize, usize) {
    (rows * hidden * size_of::<bf16>(), rows * hidden * size_of::<f32>())
}

fn table(hidden: usize, measured: &[Measured]) -> String {
    let mut text =
        format!("frames of rows of {hidden} values: bf16 there, f32 back; {AT_ONCE} calls at a time for GB/s\n\n");
    let _ = writeln!(
        text,
        "{:<6} {:>6} {:>10} {:>10} {:>10} {:>10} {:>8} {:>12}",
        "way", "rows", "there", "back", "p50", "p99", "GB/s", "planned"
    );
    for m in measured {
        let (there, back) = call_bytes(hidden, m.rows);
        let planned = 2.0 * PLANNED.1 + (there + back) as f64 / PLANNED.0;
        let us = |time: Duration| 1e6 * time.as_secs_f64();
        let _ = writeln!(
            text,
            "{:<6} {:>6} {:>7.1} kB {:>7.1} kB {:>7.0} us {:>7.0} us {:>8.2} {:>9.0} us",
            m.way,
            m.rows,
            there as f64 / 1e3,
            back as f64 / 1e3,
            us(m.p50),
            us(m.p99),
            m.bytes_per_s / 1e9,
            1e6 * planned
        );
    }
    text.push_str("\nplanned: two crossings of a network as the planner assumes it, 25 us and 35 GB/s each way\n");
    text
}

fn json(hidden: usize, measured: &[Measured]) -> String {
    let row = |m: &Measured| -> Value {
        json!({ "way": m.way, "rows": m.rows, "p50_s": m.p50.as_secs_f64(), "p99_s": m.p99.as_secs_f64(),
                "bytes_per_s": m.bytes_per_s })
    };
    format!("{:#}\n", json!({ "hidden": hidden, "rows": measured.iter().map(row).collect::<Vec<_>>() }))
}

/// Answers zeros.
struct Echo {
    hidden: usize,
    /// Where rows of lanes lie.
    device: Option<Device>,
    /// By outputs, and whether they are on the GPU.
    answers: Mutex<BTreeMap<(usize, bool), Values>>,
}

impl Echo {
    fn new(hidden: usize, device: Option<&Device>) -> Arc<Self> {
        Arc::new(Self { hidden, device: device.cloned(), answers: Mutex::default() })
    }

    fn zeros(&self, len: usize, there: bool) -> Values {
        let on_gpu = |device: &Device| {
            let zeros = device.zeros::<u8>(len * size_of::<f32>()).ok()?;
            device.finish().ok().map(|()| Values::There(GpuBytes::new(device, zeros)))
        };
        self.device.as_ref().filter(|_| there).and_then(on_gpu).unwrap_or_else(|| vec![0.0; len].into())
    }
}

impl ExpertHost for Echo {
    fn shape(&self) -> Shape {
        Shape { hidden: self.hidden, experts: 1 }
    }

    fn submit(&self, frame: RequestFrame, reply: ReplySender) {
        let (outputs, there) = (frame.output_count(), frame.activations().are_there());
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let answer =
            answers.entry((outputs, there)).or_insert_with(|| self.zeros(outputs * self.hidden, there)).clone();
        drop(answers);
        reply.send(Ok(answer));
    }
}

fn hello(role: Role, fabric: Option<&Arc<dyn Fabric>>) -> Result<Hello> {
    let id = if role == Role::ExpertWorker { "echo" } else { "bench" };
    let hello = handshake::hello("bench", role, &WorkerId::new(id)?, "", "bf16");
    Ok(Hello { nccl: nccl::version_of(fabric), ..hello })
}

fn dispatcher(hidden: usize, fabric: Option<Arc<dyn Fabric>>, hub: Option<Hub>, address: String) -> Result<Dispatcher> {
    let worker = WorkerId::new("echo")?;
    let config = DispatchConfig {
        hidden,
        experts: 1,
        groups: 1,
        source: 0,
        layer_deadline: UP_TIMEOUT,
        hello: hello(Role::AttentionWorker, fabric.as_ref())?,
        connector: Connector::default(),
        fabric,
        ops: CombineOps { first: combine_first, next: combine_next, add },
    };
    let dispatcher = Dispatcher::new(config, hub);
    let layers = BTreeMap::from([(LayerId(0), vec![vec![0]])]);
    let placement = Placement::new(Epoch(1), vec![worker.clone()], layers)?;
    let members = BTreeMap::from([(worker, Holder { address, epoch_loaded: Epoch(1) })]);
    dispatcher.set_view(Arc::new(placement), &members);
    Ok(dispatcher)
}

fn local(hidden: usize) -> Result<Dispatcher> {
    let hub = Hub::default();
    hub.insert(WorkerId::new("echo")?, Echo::new(hidden, None));
    dispatcher(hidden, None, Some(hub), "in this process".into())
}

/// With the process at the other end, which ends when it is dropped.
async fn remote(args: &Args, hidden: usize, fabric: Option<Arc<dyn Fabric>>) -> Result<(Dispatcher, Child)> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    command.args(["bench", "--transport", "all", "--echo", &hidden.to_string()]);
    if fabric.is_some() {
        let device = args.device.as_deref().unwrap_or_default();
        // Both ends may be on one GPU: NCCL connects them only if it takes them for different hosts.
        command.args(["--device", device]).env("NCCL_HOSTID", "echo").env(QUEUES, QUEUES_MAX.to_string());
    }
    let mut peer = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(peer.stdout.take().context("no standard output")?).lines();
    let address = lines.next_line().await?.context("the process at the other end has ended")?;
    let way = if fabric.is_some() { "nccl" } else { "grpc" };
    let dispatcher = dispatcher(hidden, fabric, None, address)?;
    let is_up = || dispatcher.reachable() && dispatcher.edges().iter().all(|edge| edge.transport == way);
    let deadline = Instant::now() + UP_TIMEOUT;
    while !is_up() {
        let states: Vec<String> = dispatcher.edges().into_iter().map(|edge| edge.detail).collect();
        ensure!(Instant::now() < deadline, "{way} is not up: {}", states.join(", "));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok((dispatcher, peer))
}

/// The process at the other end: says where it is, and lives until its standard input closes.
pub async fn echo(args: &Args, hidden: usize) -> Result<()> {
    let fabric = fabric(args)?;
    let bound = server::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    crate::cli::say(&format!("{}\n", bound.address()));
    let stop = CancellationToken::new();
    let hello = hello(Role::ExpertWorker, fabric.as_ref())?;
    let echo = Echo::new(hidden, fabric.as_ref().and_then(|fabric| fabric.device()));
    let routes = Routes::new(grpc::service(echo, fabric, hello, stop.clone()));
    roles::stop_when_stdin_closes(stop.clone());
    Ok(bound.serve(routes, None, stop, Duration::ZERO).await?)
}

/// Rows of a call, and where their sums go.
enum Side {
    Here(Vec<bf16>, Vec<f32>),
    There(Device, Buffer<u16>, Buffer<f32>, Box<[Option<Parcel>; 2]>),
}

impl Side {
    fn new(len: usize, device: Option<&Device>) -> Result<Self> {
        let x = vec![bf16::from_f32(0.5); len];
        let Some(device) = device else { return Ok(Self::Here(x, vec![0.0; len])) };
        let bits: Vec<u16> = x.iter().map(|x| x.to_bits()).collect();
        Ok(Self::There(device.clone(), device.buffer_of(&bits)?, device.buffer(len)?, Box::default()))
    }

    fn rows(&mut self) -> Rows<'_> {
        match self {
            Self::Here(x, _) => Rows::Bf16(x.clone()),
            Self::There(device, x, _, lists) => Rows::There(device, x.view(), &mut lists[0]),
        }
    }

    fn add_up(&mut self, addends: Addends, hidden: usize) -> Result<()> {
        let (device, y, list) = match self {
            Self::Here(_, y) => {
                addends.add_up(y);
                return Ok(());
            }
            Self::There(device, _, y, lists) => (device, y, &mut lists[1]),
        };
        let there =
            |answer| if let Values::There(bytes) = answer { Ok(bytes) } else { bail!("an answer came by the host") };
        let answers = addends.answers.into_iter().map(there).collect::<Result<Vec<_>>>()?;
        let recipe = &addends.recipe;
        cuda::add_up(device, &answers, recipe.addends(), recipe.ends(), hidden, list, y.view())?;
        Ok(device.finish()?)
    }
}

async fn measure(
    way: &'static str,
    dispatcher: &Dispatcher,
    hidden: usize,
    rows: &[usize],
    device: Option<&Device>,
) -> Result<Vec<Measured>> {
    let mut measured = Vec::new();
    for &rows in rows {
        let routes = vec![Route { expert: ExpertId(0), weight: 1.0 }; rows];
        let call = async |side: &mut Side, number: usize| -> Result<()> {
            let pending = dispatcher.dispatch(LayerId(0), number as u8, side.rows(), 1, &routes)?;
            side.add_up(pending.addends().await?, hidden)
        };
        let mut sides = (0..AT_ONCE).map(|_| Side::new(rows * hidden, device)).collect::<Result<Vec<_>>>()?;
        let mut times = Vec::new();
        let start = Instant::now();
        while times.len() < CALLS_MIN || start.elapsed() < TIME {
            let began = Instant::now();
            call(&mut sides[0], 0).await?;
            times.push(began.elapsed());
        }
        times.sort_unstable();
        let (start, mut calls) = (Instant::now(), 0);
        while calls < CALLS_MIN || start.elapsed() < TIME {
            try_join_all(sides.iter_mut().enumerate().map(|(number, side)| call(side, number))).await?;
            calls += AT_ONCE;
        }
        let (there, back) = call_bytes(hidden, rows);
        let bytes_per_s = (calls * (there + back)) as f64 / start.elapsed().as_secs_f64();
        let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        measured.push(Measured { way, rows, p50, p99, bytes_per_s });
    }
    // Frames of a lane that fails go over its stream.
    for edge in dispatcher.edges() {
        ensure!(edge.transport == way && edge.lane_failures == 0, "{way} has failed meanwhile: {}", edge.detail);
    }
    Ok(measured)
}
