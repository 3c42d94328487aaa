//! What came of the faults: checks against bars, the worst of all repeats, and the table.

use serde::Serialize;

use super::judge::Judgement;

/// One measured figure beside its bar.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub what: &'static str,
    pub value: f64,
    pub bar: Bar,
    pub unit: &'static str,
    /// It compares rates, on a machine whose own rate moves: the median of the repeats has to hold, not each.
    pub by_median: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

/// Of one repeat.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    pub judgement: Judgement,
    pub checks: Vec<Check>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Repeat {
    Done(Outcome),
    /// The run itself broke: a process ended, the cluster did not become whole.
    Broken(String),
    /// This machine cannot do it.
    Skipped(String),
}

/// Of one fault.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub fault: &'static str,
    pub what: &'static str,
    pub repeats: Vec<Repeat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Pass,
    Fail,
    Skipped,
}

impl Check {
    pub fn holds(&self) -> bool {
        match self.bar {
            Bar::AtMost(most) => self.value <= most,
            Bar::AtLeast(least) => self.value >= least,
        }
    }

    /// How far on the wrong side: of two repeats the larger one counts.
    fn excess(&self) -> f64 {
        match self.bar {
            Bar::AtMost(most) => self.value - most,
            Bar::AtLeast(least) => least - self.value,
        }
    }

    fn bar_text(&self) -> String {
        let (sign, bound) = match self.bar {
            Bar::AtMost(most) => ("<=", most),
            Bar::AtLeast(least) => (">=", least),
        };
        format!("{} {sign} {}", self.what, figure(bound, self.unit))
    }
}

fn figure(value: f64, unit: &str) -> String {
    let digits = match value {
        whole if whole == whole.round() => 0,
        small if small.abs() < 0.1 => 3,
        _ => 2,
    };
    let space = if unit.is_empty() { "" } else { " " };
    format!("{value:.digits$}{space}{unit}")
}

impl Outcome {
    pub fn of(judgement: Judgement) -> Self {
        Self { judgement, ..Self::default() }
    }

    /// The bar of most faults.
    pub fn stall(self, most_s: f64) -> Self {
        let stall_s = self.judgement.stall_s;
        self.at_most("stall", stall_s, most_s, "s")
    }

    /// No coordinator has died: no client had to go on elsewhere.
    pub fn unresumed(self) -> Self {
        let resumed = self.judgement.resumed as f64;
        self.at_most("resumed", resumed, 0.0, "")
    }

    pub fn at_most(mut self, what: &'static str, value: f64, most: f64, unit: &'static str) -> Self {
        self.checks.push(Check { what, value, bar: Bar::AtMost(most), unit, by_median: false });
        self
    }

    pub fn at_least(mut self, what: &'static str, value: f64, least: f64, unit: &'static str) -> Self {
        self.checks.push(Check { what, value, bar: Bar::AtLeast(least), unit, by_median: false });
        self
    }

    /// The last check is held by the median of the repeats.
    pub fn by_median(mut self) -> Self {
        self.checks.iter_mut().last().expect("a check").by_median = true;
        self
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Bars of time and rate so many times as wide; those of counts as they are.
    pub fn with_slack(mut self, slack: f64) -> Self {
        for check in self.checks.iter_mut().filter(|check| !check.unit.is_empty()) {
            check.bar = match check.bar {
                Bar::AtMost(most) => Bar::AtMost(most * slack),
                Bar::AtLeast(least) => Bar::AtLeast(least / slack),
            };
        }
        self
    }

    /// But for what the median of the repeats decides.
    pub fn passes(&self) -> bool {
        self.judgement.is_exact() && self.checks.iter().all(|check| check.by_median || check.holds())
    }

    /// What stands under the table's row of a fault that fails.
    fn failures(&self) -> Vec<String> {
        let failing = self.checks.iter().filter(|check| !check.by_median && !check.holds());
        let checks = failing.map(|check| format!("{}: {}", check.bar_text(), figure(check.value, check.unit)));
        checks.chain(self.judgement.complaints.iter().cloned()).chain(self.notes.iter().cloned()).collect()
    }
}

impl Row {
    pub fn verdict(&self) -> Verdict {
        let verdict = |repeat: &Repeat| match repeat {
            Repeat::Done(outcome) if outcome.passes() => Verdict::Pass,
            Repeat::Done(_) | Repeat::Broken(_) => Verdict::Fail,
            Repeat::Skipped(_) => Verdict::Skipped,
        };
        let of_all = if self.medians().iter().all(Check::holds) { Verdict::Pass } else { Verdict::Fail };
        let verdicts: Vec<Verdict> = self.repeats.iter().map(verdict).chain([of_all]).collect();
        [Verdict::Fail, Verdict::Skipped].into_iter().find(|bad| verdicts.contains(bad)).unwrap_or(Verdict::Pass)
    }

