//! Faults that clients bring: too many, gone, too slow, or more than the cache holds.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::bench::Bench;
use super::client::{Doors, Policy};
use super::cluster::{ATTENTION_WORKERS, COORDINATORS, Cluster, Shape};
use super::judge::{End, History, Refusal, p99, rate};
use super::load::Load;
use super::report::Outcome;
use super::requests::request;
use super::view::View;

/// F18's: what is too much is refused early.
pub const OVERLOADED: Shape = Shape { bounded: true, sequences_max: 32, ..Shape::PLAIN };
/// F22's: a few sequences at a time.
pub const SMALL_CACHE: Shape = Shape { cache_tokens: 1024, ..Shape::PLAIN };

/// How many times more comes than can be served.
const OVERLOAD: f64 = 10.0;
/// A machine's own speed moves within a minute: so too much and as much as can be served come in turn, so many times.
const OVERLOADS: usize = 5;
const PEAK: Duration = Duration::from_secs(6);
/// What the first answers take to come is no part of the rate.
const RAMP: Duration = Duration::from_secs(2);
const BACK_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
const MIB: f64 = (1 << 20) as f64;

/// F18: ten times more than can be served, from clients who do not wait for answers. What is accepted is served as fast
/// as before and after, in the median of the turns; the rest is refused at once, and memory stays within what was
/// announced.
pub async fn overload(bench: &mut Bench) -> Result<Outcome> {
    let time = Duration::from_secs(if bench.options.short { 6 } else { 12 });
    let limits = bound_memory(bench.cluster())?;
    let (mut histories, mut shares, mut normal) = (Vec::new(), Vec::new(), Duration::ZERO);
    let mut peak = peak_rate(bench).await?;
    for _ in 0..OVERLOADS {
        let doors = Doors::shared(bench.cluster().doors()?)?;
        let clients = offer(bench, &doors, time, OVERLOAD * peak).await?;
        normal = normal.max(until_served(&doors).await?);
        let answers = clients.join_all().await;
        let before = std::mem::replace(&mut peak, peak_rate(bench).await?);
        shares.push(rate(&answers, Some((RAMP, time))) * 2.0 / (before + peak));
        histories.extend(answers);
    }
    shares.sort_unstable_by(f64::total_cmp);
    let goodput = shares[OVERLOADS / 2];
    bench.cluster().check().await?;

    let refusals: Vec<_> = histories.iter().filter_map(refusal).collect();
    let refused = p99(refusals.iter().map(|refusal| refusal.after)).as_secs_f64();
    let unsaid = refusals.iter().filter(|refusal| !refusal.has_retry_after).count();
    let refused_count = refusals.len() as f64;
    let accepted: Vec<History> = histories.iter().filter(|history| refusal(history).is_none()).cloned().collect();
    let cluster = bench.cluster();
    let share = limits.iter().map(|(name, limit)| Ok(cluster.memory_peak(name)? as f64 / *limit as f64));
    let share = share.collect::<Result<Vec<_>>>()?.into_iter().fold(0.0, f64::max);
    let kills: u64 = cluster.groups.values().map(|group| group.kills()).sum::<Result<u64>>()?;
    let no_groups = cluster.no_groups.clone();

    let run = bench.judged(accepted, Duration::ZERO, time);
    let outcome = Outcome::of(run.judgement)
        .unresumed()
        .at_least("goodput", goodput, 0.9, "x")
        .by_median()
        .at_least("refused", refused_count, 1.0, "")
        .at_most("p99 refusal", refused, 0.05, "s")
        .at_most("no retry-after", unsaid as f64, 0.0, "")
        .at_most("memory of its bound", share, 1.0, "x")
        .at_most("killed for memory", kills as f64, 0.0, "")
        .at_most("normal again", normal.as_secs_f64(), 5.0, "s");
    Ok(match no_groups {
        Some(reason) => outcome.note(format!("memory is only looked at: {reason}")),
        None => outcome,
    })
}

fn refusal(history: &History) -> Option<&Refusal> {
    match &history.end {
        End::Refused(refusal) => Some(refusal),
        End::Finished | End::Failed(_) => None,
    }
}

