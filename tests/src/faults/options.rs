//! The command line.

use anyhow::{Context, Result, bail};

pub const USAGE: &str = "usage: faults [F1 F5 ..] [--repeat N] [--streams N] [--seed S] [--short] [--slack N] [--json] [--list]

Starts a cluster of processes, injects the faults that are named (all if none is) under load, and prints what clients saw.
  --repeat N   how often each; the worst of all counts (1)
  --streams N  clients at a time (32)
  --seed S     of all chance (1)
  --short      long faults last some seconds only
  --slack N    bars of time and rate are N times as wide: for a machine that others use too (1)
  --json       every repeat, as JSON
  --list       only say what faults there are";

#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Ids in upper case; all if empty.
    pub faults: Vec<String>,
    pub repeats: usize,
    pub streams: usize,
    pub seed: u64,
    pub short: bool,
    pub slack: f64,
    pub json: bool,
    pub list: bool,
}

impl Options {
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            faults: Vec::new(),
            repeats: 1,
            streams: 32,
            seed: 1,
            short: false,
            slack: 1.0,
            json: false,
            list: false,
        };
        while let Some(argument) = arguments.next() {
            let mut number = || {
                let value = arguments.next().with_context(|| format!("{argument} needs a number"))?;
                value.parse::<u64>().with_context(|| format!("{argument} {value}: not a number"))
            };
            match argument.as_str() {
                "--repeat" => options.repeats = number()?.max(1) as usize,
                "--streams" => options.streams = number()?.max(1) as usize,
                "--seed" => options.seed = number()?,
                "--short" => options.short = true,
                "--slack" => options.slack = number()?.max(1) as f64,
                "--json" => options.json = true,
                "--list" => options.list = true,
                flag if flag.starts_with('-') => bail!("{USAGE}"),
                fault => options.faults.push(fault.to_uppercase()),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line() {
        let parse = |line: &str| Options::parse(line.split_whitespace().map(str::to_owned));
        let options = parse("f1 F5 --repeat 3 --short --seed 9").unwrap();
        assert_eq!(options.faults, ["F1", "F5"]);
        assert_eq!((options.repeats, options.streams, options.seed, options.short), (3, 32, 9, true));
        assert!(parse("--repeat").is_err() && parse("--repeat x").is_err() && parse("--what").is_err());
    }
}