    /// For who watches.
    pub fn told(&self) -> String {
        let first = self.details().into_iter().next();
        first.map_or_else(|| format!("{:?}", self.verdict()), |detail| format!("{:?}: {detail}", self.verdict()))
    }

    /// The checks that the repeats' median decides, each with it.
    fn medians(&self) -> Vec<Check> {
        let first = self.outcomes().next();
        let checks = first.iter().flat_map(|outcome| &outcome.checks).filter(|check| check.by_median);
        let median = |check: &Check| {
            let same = self.outcomes().flat_map(|outcome| &outcome.checks).filter(|other| other.what == check.what);
            let mut values: Vec<f64> = same.map(|check| check.value).collect();
            values.sort_by(f64::total_cmp);
            Check { value: values[values.len() / 2], ..check.clone() }
        };
        checks.map(median).collect()
    }

    fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        self.repeats.iter().filter_map(|repeat| match repeat {
            Repeat::Done(outcome) => Some(outcome),
            Repeat::Broken(_) | Repeat::Skipped(_) => None,
        })
    }

    /// The worst of all repeats, of each figure by itself.
    fn cells(&self) -> [String; 9] {
        let most = |figure: fn(&Judgement) -> usize| {
            self.outcomes().map(|outcome| figure(&outcome.judgement)).max().map_or("-".into(), |n| n.to_string())
        };
        let stall = self.outcomes().map(|outcome| outcome.judgement.stall_s).reduce(f64::max);
        [
            self.fault.into(),
            self.what.into(),
            most(|judgement| judgement.streams),
            most(|judgement| judgement.lost),
            most(|judgement| judgement.changed),
            most(|judgement| judgement.repeated),
            stall.map_or("-".into(), |stall| format!("{stall:.2} s")),
            self.bars(),
            match self.verdict() {
                Verdict::Pass => "pass".into(),
                Verdict::Fail => "FAIL".into(),
                Verdict::Skipped => "SKIPPED".into(),
            },
        ]
    }

    fn bars(&self) -> String {
        let Some(first) = self.outcomes().next() else { return "-".into() };
        let worst = |check: &Check| {
            let same = self.outcomes().flat_map(|outcome| &outcome.checks).filter(|other| other.what == check.what);
            let worst = same.max_by(|a, b| a.excess().total_cmp(&b.excess())).expect("the check itself is one");
            let is_stall = worst.what == "stall";
            let median = self.medians().into_iter().find(|median| median.what == check.what);
            let value = match median {
                _ if is_stall => String::new(),
                Some(median) if self.repeats.len() > 1 => {
                    let (median, worst) = (figure(median.value, worst.unit), figure(worst.value, worst.unit));
                    format!(" ({median} in the median, {worst} at worst)")
                }
                _ => format!(" ({})", figure(worst.value, worst.unit)),
            };
            format!("{}{value}", worst.bar_text())
        };
        let bars: Vec<String> = first.checks.iter().map(worst).collect();
        if bars.is_empty() { "exact".into() } else { bars.join(", ") }
    }

    fn details(&self) -> Vec<String> {
        let of = |(i, repeat): (usize, &Repeat)| {
            let lines = match repeat {
                Repeat::Done(outcome) if outcome.passes() => outcome.notes.clone(),
                Repeat::Done(outcome) => outcome.failures(),
                Repeat::Broken(reason) | Repeat::Skipped(reason) => vec![reason.clone()],
            };
            lines.into_iter().map(move |line| format!("{} repeat {}: {line}", self.fault, i + 1)).collect::<Vec<_>>()
        };
        let medians = self.medians().into_iter().filter(|median| !median.holds());
        let medians = medians.map(|median| {
            format!("{} in the median: {}: {}", self.fault, median.bar_text(), figure(median.value, median.unit))
        });
        self.repeats.iter().enumerate().flat_map(of).chain(medians).collect()
    }
}

const HEAD: [&str; 9] =
    ["fault", "what", "streams", "lost", "changed", "repeated", "worst stall", "bar (measured)", "verdict"];

