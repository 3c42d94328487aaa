//! Runs the simulated cluster: `--seeds 0..1000` (as a table at the end), or `--seed 7 --trace` (one history, event by event).

use std::ops::Range;
use std::process::ExitCode;

use moesaic_tests::sim::{self, Plan};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((seeds, trace)) = parse(&arguments) else {
        eprintln!("usage: sim [--seeds FROM..TO | --seed N] [--trace]");
        return ExitCode::from(2);
    };
    let report = sim::run_all(seeds, trace);
    println!("{report}");
    if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(arguments: &[String]) -> Option<(Range<u64>, bool)> {
    let (mut seeds, mut trace) = (0..1000, false);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--trace" => trace = true,
            "--seed" => {
                let seed: u64 = rest.next()?.parse().ok()?;
                println!("{:#?}", Plan::of(seed));
                seeds = seed..seed + 1;
            }
            "--seeds" => {
                let (from, to) = rest.next()?.split_once("..")?;
                seeds = from.parse().ok()?..to.parse().ok()?;
            }
            _ => return None,
        }
    }
    Some((seeds, trace))
}
