//! The tables, and the same as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use moesaic_attention_worker::engine::profile::Part;
use moesaic_kernels::Roof;
use serde_json::{Value, json};

use super::load::Measured;
use super::{Sample, Test};
use crate::plan::{Plan, megabytes};

pub struct Report {
    model: String,
    numerics: String,
    experts: String,
    roof: Roof,
    ready: Duration,
    memory: u64,
    rows: Vec<Row>,
}

/// One test: the median run.
pub struct Row {
    pub test: Test,
    pub measured: Measured,
    /// Of the roof.
    pub share: Option<f64>,
    /// The slowest and the fastest run, tokens a second.
    pub spread: (f64, f64),
    pub sample: Sample,
}

impl Report {
    pub fn new(plan: &Plan, transport: &str, expert_workers: usize, roof: Roof, ready: Duration) -> Self {
        Self {
            model: plan.checkpoint.name().to_owned(),
            numerics: format!("{} on {}", plan.backend.numerics(), plan.device()),
            experts: format!("{expert_workers} expert workers, {transport}"),
            roof,
            ready,
            memory: 0,
            rows: Vec::new(),
        }
    }

    pub fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// When all is measured.
    pub fn finish(&mut self) {
        self.memory = peak_memory().unwrap_or(0);
    }

    pub fn table(&self, layers: bool) -> String {
        let roof = &self.roof;
        let mut text = format!(
            "{}, {}, {}\nroof: reads {:.1} GB/s, {:.0} GFLOP/s ({:.0} in f32, {:.0} in INT8); ready after {:.2} s; peak memory {}\n\n",
            self.model,
            self.numerics,
            self.experts,
            roof.read / 1e9,
            2.0 * roof.bf16 / 1e9,
            2.0 * roof.fma / 1e9,
            2.0 * roof.int8 / 1e9,
            self.ready.as_secs_f64(),
            megabytes(self.memory),
        );
        let _ = writeln!(text, "{:<28} {:>10} {:>17} {:>8}", "test", "tokens/s", "(min-max)", "of roof");
        for row in &self.rows {
            let share = row.share.map_or(String::new(), |share| format!("{:.0} %", 100.0 * share));
            let spread = format!("({:.1}-{:.1})", row.spread.0, row.spread.1);
            let _ =
                writeln!(text, "{:<28} {:>10.1} {:>17} {:>8}", row.name(), row.measured.tokens_per_s, spread, share);
            if let Test::Serve { .. } = row.test {
                let ms = |times: &[Duration], share| 1e3 * percentile(times, share).as_secs_f64();
                let (first, gaps) = (&row.measured.first_token, &row.measured.gaps);
                let _ = writeln!(
                    text,
                    "{:<28} first token p50 {:.0} ms, p95 {:.0} ms; gap p50 {:.1} ms, p95 {:.1} ms, p99 {:.1} ms",
                    "",
                    ms(first, 0.5),
                    ms(first, 0.95),
                    ms(gaps, 0.5),
                    ms(gaps, 0.95),
                    ms(gaps, 0.99),
                );
            }
            if layers {
                text.push_str(&row.layers());
            }
        }
        text
    }

    pub fn json(&self) -> String {
        let roof = json!({
            "threads": self.roof.threads, "read_bytes_per_s": self.roof.read, "flops": 2.0 * self.roof.bf16,
            "flops_f32": 2.0 * self.roof.fma, "flops_int8": 2.0 * self.roof.int8,
        });
        let all = json!({
            "model": self.model, "numerics": self.numerics, "experts": self.experts, "roof": roof,
            "ready_s": self.ready.as_secs_f64(), "peak_memory_bytes": self.memory,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
        });
        format!("{all:#}\n")
    }
}

impl Row {
    fn name(&self) -> String {
        match self.test {
            Test::Prefill { tokens } => format!("prefill {tokens}"),
            Test::Decode { batch, context, .. } => format!("decode, batch {batch}, at {context}"),
            Test::Serve { streams, input, output } => format!("serve {streams} x {input} in {output} out"),
        }
    }

    /// Milliseconds a step, by part. Experts that are called are computed during the dispatch.
    fn layers(&self) -> String {
        let Sample { steps, experts_busy } = &self.sample;
        let per_step = |time: Duration| 1e3 * time.as_secs_f64() / steps.steps.max(1) as f64;
        let mut text =
            format!("    {} steps of {:.1} rows:", steps.steps, steps.rows as f64 / steps.steps.max(1) as f64);
        for part in Part::ALL {
            let time = match part {
                Part::Dispatch => steps.of(part).saturating_sub(*experts_busy),
                part => steps.of(part),
            };
            let _ = write!(text, " {} {:.2},", format!("{part:?}").to_lowercase(), per_step(time));
        }
        let _ = writeln!(text, " experts {:.2} ms a step", per_step(*experts_busy));
        text
    }

    fn json(&self) -> Value {
        let seconds = |times: &[Duration], share| percentile(times, share).as_secs_f64();
        let mut row = match self.test {
            Test::Prefill { tokens } => json!({"test": "pp", "n": tokens}),
            Test::Decode { batch, context, tokens } => {
                json!({"test": "tg", "n": tokens, "batch": batch, "context": context})
            }
            Test::Serve { streams, input, output } => {
                let (first, gaps) = (&self.measured.first_token, &self.measured.gaps);
                json!({
                    "test": "serve", "n": streams, "input": input, "output": output,
                    "first_token_s": {"p50": seconds(first, 0.5), "p95": seconds(first, 0.95)},
                    "gap_s": {"p50": seconds(gaps, 0.5), "p95": seconds(gaps, 0.95), "p99": seconds(gaps, 0.99)},
                })
            }
        };
        row["tokens_per_s"] = self.measured.tokens_per_s.into();
        row["tokens_per_s_min"] = self.spread.0.into();
        row["tokens_per_s_max"] = self.spread.1.into();
        row["share_of_roof"] = self.share.into();
        let Sample { steps, experts_busy } = &self.sample;
        let parts = Part::ALL.map(|part| (format!("{part:?}").to_lowercase(), steps.of(part).as_secs_f64().into()));
        row["steps"] = steps.steps.into();
        row["seconds_by_part"] = Value::Object(parts.into_iter().collect());
        row["seconds_by_part"]["experts"] = experts_busy.as_secs_f64().into();
        row
    }
}

/// Of sorted times.
fn percentile(times: &[Duration], share: f64) -> Duration {
    let last = times.len().saturating_sub(1);
    times.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

/// Of this process, as the system counts it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