/// Tokens a second with as many clients as are let in.
async fn peak_rate(bench: &mut Bench) -> Result<f64> {
    let clients = bench.cluster().shape.sequences_max * COORDINATORS.len();
    let requests: Vec<_> = bench.requests.iter().cycle().take(clients).cloned().collect();
    let load = Load::start(&requests, bench.cluster().doors()?, Policy::Firm)?;
    sleep(PEAK).await;
    Ok(rate(&load.finish().await?, None))
}

/// Clients come so often that all their answers would be `tokens` a second, whatever becomes of those before.
async fn offer(bench: &Bench, doors: &Doors, time: Duration, tokens: f64) -> Result<JoinSet<History>> {
    let all = bench.requests.iter().map(|request| f64::from(request.max_tokens)).sum::<f64>();
    let between = Duration::from_secs_f64(all / bench.requests.len() as f64 / tokens);
    let mut clients = JoinSet::new();
    let mut next = doors.begin;
    for number in 0.. {
        next += between;
        if next > doors.begin + time {
            break;
        }
        sleep_until(next).await;
        let (doors, request) = (doors.clone(), bench.requests[number % bench.requests.len()].clone());
        clients.spawn(async move { doors.ask(&request, number, Policy::Firm).await });
    }
    Ok(clients)
}

/// How long it takes until a new client is served.
async fn until_served(doors: &Doors) -> Result<Duration> {
    let begin = Instant::now();
    loop {
        let history = doors.ask(&request(0, 8, 1), 0, Policy::Firm).await;
        match history.end {
            End::Finished => return Ok(begin.elapsed()),
            end => ensure!(begin.elapsed() < BACK_MAX, "a new client after {BACK_MAX:?}: {end:?}"),
        }
        sleep(POLL).await;
    }
}

/// What each attention worker may hold: what it has announced and what any process of its kind needs, and a tenth.
fn bound_memory(cluster: &Cluster) -> Result<Vec<(&'static str, u64)>> {
    let bound = |name| {
        let log = cluster.log(name)?;
        let (weights, rest) = announced(&log).with_context(|| format!("{name} announces no memory"))?;
        let base = cluster.base[name].saturating_sub(weights);
        let limit = (weights + rest + base) / 10 * 11;
        if let Some(group) = cluster.groups.get(name) {
            group.limit(limit)?;
        }
        Ok((name, limit))
    };
    ATTENTION_WORKERS.into_iter().map(bound).collect()
}

/// Bytes of weights, and of what is taken later, from the log: "weights 3.1 MiB, steps 8.2 MiB, latent cache 25.0 MiB".
fn announced(log: &str) -> Option<(u64, u64)> {
    let line = log.lines().find(|line| line.contains("latent cache "))?;
    let after = |name: &str| line.split_once(name)?.1.split_whitespace().next()?.parse::<f64>().ok();
    let bytes = |mib: f64| (mib * MIB) as u64;
    Some((bytes(after("weights ")?), bytes(after("steps ")? + after("latent cache ")?)))
}

/// F19: half of the clients are gone in the middle of their answers. What they held is free within a second.
pub async fn vanishing_clients(bench: &mut Bench) -> Result<Outcome> {
    let clients = bench.requests.len();
    let (gone, stay) = (clients.div_ceil(2), clients / 2);
    let fault = async |cluster: &mut Cluster, load: &Load| {
        load.vanish(gone);
        // Each of the others has one sequence at a time.
        until(cluster, |view| view.sequences() as usize <= stay).await
    };
    let (run, sequences) = bench.under_load(Policy::Firm, fault).await?;
    let pages = until(bench.cluster(), |view| view.sequences() == 0 && view.pages_taken() == 0).await?;
    let outcome = Outcome::of(run.judgement).unresumed();
    let outcome = outcome.at_most("sequences back", sequences.as_secs_f64(), 1.0, "s");
    Ok(outcome.at_most("pages back", pages.as_secs_f64(), 1.0, "s"))
}