/// The table, and below it what is to be said of rows that did not pass.
pub fn table(rows: &[Row]) -> String {
    let lines: Vec<[String; 9]> = std::iter::once(HEAD.map(str::to_owned)).chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let line = |cells: &[String; 9]| {
        let cells: Vec<String> = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text: String = lines.iter().map(line).collect();
    for detail in rows.iter().flat_map(Row::details) {
        text.push_str(&format!("{detail}\n"));
    }
    text
}

pub fn json(rows: &[Row]) -> serde_json::Value {
    let row = |row: &Row| {
        serde_json::json!({
            "fault": row.fault, "what": row.what, "verdict": row.verdict(), "repeats": row.repeats,
        })
    };
    rows.iter().map(row).collect()
}

/// Exit code 0: what could be done passed.
pub fn all_within_bars(rows: &[Row]) -> bool {
    rows.iter().all(|row| row.verdict() != Verdict::Fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(lost: usize, stall_s: f64) -> Repeat {
        let judgement = Judgement { streams: 32, lost, stall_s, ..Judgement::default() };
        Repeat::Done(Outcome::of(judgement).stall(0.4).at_least("throughput", 0.97 - stall_s, 0.5, "x"))
    }

    fn row(repeats: Vec<Repeat>) -> Row {
        Row { fault: "F1", what: "kill -9 an expert worker", repeats }
    }

    #[test]
    fn verdicts() {
        let skipped = || Repeat::Skipped("no root".into());
        let cases = [
            (vec![done(0, 0.4)], Verdict::Pass),
            (vec![done(0, 0.1), done(0, 0.41)], Verdict::Fail),
            (vec![done(0, 0.1), done(1, 0.1)], Verdict::Fail),
            (vec![Repeat::Broken("e0 has ended".into())], Verdict::Fail),
            (vec![skipped()], Verdict::Skipped),
            (vec![skipped(), done(1, 0.0)], Verdict::Fail),
        ];
        for (repeats, expect) in cases {
            let row = row(repeats);
            assert_eq!(row.verdict(), expect, "{row:?}");
            assert_eq!(all_within_bars(&[row]), expect != Verdict::Fail);
        }
    }

    #[test]
    fn rates_are_held_by_the_median_of_the_repeats() {
        let of = |rate: f64, lost: usize| {
            let judgement = Judgement { streams: 32, lost, ..Judgement::default() };
            Repeat::Done(Outcome::of(judgement).at_least("rate", rate, 0.9, "x").by_median())
        };
        let slow_once = row(vec![of(0.5, 0), of(0.95, 0), of(1.1, 0)]);
        assert_eq!(slow_once.verdict(), Verdict::Pass);
        assert_eq!(slow_once.cells()[7], "rate >= 0.90 x (0.95 x in the median, 0.50 x at worst)");
        assert_eq!(
            row(vec![of(0.95, 0), of(0.95, 1), of(0.95, 0)]).verdict(),
            Verdict::Fail,
            "a lost stream is no rate"
        );
        let slow = row(vec![of(0.5, 0), of(0.85, 0), of(1.1, 0)]);
        assert_eq!(slow.verdict(), Verdict::Fail);
        assert_eq!(slow.details(), ["F1 in the median: rate >= 0.90 x: 0.85 x"]);
        assert_eq!(row(vec![of(0.5, 0)]).verdict(), Verdict::Fail);
    }

    #[test]
    fn a_row_has_the_worst_of_its_repeats() {
        let row = row(vec![done(0, 0.25), done(2, 0.125), done(0, 0.375)]);
        let cells = row.cells();
        assert_eq!(cells[2..7], ["32", "2", "0", "0", "0.38 s"]);
        assert_eq!(cells[7], "stall <= 0.40 s, throughput >= 0.50 x (0.59 x)");
        assert_eq!(cells[8], "FAIL");
    }

    #[test]
    fn the_table_says_what_failed() {
        let text =
            table(&[row(vec![done(0, 0.1)]), row(vec![done(0, 0.5)]), row(vec![Repeat::Skipped("no root".into())])]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("fault  what"), "{text}");
        assert_eq!(lines.len(), 4 + 2 + 1, "{text}");
        assert!(lines[1].ends_with("pass") && lines[2].ends_with("FAIL") && lines[3].ends_with("SKIPPED"), "{text}");
        assert_eq!(lines[4], "F1 repeat 1: stall <= 0.40 s: 0.50 s");
        assert_eq!(lines[5], "F1 repeat 1: throughput >= 0.50 x: 0.47 x");
        assert_eq!(lines[6], "F1 repeat 1: no root");
    }
}
