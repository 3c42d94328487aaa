//! Runs faults on clusters: a fresh cluster where the last one does not fit or is no longer whole, the undisturbed runs
//! that everything is compared to, and the load under which a fault is injected.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::LocalBoxFuture;
use tokio::time::{sleep, timeout};

use super::client::Policy;
use super::cluster::{Cluster, Shape};
use super::dice::Dice;
use super::guard::{Guard, quoted};
use super::judge::{Answer, Calm, History, Judgement, judge, p99};
use super::load::{self, Load};
use super::net::Net;
use super::options::Options;
use super::programs::Programs;
use super::report::{Outcome, Repeat, Row, all_within_bars, table};
use super::requests::{Request, requests};

/// How busy the cluster may be while the golden answers are made.
const GOLDEN_AT_A_TIME: usize = 4;
/// How long the undisturbed run is, at least.
const CALM: Duration = Duration::from_secs(8);
/// Longer than any fault takes.
const FAULT_MAX: Duration = Duration::from_secs(600);
/// When a fault begins: so many times as many tokens have arrived as all requests together have. By then each client
/// is somewhere else in its answer.
const MIDDLE: (f64, f64) = (1.0, 3.0);
/// How long the load goes on after a fault.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// Where this file is, the logs stay.
const TABLE: &str = "table.txt";

/// One thing that goes wrong, and how it is judged.
pub struct Fault {
    pub id: &'static str,
    pub what: &'static str,
    pub shape: Shape,
    pub run: for<'a> fn(&'a mut Bench) -> LocalBoxFuture<'a, Result<Outcome>>,
}

pub struct Bench {
    pub options: Options,
    pub dice: Dice,
    pub requests: Vec<Request>,
    pub golden: Vec<Answer>,
    /// Of the cluster that runs.
    pub calm: Calm,
    pub programs: Programs,
    cluster: Option<Cluster>,
    clusters: usize,
    logs: PathBuf,
    _guard: Guard,
    /// Why a cluster cannot have a network of its own here.
    no_net: Option<String>,
}

/// A run under load, with one fault in it.
pub struct Run {
    pub histories: Vec<History>,
    pub judgement: Judgement,
    /// From the start of the run to that of the fault.
    pub injected: Duration,
    /// To the end of the fault.
    pub healed: Duration,
}

impl Bench {
    pub async fn new(options: Options) -> Result<Self> {
        let mut guard = Guard::new()?;
        let logs = tempfile::Builder::new().prefix("moesaic-faults-").tempdir()?.keep();
        guard.at_end(&format!("test -e {} || rm -rf {}", quoted(&logs.join(TABLE)), quoted(&logs)))?;
        Ok(Self {
            dice: Dice::new(options.seed, ""),
            requests: requests(options.streams),
            golden: Vec::new(),
            calm: Calm::default(),
            programs: Programs::find()?,
            cluster: None,
            clusters: 0,
            logs,
            _guard: guard,
            no_net: Net::why_not().await,
            options,
        })
    }

    /// All repeats of one fault.
    pub async fn row(&mut self, fault: &Fault) -> Row {
        let mut repeats = Vec::new();
        for repeat in 0..self.options.repeats {
            let seed = self.options.seed + repeat as u64;
            eprintln!("{} {}: repeat {} of {}, seed {seed}", fault.id, fault.what, repeat + 1, self.options.repeats);
            self.dice = Dice::new(seed, fault.id);
            let outcome = match &self.no_net {
                Some(reason) if fault.shape.net => Repeat::Skipped(reason.clone()),
                _ => self.repeat(fault).await,
            };
            let ends_here = matches!(outcome, Repeat::Skipped(_));
            repeats.push(outcome);
            if ends_here {
                break;
            }
        }
        Row { fault: fault.id, what: fault.what, repeats }
    }

    async fn repeat(&mut self, fault: &Fault) -> Repeat {
        let run = async {
            self.prepare(&fault.shape).await?;
            let outcome = (fault.run)(self).await?;
            self.cluster().until_whole().await.context("after the fault")?;
            Ok::<_, anyhow::Error>(outcome)
        };
        let outcome = timeout(FAULT_MAX, run).await.map_err(|_| anyhow::anyhow!("not over after {FAULT_MAX:?}"));
        let repeat = match outcome.flatten() {
            Ok(outcome) => Repeat::Done(outcome.with_slack(self.options.slack)),
            Err(error) => Repeat::Broken(format!("{error:#}")),
        };
        if !matches!(&repeat, Repeat::Done(outcome) if outcome.passes()) {
            self.end_cluster().await;
        }
        repeat
    }

