//! Who may run: a bound on the sequences that run or wait in the whole cluster, and the ids in use.
//!
//! Past the bound a request is refused at once, with the time after which a place should be free.

use std::collections::HashMap;

use super::ApiError;

/// Longest time that a client is told to wait.
const RETRY_SECONDS_MAX: u64 = 60;
/// Weight of the newest gap between two ends in their running mean.
const NEWEST: f64 = 0.2;

pub struct Admission {
    sequences_max: usize,
    /// Sequences of each running request.
    running: HashMap<String, usize>,
    sequences: usize,
    last_end_ms: Option<u64>,
    mean_gap_ms: f64,
}

impl Admission {
    pub fn new(sequences_max: usize) -> Self {
        Self { sequences_max, running: HashMap::new(), sequences: 0, last_end_ms: None, mean_gap_ms: 0.0 }
    }

    /// Lets a request with that many sequences in, under an id that nobody else uses.
    pub fn admit(&mut self, request_id: &str, sequences: usize) -> Result<(), ApiError> {
        if self.running.contains_key(request_id) {
            return Err(ApiError::Exists { request_id: request_id.to_owned() });
        }
        if sequences > self.sequences_max {
            let reason = format!("asks for {sequences} sequences at a time; at most {}", self.sequences_max);
            return Err(ApiError::invalid("n", reason));
        }
        if self.sequences + sequences > self.sequences_max {
            let reason = format!("{} of {} sequences are running or waiting", self.sequences, self.sequences_max);
            return Err(ApiError::Full { reason, retry_after_s: self.retry_after_s() });
        }
        self.running.insert(request_id.to_owned(), sequences);
        self.sequences += sequences;
        Ok(())
    }

    /// A request has ended, however it did.
    pub fn release(&mut self, request_id: &str, now_ms: u64) {
        let Some(sequences) = self.running.remove(request_id) else { return };
        self.sequences -= sequences;
        if let Some(last) = self.last_end_ms.replace(now_ms) {
            let gap = now_ms.saturating_sub(last) as f64;
            self.mean_gap_ms += NEWEST * (gap - self.mean_gap_ms);
        }
    }

    /// Sequences that run or wait.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// When the next request should end, from how often they end.
    pub fn retry_after_s(&self) -> u64 {
        ((self.mean_gap_ms / 1000.0).ceil() as u64).clamp(1, RETRY_SECONDS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_the_bound_requests_are_refused_and_places_come_back() {
        let mut admission = Admission::new(3);
        admission.admit("a", 2).unwrap();
        admission.admit("b", 1).unwrap();
        let reason = "3 of 3 sequences are running or waiting".to_owned();
        assert_eq!(admission.admit("c", 1), Err(ApiError::Full { reason, retry_after_s: 1 }));
        admission.release("a", 0);
        assert_eq!(admission.sequences(), 1);
        admission.release("a", 0);
        assert_eq!(admission.sequences(), 1, "a release counts once");
        admission.admit("c", 2).unwrap();
    }

    #[test]
    fn an_id_is_used_once_at_a_time() {
        let mut admission = Admission::new(3);
        admission.admit("a", 1).unwrap();
        assert_eq!(admission.admit("a", 1), Err(ApiError::Exists { request_id: "a".into() }));
        admission.release("a", 5);
        admission.admit("a", 1).unwrap();
        assert!(matches!(admission.admit("b", 4), Err(ApiError::Invalid { .. })), "can never fit");
    }

    #[test]
    fn the_time_to_wait_follows_how_often_requests_end() {
        let mut admission = Admission::new(1);
        for end in 1..40 {
            admission.admit("a", 1).unwrap();
            admission.release("a", end * 5_000);
        }
        assert_eq!(admission.retry_after_s(), 5);
    }
}
