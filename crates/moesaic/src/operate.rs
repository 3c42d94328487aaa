//! What operators ask of a running cluster: status, cordon, drain, rebalance. Each is one call of the Admin service.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use moesaic_node::stop;
use moesaic_proto::v1::admin_client::AdminClient;
use moesaic_proto::v1::{
    AttentionStatus, CordonRequest, EdgeState, ExpertStatus, LoadResponse, RebalanceRequest, StatusRequest,
    StatusResponse,
};
use tokio::time::sleep;
use tonic::Status;

use crate::cli::{BadArguments, say};
use crate::server::{Door, Server};

/// Clears a terminal and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    server: Server,
    /// Every edge between attention and expert workers
    #[arg(long)]
    edges: bool,
}

#[derive(Debug, clap::Args)]
pub struct TopArgs {
    #[command(flatten)]
    status: StatusArgs,
    /// Seconds between two looks
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    every: f64,
}

#[derive(Debug, clap::Args)]
pub struct WorkerArgs {
    /// The worker's id
    worker: String,
    #[command(flatten)]
    server: Server,
}

#[derive(Debug, clap::Args)]
pub struct RebalanceArgs {
    #[command(flatten)]
    server: Server,
    /// Only say what it would come to
    #[arg(long)]
    dry_run: bool,
}

pub async fn status(args: StatusArgs) -> Result<()> {
    let status = client(&args.server).await?.status(StatusRequest {}).await.map_err(refused)?.into_inner();
    say(&described(&status, args.edges));
    match status.not_ready.is_empty() {
        true => Ok(()),
        false => bail!("no token could be produced: {}", status.not_ready),
    }
}

/// The status over and over, in place on a terminal, until Ctrl-C.
pub async fn top(args: TopArgs) -> Result<()> {
    let every = Duration::try_from_secs_f64(args.every).ok().filter(|every| !every.is_zero());
    let every = every.ok_or_else(|| BadArguments(format!("--every is {}; expected seconds above 0", args.every)))?;
    let stop = stop::on_signals()?;
    let mut client = client(&args.status.server).await?;
    let mut before: Option<(Instant, StatusResponse)> = None;
    let watch = async {
        loop {
            let (now, status) = (Instant::now(), client.status(StatusRequest {}).await.map_err(refused)?.into_inner());
            let mut text = described(&status, args.status.edges);
            if let Some((then, before)) = &before {
                text.push_str(&rates(before, &status, now - *then));
            }
            if !status.not_ready.is_empty() {
                let _ = writeln!(text, "not ready {}", status.not_ready);
            }
            say(&if std::io::stdout().is_terminal() { format!("{CLEAR}{text}") } else { format!("{text}\n") });
            before = Some((now, status));
            sleep(every).await;
        }
    };
    stop.run_until_cancelled(watch).await.unwrap_or(Ok(()))
}

/// What attention workers have done between two looks.
fn rates(before: &StatusResponse, now: &StatusResponse, time: Duration) -> String {
    let mut text = String::new();
    for worker in &now.attention {
        let last = before.attention.iter().find(|last| last.id == worker.id).and_then(|last| last.load.as_ref());
        let (Some(load), Some(last)) = (&worker.load, last) else { continue };
        let rows = load.micro_batch_rows.saturating_sub(last.micro_batch_rows);
        let batches = load.micro_batches.saturating_sub(last.micro_batches);
        let _ = writeln!(
            text,
            "rate      {}: {:.0} rows a second, {:.1} in a micro-batch",
            worker.id,
            rows as f64 / time.as_secs_f64(),
            if batches == 0 { 0.0 } else { rows as f64 / batches as f64 },
        );
    }
    text
}

pub async fn cordon(args: WorkerArgs, cordoned: bool, drain: bool) -> Result<()> {
    let request = CordonRequest { worker: args.worker.clone(), cordoned, drain };
    client(&args.server).await?.cordon(request).await.map_err(refused)?;
    let done = match (cordoned, drain) {
        (true, true) => "is being drained: `moesaic status` shows when it holds nothing",
        (true, false) => "gets nothing new",
        (false, _) => "is in use",
    };
    say(&format!("{} {done}\n", args.worker));
    Ok(())
}