    async fn end_cluster(&mut self) {
        if let Some(cluster) = self.cluster.take() {
            cluster.end().await;
        }
    }

    /// A whole cluster of the shape, with its undisturbed runs done.
    async fn prepare(&mut self, shape: &Shape) -> Result<()> {
        if self.cluster.as_ref().is_some_and(|cluster| cluster.shape == *shape) {
            return self.cluster().until_whole().await.map(drop);
        }
        // Two at a time would be in each other's way.
        self.end_cluster().await;
        self.clusters += 1;
        let logs = self.logs.join(format!("cluster-{}", self.clusters));
        std::fs::create_dir(&logs)?;
        let cluster = Cluster::start(shape, &self.programs, logs).await.context("no cluster")?;
        let doors = cluster.doors()?;
        self.cluster = Some(cluster);
        if self.golden.is_empty() {
            let histories = load::each_once(&self.requests, doors.clone(), GOLDEN_AT_A_TIME).await?;
            let golden = histories.iter().map(|history| history.answer().0).collect::<Vec<_>>();
            expect_exact(&judge(&histories, &golden, &self.calm))?;
            for (request, answer) in self.requests.iter().zip(&golden) {
                let whole = !matches!(answer, Answer::Tokens(ids) if ids.len() != request.max_tokens as usize);
                ensure!(whole, "request {} has {} of {} tokens", request.index, answer.len(), request.max_tokens);
            }
            self.golden = golden;
        }
        let load = Load::start(&self.requests, doors, Policy::Firm)?;
        sleep(CALM).await;
        let histories = load.finish().await?;
        self.calm = Calm::of(&histories, self.requests.len());
        expect_exact(&judge(&histories, &self.golden, &self.calm))?;
        eprintln!(
            "  undisturbed: {:.0} tokens a second, 99 of 100 waits at most {:.0} ms",
            self.calm.rate,
            self.calm.all_p99.as_secs_f64() * 1e3
        );
        Ok(())
    }

    pub fn cluster(&mut self) -> &mut Cluster {
        self.cluster.as_mut().expect("a fault runs on a cluster")
    }

    /// Starts the load, injects the fault in its middle, and judges what the clients saw.
    pub async fn under_load<T>(
        &mut self,
        policy: Policy,
        fault: impl AsyncFnOnce(&mut Cluster, &Load) -> Result<T>,
    ) -> Result<(Run, T)> {
        let all: u32 = self.requests.iter().map(|request| request.max_tokens).sum();
        let middle = f64::from(all) * self.dice.between(MIDDLE.0, MIDDLE.1);
        let doors = self.cluster().doors()?;
        let load = Load::start(&self.requests, doors, policy)?;
        load.until_arrived(middle as usize).await?;
        let injected = load.doors.now();
        let result = Box::pin(fault(self.cluster(), &load)).await?;
        let healed = load.doors.now();
        sleep(AFTERWARDS).await;
        let histories = load.finish().await?;
        self.cluster().check().await?;
        Ok((self.judged(histories, injected, healed), result))
    }

    pub fn judged(&self, histories: Vec<History>, injected: Duration, healed: Duration) -> Run {
        let judgement = judge(&histories, &self.golden, &self.calm);
        Run { histories, judgement, injected, healed }
    }

    /// Ends everything. The logs stay if they are still of use, with the table among them.
    pub async fn end(mut self, rows: &[Row]) -> Result<()> {
        self.end_cluster().await;
        if !all_within_bars(rows) {
            std::fs::write(self.logs.join(TABLE), table(rows))?;
            eprintln!("logs: {}", self.logs.display());
        }
        Ok(())
    }
}

impl Run {
    /// Waits that ended while the fault lasted, of all clients together.
    pub fn wait_p99(&self) -> Duration {
        p99(self.histories.iter().flat_map(|history| history.waits_within(self.injected, self.healed)))
    }
}

fn expect_exact(judgement: &Judgement) -> Result<()> {
    ensure!(judgement.is_exact(), "the undisturbed run is not exact: {}", judgement.complaints.join("; "));
    Ok(())
}
