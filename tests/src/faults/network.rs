//! Faults of the network between processes that are well.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use moesaic_proto::v1::EdgeState;
use tokio::time::{Instant, sleep};

use super::bench::Bench;
use super::client::Policy;
use super::cluster::{ATTENTION_WORKERS, COORDINATORS, Cluster, EXPERT_WORKERS};
use super::net::Net;
use super::report::Outcome;

const CUT: Duration = Duration::from_secs(4);
const CUT_FROM_COORDINATOR: Duration = Duration::from_secs(5);
const LOSSY: Duration = Duration::from_secs(10);
const HEAL_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

fn net(cluster: &Cluster) -> Result<&Net> {
    cluster.net.as_ref().context("this cluster has no network of its own")
}

/// F8: one attention worker and one expert worker do not hear each other; then only one of them does not, then only
/// the other.
pub async fn attention_from_expert(bench: &mut Bench) -> Result<Outcome> {
    let (a, e) = (bench.dice.pick(&ATTENTION_WORKERS), bench.dice.pick(&EXPERT_WORKERS));
    let fault = async |cluster: &mut Cluster, _: &_| {
        let mut slowest = None;
        for cuts in [&[(a, e), (e, a)][..], &[(a, e)], &[(e, a)]] {
            for (from, to) in cuts {
                net(cluster)?.cut(from, to).await?;
            }
            sleep(CUT).await;
            net(cluster)?.heal().await?;
            slowest = slowest.max(until_live(cluster, a, e).await?);
            cluster.until_whole().await?;
        }
        Ok(slowest)
    };
    let (run, heals) = bench.under_load(Policy::Firm, fault).await?;
    let outcome = Outcome::of(run.judgement).stall(1.0).unresumed();
    Ok(match heals {
        Some(heals) => outcome.at_most("heals", heals.as_secs_f64(), 2.0, "s"),
        None => outcome.note("attention workers do not say whom they reach"),
    })
}

/// How long the way from one to the other takes to be used again; None where nobody says.
async fn until_live(cluster: &Cluster, from: &str, to: &str) -> Result<Option<Duration>> {
    let begin = Instant::now();
    loop {
        match cluster.view().await?.edge(from, to) {
            None => return Ok(None),
            Some(EdgeState::Live | EdgeState::Slow) => return Ok(Some(begin.elapsed())),
            Some(state) => ensure!(begin.elapsed() < HEAL_MAX, "{from} to {to} is {state:?} after {HEAL_MAX:?}"),
        }
        sleep(POLL).await;
    }
}

/// F9: a coordinator and an attention worker do not hear each other for a while. What was made meanwhile arrives once.
pub async fn coordinator_from_attention(bench: &mut Bench) -> Result<Outcome> {
    let (c, a) = (bench.dice.pick(&COORDINATORS), bench.dice.pick(&ATTENTION_WORKERS));
    let fault = async |cluster: &mut Cluster, _: &_| {
        net(cluster)?.cut(c, a).await?;
        net(cluster)?.cut(a, c).await?;
        sleep(CUT_FROM_COORDINATOR).await;
        net(cluster)?.heal().await?;
        cluster.until_whole().await
    };
    let (run, _) = bench.under_load(Policy::Firm, fault).await?;
    // As long as the cut, and what F8 gives a way to heal.
    Ok(Outcome::of(run.judgement).stall(CUT_FROM_COORDINATOR.as_secs_f64() + 2.0).unresumed())
}

/// F13: one packet of twenty vanishes, everywhere.
pub async fn loss(bench: &mut Bench) -> Result<Outcome> {
    let fault = async |cluster: &mut Cluster, _: &_| {
        net(cluster)?.lose(5).await?;
        sleep(LOSSY).await;
        net(cluster)?.heal().await
    };
    let (run, ()) = bench.under_load(Policy::Firm, fault).await?;
    let wait = run.wait_p99().as_secs_f64();
    Ok(Outcome::of(run.judgement).unresumed().at_most("p99 wait", wait, 0.5, "s"))
}
