//! Where the engine's time goes, counted as it runs. Costs two readings of the clock for each part of a layer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Projections, cache and attention.
    Attention,
    /// Until the experts are chosen: on a GPU, until it has done what was queued before. Other micro-batches are queued meanwhile.
    Gate,
    /// Sending rows to experts. Workers of this process compute them meanwhile.
    Dispatch,
    /// Dense layers and shared experts.
    Dense,
    /// Until the experts' answers are in and added up. Other micro-batches run meanwhile.
    Wait,
    /// The logits of rows that need them.
    Head,
    /// Drawing tokens.
    Sampling,
    /// Embedding, norms and residuals.
    Rest,
}

impl Part {
    pub const ALL: [Self; 8] =
        [Self::Attention, Self::Gate, Self::Dispatch, Self::Dense, Self::Wait, Self::Head, Self::Sampling, Self::Rest];
}

/// Sums since the engine started.
#[derive(Debug, Default)]
pub struct Profile {
    nanoseconds: [AtomicU64; Part::ALL.len()],
    steps: AtomicU64,
    rows: AtomicU64,
    experts: AtomicU64,
    tokens: AtomicU64,
}

/// The sums at one moment, or between two.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    pub time: [Duration; Part::ALL.len()],
    /// Micro-batches.
    pub steps: u64,
    /// Tokens in them.
    pub rows: u64,
    /// Distinct experts that a micro-batch asked for, over all layers.
    pub experts: u64,
    /// Tokens that were generated.
    pub tokens: u64,
}

impl Profile {
    /// Runs `work` as a part of a step.
    pub fn time<R>(&self, part: Part, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        self.add(part, start.elapsed());
        result
    }

    pub fn add(&self, part: Part, time: Duration) {
        self.nanoseconds[part as usize].fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    pub fn count_step(&self, rows: usize) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    pub fn count_experts(&self, experts: usize) {
        self.experts.fetch_add(experts as u64, Ordering::Relaxed);
    }

    pub fn count_token(&self) {
        self.tokens.fetch_add(1, Ordering::Relaxed);
    }

    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            time: Part::ALL.map(|part| Duration::from_nanos(read(&self.nanoseconds[part as usize]))),
            steps: read(&self.steps),
            rows: read(&self.rows),
            experts: read(&self.experts),
            tokens: read(&self.tokens),
        }
    }
}

impl Counts {
    pub fn of(&self, part: Part) -> Duration {
        self.time[part as usize]
    }

    /// What has come since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            time: Part::ALL.map(|part| self.of(part).saturating_sub(earlier.of(part))),
            steps: self.steps - earlier.steps,
            rows: self.rows - earlier.rows,
            experts: self.experts - earlier.experts,
            tokens: self.tokens - earlier.tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_what_was_added_since() {
        let profile = Profile::default();
        profile.add(Part::Gate, Duration::from_nanos(5));
        profile.count_step(3);
        let before = profile.counts();
        profile.add(Part::Gate, Duration::from_nanos(7));
        profile.add(Part::Rest, Duration::from_nanos(1));
        profile.count_step(4);
        profile.count_experts(9);
        profile.count_token();
        let since = profile.counts().since(&before);
        assert_eq!((since.of(Part::Gate), since.of(Part::Rest)), (Duration::from_nanos(7), Duration::from_nanos(1)));
        assert_eq!((since.steps, since.rows, since.experts, since.tokens), (1, 4, 9, 1));
    }
}
