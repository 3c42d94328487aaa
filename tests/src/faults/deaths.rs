//! Faults of processes that die: expert workers, attention workers, coordinators, etcd.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::{Instant, sleep};

use super::bench::{Bench, Run};
use super::client::{Doors, Policy};
use super::cluster::{ATTENTION_WORKERS, COORDINATORS, Cluster, ETCDS, EXPERT_WORKERS};
use super::judge::{History, rate};
use super::load::Load;
use super::report::Outcome;
use super::requests::request;

/// How long what was killed stays away.
const AWAY: Duration = Duration::from_secs(2);
const BOTH_AWAY: Duration = Duration::from_secs(3);
/// What the demo model's context holds, less one token for the answer.
const PROMPT_MAX: usize = 4000;
const LEADER_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);
/// How long the rate is measured at most before etcd is killed.
const ETCD_BEFORE_MAX: Duration = Duration::from_secs(20);

/// F1: another holder of its experts gives the same answers.
pub async fn expert_worker(bench: &mut Bench) -> Result<Outcome> {
    let victim = bench.dice.pick(&EXPERT_WORKERS);
    let fault = async |cluster: &mut Cluster, _: &_| {
        cluster.kill(victim).await?;
        sleep(AWAY).await;
        cluster.restart(victim)?;
        cluster.until_whole().await
    };
    let (run, _) = bench.under_load(Policy::Firm, fault).await?;
    Ok(Outcome::of(run.judgement).stall(0.4).unresumed())
}

/// F2: each in turn, and every expert has two copies again soon after.
pub async fn each_expert_worker(bench: &mut Bench) -> Result<Outcome> {
    let victims = bench.dice.shuffled(&EXPERT_WORKERS);
    let fault = async |cluster: &mut Cluster, _: &_| {
        let mut slowest = Duration::ZERO;
        for victim in victims {
            cluster.kill(victim).await?;
            sleep(AWAY).await;
            cluster.restart(victim)?;
            slowest = slowest.max(cluster.until_whole().await?);
        }
        Ok(slowest)
    };
    let (run, slowest) = bench.under_load(Policy::Firm, fault).await?;
    let most = bench.cluster().load_time + Duration::from_secs(2);
    let outcome = Outcome::of(run.judgement).stall(0.4).unresumed();
    Ok(outcome.at_most("whole again", slowest.as_secs_f64(), most.as_secs_f64(), "s"))
}

/// F4: two at once, and with them both copies of some experts. Requests wait, and go on when one is back.
pub async fn both_holders(bench: &mut Bench) -> Result<Outcome> {
    let victims = bench.dice.shuffled(&EXPERT_WORKERS);
    let fault = async |cluster: &mut Cluster, _: &_| {
        let mut dead = 2;
        for victim in &victims[..dead] {
            cluster.kill(victim).await?;
        }
        let mut lost = experts_lost(cluster, BOTH_AWAY).await?;
        // They may have had no expert in common.
        if lost == Some(0) {
            cluster.kill(victims[dead]).await?;
            dead += 1;
            lost = experts_lost(cluster, BOTH_AWAY).await?;
        }
        for victim in &victims[..dead] {
            cluster.restart(victim)?;
            sleep(BOTH_AWAY).await;
        }
        cluster.until_whole().await?;
        Ok(lost)
    };
    let (run, lost) = bench.under_load(Policy::Patient, fault).await?;
    let outcome = Outcome::of(run.judgement);
    Ok(match lost {
        Some(lost) => outcome.at_least("experts lost", f64::from(lost), 1.0, ""),
        None => outcome.note("no coordinator says how many experts are lost"),
    })
}

/// The most that coordinators miss within a time; None where they do not say.
async fn experts_lost(cluster: &Cluster, time: Duration) -> Result<Option<u32>> {
    let end = Instant::now() + time;
    let mut most = None;
    while Instant::now() < end {
        most = most.max(cluster.view().await?.statuses().map(|status| status.experts_lost).max());
        sleep(POLL).await;
    }
    Ok(most)
}