pub async fn rebalance(args: RebalanceArgs) -> Result<()> {
    let request = RebalanceRequest { dry_run: args.dry_run };
    let answer = client(&args.server).await?.rebalance(request).await.map_err(refused)?.into_inner();
    let verb = if args.dry_run { "would be" } else { "is" };
    say(&match answer.moved {
        0 => format!("nothing moves: the busiest worker has {:.2} of the mean\n", answer.imbalance_before),
        moved => format!(
            "epoch {} {verb} placed: workers load {moved} experts, and the busiest one has {:.2} of the mean instead of \
             {:.2}\n",
            answer.epoch, answer.imbalance_after, answer.imbalance_before
        ),
    });
    Ok(())
}

async fn client(server: &Server) -> Result<AdminClient<Door>> {
    Ok(AdminClient::new(server.connect().await?))
}

/// A status in words.
fn refused(status: Status) -> anyhow::Error {
    anyhow!("{}", status.message())
}

fn described(status: &StatusResponse, with_edges: bool) -> String {
    let mut text = String::new();
    let leader = match (status.leader.is_empty(), status.registry_reachable) {
        (false, _) => format!("{} leads (term {})", status.leader, status.term),
        (true, true) => "nobody leads".into(),
        (true, false) => "the registry is away, the last view is in force".into(),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "cluster   {leader}; {} sequences at {}", status.sequences, status.coordinator);
    let _ = match status.epoch {
        0 => writeln!(text, "experts   not placed yet"),
        epoch => writeln!(
            text,
            "experts   epoch {epoch}; {} have no live holder, {} have fewer than they should",
            status.experts_lost, status.experts_exposed
        ),
    };
    for worker in &status.attention {
        let _ = writeln!(text, "attention {}", attention(worker));
        if with_edges {
            worker.load.iter().for_each(|load| edges(load, &mut text));
        }
    }
    for worker in &status.experts {
        let _ = writeln!(text, "experts   {}", experts(worker, status.epoch));
    }
    text
}

fn attention(worker: &AttentionStatus) -> String {
    let mark = if worker.cordoned { ", cordoned" } else { "" };
    let head = format!("{} on {} at {}{mark}", worker.id, worker.node, worker.address);
    let Some(load) = &worker.load else { return format!("{head}: does not answer") };
    let state = match (load.draining, load.experts_reachable) {
        (true, _) => "draining",
        (_, false) => "does not reach every expert",
        _ => "ready",
    };
    let dispatch = load.dispatch.unwrap_or_default();
    format!(
        "{head}: {state}, {} running, {} waiting, {} of {} pages free, epoch {}; frames {} sent, {} ahead, {} resent, {} hedged",
        load.sequences_running,
        load.sequences_waiting,
        load.pages_free,
        load.pages_total,
        load.epoch,
        dispatch.sent,
        dispatch.ahead,
        dispatch.resent,
        dispatch.hedged,
    )
}

fn edges(load: &LoadResponse, text: &mut String) {
    let ms = |microseconds: u32| f64::from(microseconds) / 1000.0;
    for edge in &load.edges {
        let state = match edge.state() {
            EdgeState::Live => "live",
            EdgeState::Slow => "slow",
            EdgeState::Silent => "silent",
            EdgeState::Down | EdgeState::Unspecified => "down",
        };
        let detours = [
            (edge.hedged, "hedged"),
            (edge.resent, "sent again"),
            (edge.steered, "rows steered around it"),
            (edge.lane_failures, "lanes failed"),
        ];
        let detours = detours.into_iter().filter(|(count, _)| *count > 0);
        let detours: String = detours.map(|(count, what)| format!(", {count} {what}")).collect();
        let _ = writeln!(
            text,
            "            -> {} by {}: {state} ({}), {} rows answered, {:.2} ms a frame (p50 {:.2}, p99 {:.2}), {:.1} MB out, {:.1} MB \
             back{detours}",
            edge.worker,
            edge.transport,
            edge.detail,
            edge.terms,
            ms(edge.answer_us),
            ms(edge.answer_p50_us),
            ms(edge.answer_p99_us),
            edge.sent_bytes as f64 / 1e6,
            edge.received_bytes as f64 / 1e6,
        );
    }
}

fn experts(worker: &ExpertStatus, epoch: u32) -> String {
    let marks = [(worker.cordoned, ", cordoned"), (worker.draining, ", draining")];
    let marks: String = marks.into_iter().filter(|(is, _)| *is).map(|(_, mark)| mark).collect();
    let slots = if worker.slots == 0 { String::new() } else { format!(" of {} that fit", worker.slots) };
    let state = if worker.epoch_loaded >= epoch { "loaded" } else { "loading" };
    let ExpertStatus { id, node, address, experts, epoch_loaded, .. } = worker;
    format!("{id} on {node} at {address}{marks}: holds {experts}{slots}, {state} (epoch {epoch_loaded})")
}
