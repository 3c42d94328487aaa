//! What operators do on purpose, or by mistake, while requests run.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use moesaic_proto::v1::admin_client::AdminClient;
use moesaic_proto::v1::{CordonRequest, ExpertStatus, RebalanceRequest};
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;

use super::bench::Bench;
use super::client::Policy;
use super::cluster::{ATTENTION_WORKERS, COORDINATORS, Cluster, DRAIN_MAX, EXPERT_WORKERS};
use super::report::Outcome;
use super::view;

const DRAINED_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// How long a worker with a broken checkpoint is watched.
const WATCHED: Duration = Duration::from_secs(4);
/// One more than there are.
const EXTRA_WORKER: &str = "e9";

/// F16: every process is stopped and started again, one after the other.
pub async fn rolling_update(bench: &mut Bench) -> Result<Outcome> {
    let fault = async |cluster: &mut Cluster, _: &_| {
        let (mut bad, mut slowest) = (Vec::new(), Duration::ZERO);
        for name in [&EXPERT_WORKERS[..], &ATTENTION_WORKERS, &COORDINATORS].into_iter().flatten() {
            let begin = Instant::now();
            match cluster.terminate(name).await {
                Ok(status) if status.success() => {}
                Ok(status) => bad.push(format!("{name} ended with {status}")),
                Err(error) => bad.push(format!("{error:#}")),
            }
            slowest = slowest.max(begin.elapsed());
            cluster.restart(name)?;
            cluster.until_whole().await?;
        }
        Ok((bad, slowest))
    };
    let (run, (bad, slowest)) = bench.under_load(Policy::Patient, fault).await?;
    let outcome = Outcome::of(run.judgement).stall(0.2);
    let outcome = outcome.at_most("drain", slowest.as_secs_f64(), DRAIN_MAX.as_secs_f64(), "s");
    let outcome = outcome.at_most("ended badly", bad.len() as f64, 0.0, "");
    Ok(bad.into_iter().fold(outcome, Outcome::note))
}

/// F17: the experts are placed anew; then a worker is emptied, and filled again.
pub async fn placement(bench: &mut Bench) -> Result<Outcome> {
    let worker = bench.dice.pick(&EXPERT_WORKERS);
    let fault = async |cluster: &mut Cluster, _: &_| {
        let mut admin = AdminClient::<Channel>::new(view::channel(&cluster.door(COORDINATORS[0])?).await?);
        let cordon = |cordoned| CordonRequest { worker: worker.into(), cordoned, drain: cordoned };
        admin.rebalance(RebalanceRequest { dry_run: false }).await.context("rebalance")?;
        cluster.until_whole().await?;
        admin.cordon(cordon(true)).await.context("cordon")?;
        until_empty(cluster, worker).await?;
        admin.cordon(cordon(false)).await.context("uncordon")?;
        admin.rebalance(RebalanceRequest { dry_run: false }).await.context("rebalance")?;
        cluster.until_whole().await
    };
    let (run, _) = bench.under_load(Policy::Firm, fault).await?;
    Ok(Outcome::of(run.judgement).stall(0.2).unresumed())
}

async fn until_empty(cluster: &Cluster, worker: &str) -> Result<()> {
    let begin = Instant::now();
    loop {
        let view = cluster.view().await?;
        let is_it = |state: &&ExpertStatus| state.id == worker;
        let mut states = view.statuses().filter_map(|status| status.experts.iter().find(is_it));
        if states.all(|state| state.experts == 0) {
            return Ok(());
        }
        ensure!(begin.elapsed() < DRAINED_MAX, "{worker} still has experts after {DRAINED_MAX:?}");
        sleep(POLL).await;
    }
}

/// F23: one more expert worker, whose checkpoint is cut short. It says so, serves nothing and disturbs nobody.
pub async fn broken_checkpoint(bench: &mut Bench) -> Result<Outcome> {
    let copy = tempfile::tempdir_in(&bench.cluster().logs)?;
    cut_short(&bench.programs.model, copy.path())?;
    let fault = async |cluster: &mut Cluster, _: &_| {
        cluster.add_expert_worker(EXTRA_WORKER, copy.path())?;
        cluster.restart(EXTRA_WORKER)?;
        let begin = Instant::now();
        let mut serves = false;
        while begin.elapsed() < WATCHED {
            if let Some(status) = cluster.ended(EXTRA_WORKER).await? {
                return Ok((status.success() || serves, cluster.log(EXTRA_WORKER)?));
            }
            let loaded = |worker: &&ExpertStatus| worker.id == EXTRA_WORKER && worker.epoch_loaded > 0;
            serves |= cluster.view().await?.statuses().any(|status| status.experts.iter().any(|w| loaded(&w)));
            sleep(POLL).await;
        }
        cluster.kill(EXTRA_WORKER).await?;
        Ok((serves, cluster.log(EXTRA_WORKER)?))
    };
    let (run, (serves, log)) = bench.under_load(Policy::Firm, fault).await?;
    let named = log.lines().any(|line| line.contains("model.safetensors") && !line.starts_with("=="));
    let outcome = Outcome::of(run.judgement).stall(0.2).unresumed();
    let outcome = outcome.at_most("serves", f64::from(u8::from(serves)), 0.0, "");
    Ok(outcome.at_least("error names the file", f64::from(u8::from(named)), 1.0, ""))
}

/// A copy of a checkpoint's folder with half of its tensors' bytes.
fn cut_short(model: &Path, copy: &Path) -> Result<()> {
    for entry in std::fs::read_dir(model)? {
        let entry = entry?;
        let target = copy.join(entry.file_name());
        let bytes = std::fs::copy(entry.path(), &target)?;
        if target.extension().is_some_and(|extension| extension == "safetensors") {
            std::fs::File::options().write(true).open(&target)?.set_len(bytes / 2)?;
        }
    }
    Ok(())
}
