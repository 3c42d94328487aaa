//! `moesaic bench`: how fast this machine serves a model, and how near that is to what the machine could do at most.
//!
//! It starts the same cluster as `up`, in this process, sends it work as a coordinator or a client would, and measures
//! the machine's roofs (read bandwidth, rate of multiply-adds) in the same run. Reading order: `load` (the work),
//! `roofline` (what it takes at least), `report` (the tables). `rank` measures one GPU's share of a model that is too large
//! for one machine, `ways` what frames take between workers.

mod load;
pub mod rank;
mod report;
mod roofline;
mod ways;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use moesaic_attention_worker::engine::profile::Counts;
use moesaic_kernels::cuda::GpuRoof;
use moesaic_kernels::{Backend, DtypeChoice, Pool, Roof};
use moesaic_model::Config;
use moesaic_proto::v1::Role;

use crate::here::{self, Profiles};
use crate::node;
use crate::plan::Plan;
use crate::up::{self, Cluster};
use load::{Load, Measured};
use report::{Report, Row};
use roofline::Roofline;

/// Tokens that a decode run may generate beyond those that are counted, while the last prompts are prefilled.
const DECODE_SLACK: usize = 64;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The checkpoint's folder; the demo model tiny-r1 if not given
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// f32; bf16, by the faster of bf16-fma and bf16-dp on a processor, or one of these;
    /// int8, on a processor
    #[arg(long, default_value = "bf16", value_parser = DtypeChoice::NAMES)]
    dtype: String,
    /// Threads of the kernels; all cores if not given
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Expert workers
    #[arg(long, value_name = "M", default_value_t = 1)]
    expert_workers: usize,
    /// How rows reach the experts: local (called) or grpc (over loopback sockets). all: measure the ways themselves, by the
    /// rows of a frame
    #[arg(long, default_value = "local", value_parser = ["local", "grpc", "all"])]
    transport: String,
    /// Be the other end of what `--transport all` measures, for rows of so many values
    #[arg(long, hide = true)]
    echo: Option<usize>,
    /// Prefill: lengths of prompts
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pp: Vec<usize>,
    /// Decode: tokens to generate in each sequence
    #[arg(long, value_name = "N")]
    tg: Option<usize>,
    /// Decode: sequences at a time
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Decode: tokens in the context before the first generated one
    #[arg(long, value_name = "N", default_value_t = 16)]
    ctx: usize,
    /// Serving over HTTP: clients at a time
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    streams: Vec<usize>,
    /// Serving: tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    input: usize,
    /// Serving: tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 128)]
    output: usize,
    /// Times that each test is run; the median is shown
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// Show where a step's time goes
    #[arg(long)]
    layers: bool,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Measure one rank's share of a model on a GPU, with random weights: expert or attention (with --batch and --ctx)
    #[arg(long, value_name = "ROLE", value_parser = ["expert", "attention"], requires = "config")]
    rank: Option<String>,
    /// Of --rank and of --transport all: the model's config.json
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Of --rank expert: ranks that share the experts
    #[arg(long, value_name = "N", default_value_t = 16)]
    ep: usize,
    /// Of --rank expert: rows of each expert; of --transport all: of a frame
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    rows: Vec<usize>,
    /// What is measured: auto, cpu or cuda:N; cpu if not given, and cuda:0 with --rank
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
}

pub async fn run(mut args: Args) -> Result<()> {
    if let Some(role) = args.rank.clone() {
        return tokio::task::spawn_blocking(move || rank::run(&args, &role)).await?;
    }
    if let Some(hidden) = args.echo {
        return ways::echo(&args, hidden).await;
    }
    if args.transport == "all" {
        return ways::run(&args).await;
    }
    if args.pp.is_empty() && args.tg.is_none() && args.streams.is_empty() {
        (args.pp, args.tg, args.batch) = (vec![512], Some(64), vec![1, 4, 16]);
    }
    let began = Instant::now();
    let plan = Plan::new(cluster(&args))?;
    ensure!(args.runs > 0, "--runs is 0; expected at least 1");
    let profiles = Profiles::default();
    let Cluster { mut nodes, membership, address } =
        here::start_profiled(&plan, profiles.clone(), args.transport == "local").await?;
    tokio::select! {
        () = up::until_ready(&membership, address) => {}
        failure = node::first_failure(&mut nodes) => return Err(failure),
    }
    let ready = began.elapsed();
    let worker = membership.registry.view().borrow().of_role(Role::AttentionWorker).next().cloned();
    let load = Load::connect(&worker.context("the attention worker has left")?, &plan, address).await?;

    let backend = plan.backend.clone();
    let roof = tokio::task::spawn_blocking(move || roof(&backend, plan.threads)).await??;
    let mut report = Report::new(&plan, &args.transport, args.expert_workers, roof, ready);
    let roofline = Roofline::new(&plan.checkpoint, plan.numerics(), roof)?;
    for test in tests(&args) {
        let mut runs = Vec::new();
        for _ in 0..args.runs {
            let mut before = Sample::take(&profiles);
            let measured = test.run(&load, || before = Sample::take(&profiles)).await?;
            runs.push((measured, Sample::take(&profiles).since(&before)));
        }
        runs.sort_by(|a, b| a.0.tokens_per_s.total_cmp(&b.0.tokens_per_s));
        let spread = (runs[0].0.tokens_per_s, runs[runs.len() - 1].0.tokens_per_s);
        let (measured, sample) = runs.swap_remove(runs.len() / 2);
        let least = roofline.seconds_per_token(&test, &sample.steps);
        report.push(Row { test, share: least.map(|least| least * measured.tokens_per_s), spread, measured, sample });
    }
    report.finish();
    crate::cli::say(&if args.json { report.json() } else { report.table(args.layers) });
    drop((load, membership));
    node::stop_all(nodes).await
}