/// F5: its sequences are computed again elsewhere, from prompts and emitted tokens. The bar counts that in: it is
/// measured as one fresh prompt of as many tokens.
pub async fn attention_worker(bench: &mut Bench) -> Result<Outcome> {
    let victim = bench.dice.pick(&ATTENTION_WORKERS);
    let fault = async |cluster: &mut Cluster, _: &_| {
        let view = cluster.view().await?;
        let load = view.loads.iter().find(|(name, _)| *name == victim).and_then(|(_, load)| load.as_ref().ok());
        let sequences = load.map_or(0, |load| load.sequences_running);
        cluster.kill(victim).await?;
        sleep(AWAY).await;
        cluster.restart(victim)?;
        cluster.until_whole().await?;
        Ok(sequences as usize)
    };
    let (run, sequences) = bench.under_load(Policy::Firm, fault).await?;
    let tokens = tokens_of_longest_waits(bench, &run, sequences);
    let cold = cold_prefill(bench, tokens.clamp(1, PROMPT_MAX)).await?;
    let outcome = Outcome::of(run.judgement).unresumed().stall(0.5 + 1.3 * cold.as_secs_f64());
    let lost = format!("{sequences} sequences of {tokens} tokens lost their worker; their prefill takes {cold:?}");
    Ok(outcome.note(lost))
}

/// Tokens of the answers that waited longest when the fault came: those that lost their worker.
fn tokens_of_longest_waits(bench: &Bench, run: &Run, sequences: usize) -> usize {
    let mut waits: Vec<_> = run.histories.iter().filter_map(|h| Some((h.wait_at(run.injected)?, h))).collect();
    waits.sort_by_key(|(wait, _)| std::cmp::Reverse(*wait));
    let tokens =
        |(_, history): &(_, &History)| bench.requests[history.request].prompt.len() + history.arrived_by(run.injected);
    waits.iter().take(sequences).map(tokens).sum()
}

async fn cold_prefill(bench: &mut Bench, tokens: usize) -> Result<Duration> {
    let doors = Doors::new(bench.cluster().doors()?)?;
    let history = doors.ask(&request(0, tokens, 1), 0, Policy::Firm).await;
    ensure!(history.arrivals.len() == 1, "a prompt of {tokens} tokens: {:?}", history.end);
    Ok(history.arrivals[0].at - history.sent)
}

/// F6: clients go on at the other coordinator, which takes the lead.
pub async fn leading_coordinator(bench: &mut Bench) -> Result<Outcome> {
    let fault = async |cluster: &mut Cluster, _: &_| {
        let leader = cluster.view().await?.leader().map(str::to_owned);
        let victim = COORDINATORS.into_iter().find(|name| leader.as_deref() == Some(name)).unwrap_or(COORDINATORS[0]);
        cluster.kill(victim).await?;
        let followed = match leader {
            Some(_) => Some(until_led_by_another(cluster, victim).await?),
            None => None,
        };
        sleep(AWAY).await;
        cluster.restart(victim)?;
        cluster.until_whole().await?;
        Ok(followed)
    };
    let (run, new_leader) = bench.under_load(Policy::Firm, fault).await?;
    let resumed = run.judgement.resumed as f64;
    let outcome = Outcome::of(run.judgement).stall(4.0).at_least("resumed", resumed, 1.0, "");
    Ok(match new_leader {
        Some(after) => outcome.at_most("new leader", after.as_secs_f64(), 4.0, "s"),
        None => outcome.note("no coordinator says who leads"),
    })
}

async fn until_led_by_another(cluster: &Cluster, victim: &str) -> Result<Duration> {
    let begin = Instant::now();
    while cluster.view().await?.leader().is_none_or(|leader| leader == victim) {
        ensure!(begin.elapsed() < LEADER_MAX, "no other coordinator leads after {LEADER_MAX:?}");
        sleep(POLL).await;
    }
    Ok(begin.elapsed())
}

/// F10: all of etcd away. Old and new requests are served on the last view, as fast as before.
pub async fn etcd(bench: &mut Bench) -> Result<Outcome> {
    let outage = Duration::from_secs(if bench.options.short { 15 } else { 60 });
    let fault = async |cluster: &mut Cluster, load: &Load| {
        sleep(outage.min(ETCD_BEFORE_MAX)).await;
        for name in ETCDS {
            cluster.kill(name).await?;
        }
        let down = load.doors.now();
        sleep(outage).await;
        let back = load.doors.now();
        for name in ETCDS {
            cluster.restart(name)?;
        }
        Ok((down, back, cluster.until_whole().await?))
    };
    let (run, (down, back, normal)) = bench.under_load(Policy::Firm, fault).await?;
    let share = rate(&run.histories, Some((down, back))) / rate(&run.histories, Some((run.injected, down)));
    let outcome = Outcome::of(run.judgement).unresumed();
    let outcome = outcome.at_least("throughput", share, 0.95, "x").by_median();
    Ok(outcome.at_most("normal again", normal.as_secs_f64(), 5.0, "s"))
}
