//! Many seeds, on all processors, and what came of them.

use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Failure, Outcome, Plan, run};

/// Failures after which no more seeds are begun.
const FAILURES_MAX: usize = 20;

#[derive(Debug, Default)]
pub struct Report {
    pub seeds: usize,
    /// The sums.
    pub outcome: Outcome,
    pub failures: Vec<Failure>,
    pub took: Duration,
}

/// Runs the history of each seed.
pub fn run_all(seeds: Range<u64>, trace: bool) -> Report {
    let (next, report, begun) = (AtomicU64::new(seeds.start), Mutex::new(Report::default()), Instant::now());
    let work = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= seeds.end || report.lock().unwrap().failures.len() >= FAILURES_MAX {
            return;
        }
        let result = run_one(seed, trace);
        report.lock().unwrap().add(result);
    };
    let threads = if trace { 1 } else { std::thread::available_parallelism().map_or(1, usize::from) };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let mut report = report.into_inner().unwrap();
    report.failures.sort_by_key(|failure| failure.seed);
    Report { took: begun.elapsed(), ..report }
}

/// A panic is a failure too.
fn run_one(seed: u64, trace: bool) -> Result<Outcome, Failure> {
    let run = AssertUnwindSafe(|| run(Plan::of(seed), trace));
    catch_unwind(run).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
        let what = format!("panicked: {}", words.unwrap_or_default());
        Err(Failure { seed, at: Duration::ZERO, what })
    })
}

impl Report {
    fn add(&mut self, result: Result<Outcome, Failure>) {
        self.seeds += 1;
        match result {
            Ok(outcome) => {
                let sum = &mut self.outcome;
                sum.requests += outcome.requests;
                sum.tokens += outcome.tokens;
                sum.resumed += outcome.resumed;
                sum.events += outcome.events;
                sum.faults += outcome.faults;
                sum.placements += outcome.placements;
                sum.slots += outcome.slots;
                sum.lane_failures += outcome.lane_failures;
                sum.hash ^= outcome.hash;
            }
            Err(failure) => self.failures.push(failure),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in &self.failures {
            writeln!(f, "{failure}")?;
        }
        let Outcome { requests, tokens, resumed, events, faults, placements, slots, lane_failures, hash } =
            self.outcome;
        write!(f, "{} seeds, {} failed; {faults} faults, {placements} placements, ", self.seeds, self.failures.len())?;
        write!(f, "{requests} requests, {tokens} tokens, {resumed} streams resumed, ")?;
        write!(f, "{slots} slots and {lane_failures} failures of lanes; ")?;
        write!(f, "{events} events in {:.1} s (history {hash:016x})", self.took.as_secs_f64())
    }
}