async fn until(cluster: &Cluster, holds: impl Fn(&View) -> bool) -> Result<Duration> {
    let begin = Instant::now();
    while !holds(&cluster.view().await?) {
        ensure!(begin.elapsed() < BACK_MAX, "sequences or pages are still held after {BACK_MAX:?}");
        sleep(POLL).await;
    }
    Ok(begin.elapsed())
}

/// F20: four clients read a byte a second. Nobody else waits longer than when they read as fast as they can: both in turn,
/// and the median of the turns, as one wait in a hundred moves by more than the bar from one turn to the next.
pub async fn slow_readers(bench: &mut Bench) -> Result<Outcome> {
    const TIME: Duration = Duration::from_secs(3);
    const TURNS: usize = 11;
    let fault = async |cluster: &mut Cluster, load: &Load| {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let begin = load.doors.now();
            read_long_answers(cluster, TIME, Duration::ZERO).await?;
            let middle = load.doors.now();
            read_long_answers(cluster, TIME, Duration::from_secs(1)).await?;
            turns.push([begin, middle, load.doors.now()]);
        }
        Ok(turns)
    };
    let (run, turns) = bench.under_load(Policy::Firm, fault).await?;
    let wait = |side: usize| {
        let of_turn = |turn: &[Duration; 3]| {
            let [from, to] = [turn[side], turn[side + 1]];
            p99(run.histories.iter().flat_map(|history| history.waits_within(from, to)))
        };
        let mut waits: Vec<Duration> = turns.iter().map(of_turn).collect();
        waits.sort_unstable();
        waits[TURNS / 2].as_secs_f64()
    };
    let share = wait(1) / wait(0).max(f64::MIN_POSITIVE);
    Ok(Outcome::of(run.judgement).unresumed().at_most("p99 wait of others", share, 1.1, "x").by_median())
}

/// Some clients of long answers with many bytes, with a pause after each byte, or none at all.
async fn read_long_answers(cluster: &Cluster, time: Duration, pause: Duration) -> Result<()> {
    const READERS: usize = 4;
    let doors = cluster.doors()?;
    let mut readers = JoinSet::new();
    for number in 0..READERS {
        let door = doors[number % doors.len()].trim_start_matches("http://").to_owned();
        readers.spawn(async move { read_long_answer(&door, number, pause).await });
    }
    sleep(time).await;
    match readers.try_join_next() {
        Some(ended) => ended?.context("a reader"),
        None => Ok(()),
    }
}

/// Raw, so that nothing reads ahead.
async fn read_long_answer(door: &str, number: usize, pause: Duration) -> Result<()> {
    const TOKENS: usize = 3000;
    let mut body = request(number, 16, TOKENS).http();
    body["logprobs"] = 20.into();
    let body = body.to_string();
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut connection = socket.connect(door.parse()?).await?;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: faults\r\ncontent-type: application/json\r\n";
    let length = body.len();
    connection.write_all(format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes()).await?;
    let mut status = [0; 12];
    connection.read_exact(&mut status).await?;
    ensure!(status.ends_with(b" 200"), "{}", String::from_utf8_lossy(&status));
    let mut bytes = vec![0; if pause.is_zero() { 1 << 16 } else { 1 }];
    while connection.read(&mut bytes).await? > 0 {
        sleep(pause).await;
    }
    Ok(())
}

/// F22: less cache than the sequences need. They give way to each other, and all end, with the same tokens.
pub async fn small_cache(bench: &mut Bench) -> Result<Outcome> {
    let before = bench.cluster().view().await?.preemptions();
    let fault = async |_: &mut Cluster, _: &_| {
        sleep(Duration::from_secs(8)).await;
        Ok(())
    };
    let (run, ()) = bench.under_load(Policy::Firm, fault).await?;
    let preemptions = bench.cluster().view().await?.preemptions() - before;
    Ok(Outcome::of(run.judgement).unresumed().at_least("preemptions", preemptions as f64, 1.0, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_as_it_is_announced() {
        let log = "starting\nINFO memory plan=weights 2.0 MiB, steps 1.0 MiB, latent cache 1.5 MiB (16384 tokens in 256 pages)\n";
        assert_eq!(announced(log), Some((2 << 20, 5 << 19)));
        assert_eq!(announced("nothing"), None);
    }
}
