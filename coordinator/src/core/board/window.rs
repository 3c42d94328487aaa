//! Percentiles of the last seconds' waits, counted in buckets of an eighth of a doubling, one set a second; and the rate at
//! which something has come in the last seconds.

use std::collections::VecDeque;
use std::time::Duration;

/// How far back it looks.
const SECONDS: usize = 10;
/// From 1 us to more than an hour.
const BUCKETS: usize = 8 * 32;

/// Rates are over so many seconds.
const RATE_SECONDS: u64 = 5;

#[derive(Clone, Debug, Default)]
pub struct Rate {
    /// (seconds, count)
    counted: VecDeque<(u64, u64)>,
}

impl Rate {
    /// Takes a count that only rises, or begins anew; how much it has risen a second, once that is known.
    pub fn see(&mut self, t_s: u64, count: u64) -> Option<f64> {
        if self.counted.back().is_some_and(|(_, before)| *before > count) {
            self.counted.clear();
        }
        self.counted.push_back((t_s, count));
        while self.counted.front().is_some_and(|(t, _)| t + RATE_SECONDS < t_s) {
            self.counted.pop_front();
        }
        let (from, before) = self.counted[0];
        (t_s > from).then(|| (count - before) as f64 / (t_s - from) as f64)
    }
}

#[derive(Clone, Debug)]
pub struct Window {
    seconds: [[u32; BUCKETS]; SECONDS],
    now: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self { seconds: [[0; BUCKETS]; SECONDS], now: 0 }
    }
}

impl Window {
    pub fn add(&mut self, waited: Duration) {
        let us = (waited.as_micros() as f64).max(1.0);
        let bucket = ((8.0 * us.log2()) as usize).min(BUCKETS - 1);
        self.seconds[self.now][bucket] += 1;
    }

    /// A second is over: the oldest one is forgotten.
    pub fn turn(&mut self) {
        self.now = (self.now + 1) % SECONDS;
        self.seconds[self.now] = [0; BUCKETS];
    }

    /// The waits in milliseconds that these shares of all do not exceed, to within a tenth; none where there were none.
    pub fn percentiles<const N: usize>(&self, shares: [f64; N]) -> [Option<f64>; N] {
        let count = |bucket: usize| self.seconds.iter().map(|second| u64::from(second[bucket])).sum::<u64>();
        let total: u64 = (0..BUCKETS).map(count).sum();
        shares.map(|share| {
            let wanted = ((total as f64 * share).ceil() as u64).max(1);
            let mut seen = 0;
            let bucket = (0..BUCKETS).find(|bucket| {
                seen += count(*bucket);
                seen >= wanted
            })?;
            // The middle of the bucket.
            Some(2_f64.powf((bucket as f64 + 0.5) / 8.0) / 1000.0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_a_tenth() {
        let mut window = Window::default();
        assert_eq!(window.percentiles([0.5]), [None]);
        for ms in 1..=100 {
            window.add(Duration::from_millis(ms));
        }
        for (share, expected) in [(0.5, 50.0), (0.95, 95.0), (0.99, 99.0), (0.0, 1.0)] {
            let [got] = window.percentiles([share]);
            assert!((got.unwrap() / expected - 1.0_f64).abs() < 0.1, "{share}: {got:?}");
        }
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let mut window = Window::default();
        window.add(Duration::from_millis(1));
        for _ in 0..SECONDS - 1 {
            window.turn();
        }
        assert!(window.percentiles([0.5])[0].is_some());
        window.turn();
        assert_eq!(window.percentiles([0.5]), [None]);
    }
}
