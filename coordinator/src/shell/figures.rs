//! What a coordinator counts of requests and their sequences.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moesaic_node::metrics::{Histogram, Page};
use moesaic_proto::v1::FinishReason;

use crate::core::board::Window;
use crate::core::{ApiError, Delta};

/// From a small model on this machine to a long prompt in a long queue.
const FIRST_TOKEN_BOUNDS: &[f64] = &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const GAP_BOUNDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
const SEQUENCE_BOUNDS: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// How a sequence was over.
#[derive(Clone, Copy, Debug)]
pub enum Over {
    Stop,
    Length,
    Aborted,
    Failed,
    /// Its client has left.
    Left,
}

impl Over {
    pub fn name(self) -> &'static str {
        OVER[self as usize].1
    }
}

const OVER: [(Over, &str); 5] = [
    (Over::Stop, "stop"),
    (Over::Length, "length"),
    (Over::Aborted, "aborted"),
    (Over::Failed, "failed"),
    (Over::Left, "left"),
];

/// Why a request was not let in.
#[derive(Clone, Copy, Debug)]
enum Refused {
    Full,
    Quota,
    NotReady,
    Invalid,
}

const REFUSED: [(Refused, &str); 4] = [
    (Refused::Full, "full"),
    (Refused::Quota, "quota"),
    (Refused::NotReady, "not_ready"),
    (Refused::Invalid, "invalid"),
];

#[derive(Debug)]
pub struct Figures {
    requests: AtomicU64,
    refused: [AtomicU64; REFUSED.len()],
    over: [AtomicU64; OVER.len()],
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    moved: AtomicU64,
    resumed: AtomicU64,
    first_token: Histogram,
    gap: Histogram,
    sequence: Histogram,
    /// The last seconds, for the dashboard: waits for first tokens, and between tokens.
    recent: Mutex<Box<[Window; 2]>>,
}

/// Since the coordinator started.
pub struct Sums {
    pub requests: u64,
    /// Because something was full.
    pub refusals: u64,
    pub tokens: u64,
}

/// What the page's curves show.
const SHARES: [f64; 3] = [0.5, 0.95, 0.99];

impl Default for Figures {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            refused: Default::default(),
            over: Default::default(),
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            first_token: Histogram::new(FIRST_TOKEN_BOUNDS),
            gap: Histogram::new(GAP_BOUNDS),
            sequence: Histogram::new(SEQUENCE_BOUNDS),
            recent: Mutex::default(),
        }
    }
}

impl Figures {
    /// A request that asked to be let in, and what came of it.
    pub fn asked<T>(&self, admitted: &Result<T, ApiError>) {
        let refused = match admitted {
            Ok(_) => return add(&self.requests, 1),
            Err(ApiError::Full { .. }) => Refused::Full,
            Err(ApiError::Quota { .. }) => Refused::Quota,
            Err(ApiError::Unavailable { .. }) => Refused::NotReady,
            Err(_) => Refused::Invalid,
        };
        add(&self.refused[refused as usize], 1);
    }

    pub fn started(&self, prompt_tokens: usize, is_resumed: bool) {
        add(&self.prompt_tokens, prompt_tokens as u64);
        add(&self.resumed, u64::from(is_resumed));
    }

    /// Tokens that came `waited` after the ones before them, or after the sequence's beginning.
    pub fn tokens(&self, delta: &Delta, is_first: bool, waited: Duration) {
        add(&self.generated_tokens, delta.tokens.len() as u64);
        if is_first {
            self.first_token.add(waited)
        } else {
            self.gap.add(waited)
        }
        self.recent()[usize::from(!is_first)].add(waited);
    }

    /// A second is over.
    pub fn turn(&self) {
        self.recent().iter_mut().for_each(Window::turn);
    }

    /// p50, p95 and p99 of the last seconds in ms: to the first token, and between tokens.
    pub fn waits(&self) -> ([Option<f64>; 3], [Option<f64>; 3]) {
        let recent = self.recent();
        (recent[0].percentiles(SHARES), recent[1].percentiles(SHARES))
    }

    pub fn sums(&self) -> Sums {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Sums {
            requests: read(&self.requests),
            refusals: read(&self.refused[Refused::Full as usize]),
            tokens: read(&self.generated_tokens),
        }
    }

    fn recent(&self) -> MutexGuard<'_, Box<[Window; 2]>> {
        // Nothing panics while it is held.
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sequence went on on another worker.
    pub fn moved(&self) {
        add(&self.moved, 1);
    }

    pub fn over(&self, over: Over, took: Duration) {
        add(&self.over[over as usize], 1);
        self.sequence.add(took);
    }

    pub fn write(&self, page: &mut Page) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        page.counter("moesaic_requests_total", "Requests that were let in.", read(&self.requests));
        let mut family = page.counters("moesaic_requests_refused_total", "Requests that were not let in.");
        for (refused, name) in REFUSED {
            family.sample(&[("reason", name)], read(&self.refused[refused as usize]));
        }
        let mut family = page.counters("moesaic_sequences_over_total", "Sequences by how they were over.");
        for (over, name) in OVER {
            family.sample(&[("how", name)], read(&self.over[over as usize]));
        }
        page.counter("moesaic_prompt_tokens_total", "Tokens of prompts that were run.", read(&self.prompt_tokens));
        let help = "Tokens that went to clients.";
        page.counter("moesaic_generated_tokens_total", help, read(&self.generated_tokens));
        let help = "Sequences that lost their attention worker and went on on another one.";
        page.counter("moesaic_sequences_moved_total", help, read(&self.moved));
        let help = "Sequences that clients took up again here.";
        page.counter("moesaic_sequences_resumed_total", help, read(&self.resumed));
        page.histogram(
            "moesaic_time_to_first_token_seconds",
            "From the worker's call to the first token.",
            &self.first_token,
        );
        page.histogram("moesaic_time_between_tokens_seconds", "Between two tokens of a sequence.", &self.gap);
        page.histogram("moesaic_sequence_seconds", "How long sequences took.", &self.sequence);
    }
}

/// How a sequence was over that has said so itself.
pub fn over(reason: FinishReason) -> Over {
    match reason {
        FinishReason::Stop => Over::Stop,
        FinishReason::Length => Over::Length,
        FinishReason::Aborted => Over::Aborted,
        FinishReason::Unspecified => Over::Failed,
    }
}

fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}