impl Args {
    /// The model that `--config` names, if it does.
    fn model_config(&self) -> Result<Option<Config>> {
        let read = |file: &PathBuf| Config::read_file(file).map_err(|mut problems| problems.swap_remove(0));
        Ok(self.config.as_ref().map(read).transpose()?)
    }
}

/// Of what computes.
fn roof(backend: &Backend, threads: usize) -> Result<Roof> {
    Ok(match backend {
        Backend::Cpu(..) => Roof::measure(&Pool::new(threads)),
        Backend::Gpu(device) => {
            let GpuRoof { copy, fma } = GpuRoof::measure(device)?;
            let fma = fma.context("the roof of a GPU's products is cuBLASLt's: install it, or set LD_LIBRARY_PATH")?;
            Roof { threads, read: copy, fma, bf16: fma, int8: fma }
        }
    })
}

/// A test of the list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Test {
    Prefill { tokens: usize },
    Decode { batch: usize, context: usize, tokens: usize },
    Serve { streams: usize, input: usize, output: usize },
}

impl Test {
    /// `begin` is called when counting begins, where that is not at once.
    async fn run(&self, load: &Load, begin: impl FnOnce()) -> Result<Measured> {
        match *self {
            Self::Prefill { tokens } => load.prefill(tokens).await,
            Self::Decode { batch, context, tokens } => load.decode(batch, context, tokens, slack(batch), begin).await,
            Self::Serve { streams, input, output } => load.serve(streams, input, output).await,
        }
    }
}

/// What was counted during a run.
#[derive(Clone, Debug)]
pub struct Sample {
    pub steps: Counts,
    pub experts_busy: std::time::Duration,
}

impl Sample {
    fn take(profiles: &Profiles) -> Self {
        Self { steps: profiles.attention.counts(), experts_busy: profiles.experts.busy() }
    }

    fn since(&self, before: &Self) -> Self {
        Self { steps: self.steps.since(&before.steps), experts_busy: self.experts_busy - before.experts_busy }
    }
}

fn tests(args: &Args) -> Vec<Test> {
    let prefill = args.pp.iter().map(|&tokens| Test::Prefill { tokens });
    let decode = args
        .tg
        .iter()
        .flat_map(|&tokens| args.batch.iter().map(move |&batch| Test::Decode { batch, context: args.ctx, tokens }));
    let serve = args.streams.iter().map(|&streams| Test::Serve { streams, input: args.input, output: args.output });
    prefill.chain(decode).chain(serve).collect()
}

/// As `up` would be called, with a cache that holds the largest test.
fn cluster(args: &Args) -> up::Args {
    let tokens = |test: &Test| match *test {
        Test::Prefill { tokens } => tokens + 1,
        Test::Decode { batch, context, tokens } => batch * (context + tokens + slack(batch) + 64),
        Test::Serve { streams, input, output } => streams * (input + output + 64),
    };
    let cache_tokens = tests(args).iter().map(tokens).max().unwrap_or(1);
    up::Args {
        model: args.model.clone(),
        listen: ([127, 0, 0, 1], 0).into(),
        dtype: args.dtype.clone(),
        device: args.device.clone().unwrap_or_else(|| "cpu".into()),
        device_memory: None,
        transport: "auto".into(),
        attention_workers: 1,
        expert_workers: args.expert_workers,
        replicas: 1,
        processes: false,
        registry: None,
        traces: None,
        cluster: None,
        tls: None,
        keys: None,
        allow_anyone: false,
        threads: args.threads,
        cache_tokens: Some(cache_tokens),
        memory: None,
    }
}

/// The first sequences of a batch decode while the others' prompts are prefilled.
fn slack(batch: usize) -> usize {
    DECODE_SLACK + 4 * batch
}
