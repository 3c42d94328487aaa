//! Figures in Prometheus' text format (0.0.4): a page is written at each scrape from what the node counts anyhow, so
//! that nothing that is gone leaves a line behind.
//!
//! Names are `moesaic_<what>_<unit>`, in base units; totals end in `_total`.

use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// One scrape's answer.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
}

/// A sample's labels.
pub type Labels<'a> = &'a [(&'static str, &'a str)];

impl Page {
    /// A total that only grows while the process lives.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.counters(name, help).sample(&[], value);
    }

    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.gauges(name, help).sample(&[], value);
    }

    /// Bytes that a worker has of its GPU, and those of them that are free; nothing where it has none.
    pub fn gpu_memory(&mut self, memory: Option<(usize, usize)>) {
        if let Some((all, free)) = memory {
            self.gauge("moesaic_gpu_memory_bytes", "What the worker has of its GPU's memory.", all);
            self.gauge("moesaic_gpu_memory_free_bytes", "What of that is free.", free);
        }
    }

    /// Totals of one name, told apart by labels.
    pub fn counters(&mut self, name: &str, help: &str) -> Family<'_> {
        debug_assert!(name.ends_with("_total"), "{name}");
        self.family(name, help, "counter")
    }

    pub fn gauges(&mut self, name: &str, help: &str) -> Family<'_> {
        self.family(name, help, "gauge")
    }

    pub fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, help, "histogram");
        let mut count = 0;
        for (bound, bucket) in histogram.bounds.iter().zip(&histogram.buckets) {
            count += bucket.load(Ordering::Relaxed);
            self.line(&format!("{name}_bucket"), &[("le", &bound.to_string())], count);
        }
        count += histogram.buckets[histogram.bounds.len()].load(Ordering::Relaxed);
        self.line(&format!("{name}_bucket"), &[("le", "+Inf")], count);
        let sum = Duration::from_nanos(histogram.nanoseconds.load(Ordering::Relaxed));
        self.line(&format!("{name}_sum"), &[], sum.as_secs_f64());
        self.line(&format!("{name}_count"), &[], count);
    }

    pub fn into_text(self) -> String {
        self.text
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) -> Family<'_> {
        debug_assert!(!self.text.contains(&format!("# TYPE {name} ")), "{name} is there twice");
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {}\n# TYPE {name} {kind}", help.replace('\n', " "));
        Family { page: self, name: name.to_owned() }
    }

    fn line(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.text.push_str(name);
        for (i, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"{}\"", if i == 0 { '{' } else { ',' }, escaped(value));
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

/// A name's samples.
pub struct Family<'a> {
    page: &'a mut Page,
    name: String,
}

impl Family<'_> {
    pub fn sample(&mut self, labels: Labels<'_>, value: impl Display) -> &mut Self {
        self.page.line(&self.name, labels, value);
        self
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// How often something took how long, in seconds. Counting costs two additions.
#[derive(Debug)]
pub struct Histogram {
    /// Ascending; the last bucket takes what is above.
    bounds: &'static [f64],
    buckets: Vec<AtomicU64>,
    nanoseconds: AtomicU64,
}

impl Histogram {
    pub fn new(bounds: &'static [f64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, nanoseconds: AtomicU64::new(0) }
    }

    pub fn add(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_prometheus_reads() {
        let mut page = Page::default();
        page.counter("moesaic_a_total", "What.", 3_u64);
        page.gauges("moesaic_b", "More.").sample(&[("id", "x\"\\\n"), ("k", "v")], 0.5).sample(&[], 1);
        let histogram = Histogram::new(&[0.1, 1.0]);
        for ms in [50, 100, 200, 3000] {
            histogram.add(Duration::from_millis(ms));
        }
        page.histogram("moesaic_c_seconds", "Time.", &histogram);
        let expected = "\
# HELP moesaic_a_total What.
# TYPE moesaic_a_total counter
moesaic_a_total 3
# HELP moesaic_b More.
# TYPE moesaic_b gauge
moesaic_b{id=\"x\\\"\\\\\\n\",k=\"v\"} 0.5
moesaic_b 1
# HELP moesaic_c_seconds Time.
# TYPE moesaic_c_seconds histogram
moesaic_c_seconds_bucket{le=\"0.1\"} 2
moesaic_c_seconds_bucket{le=\"1\"} 3
moesaic_c_seconds_bucket{le=\"+Inf\"} 4
moesaic_c_seconds_sum 3.35
moesaic_c_seconds_count 4
";
        assert_eq!(page.into_text(), expected);
    }
}
