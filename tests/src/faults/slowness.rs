//! Faults of an expert worker that is late, or silent, and lives.

use std::time::Duration;

use anyhow::Result;
use tokio::time::{Instant, sleep};

use super::bench::Bench;
use super::client::Policy;
use super::cluster::{Cluster, EXPERT_WORKERS};
use super::report::Outcome;

const FROZEN: Duration = Duration::from_secs(10);
const SLOW: Duration = Duration::from_secs(8);
/// A tenth of the time it runs.
const STOPPED: Duration = Duration::from_millis(90);
const RUNNING: Duration = Duration::from_millis(10);

/// F3: frozen for ten seconds, then thawed: its late answers count for nothing.
pub async fn frozen(bench: &mut Bench) -> Result<Outcome> {
    let victim = bench.dice.pick(&EXPERT_WORKERS);
    let fault = async |cluster: &mut Cluster, _: &_| {
        let mut signals = cluster.signals(victim)?;
        signals.send("STOP").await?;
        sleep(FROZEN).await;
        signals.send("CONT").await?;
        cluster.until_whole().await
    };
    let (run, _) = bench.under_load(Policy::Firm, fault).await?;
    Ok(Outcome::of(run.judgement).stall(1.0).unresumed())
}

/// F12: ten times slower. Others take its work, without much work done twice.
pub async fn slow(bench: &mut Bench) -> Result<Outcome> {
    let victim = bench.dice.pick(&EXPERT_WORKERS);
    let fault = async |cluster: &mut Cluster, _: &_| {
        let mut signals = cluster.signals(victim)?;
        let before = cluster.view().await?.dispatch();
        let end = Instant::now() + SLOW;
        while Instant::now() < end {
            signals.send("STOP").await?;
            sleep(STOPPED).await;
            signals.send("CONT").await?;
            sleep(RUNNING).await;
        }
        Ok(before.zip(cluster.view().await?.dispatch()))
    };
    let (run, dispatch) = bench.under_load(Policy::Firm, fault).await?;
    let (wait, usual) = (run.wait_p99().as_secs_f64(), bench.calm.all_p99.as_secs_f64());
    let outcome = Outcome::of(run.judgement).unresumed().at_most("p99 wait", wait, 2.0 * usual, "s");
    Ok(match dispatch {
        Some((before, after)) => {
            let (hedged, all) = (after.terms_hedged - before.terms_hedged, after.terms - before.terms);
            outcome.at_most("work done twice", hedged as f64 / all.max(1) as f64, 0.05, "x")
        }
        None => outcome.note("attention workers do not count what they send"),
    })
}
