//! The sequences that run here and where they are, for those who watch. Never what they say.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moesaic_proto::WorkerId;

use super::unix_ms;
use crate::core::board::messages::{Sequence, State};

#[derive(Default)]
pub struct Seats {
    seats: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    next: u64,
    /// By their number: oldest first.
    sequences: BTreeMap<u64, Sequence>,
}

/// One sequence's; free again when it is dropped.
pub struct Seat {
    seats: Arc<Seats>,
    n: u64,
}

impl Seats {
    /// For a sequence that no worker has yet. `key`: whose it is, empty where there are no keys.
    pub fn take(self: &Arc<Self>, id: &str, key: &str, prompt_tokens: usize) -> Seat {
        let mut taken = self.lock();
        let n = taken.next;
        taken.next += 1;
        let sequence = Sequence {
            n,
            id: id.to_owned(),
            key: key.to_owned(),
            worker: String::new(),
            prompt: prompt_tokens as u32,
            emitted: 0,
            started: unix_ms(),
            state: State::Placing,
        };
        taken.sequences.insert(n, sequence);
        Seat { seats: self.clone(), n }
    }

    pub fn all(&self) -> Vec<Sequence> {
        self.lock().sequences.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        // Nothing panics while it is held.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// A worker has it.
    pub fn placed(&self, worker: &WorkerId) {
        self.change(|sequence| {
            worker.as_str().clone_into(&mut sequence.worker);
            sequence.state = if sequence.emitted == 0 { State::Prefill } else { State::Decode };
        });
    }

    /// So many tokens have come in all.
    pub fn emitted(&self, tokens: u32) {
        self.change(|sequence| (sequence.emitted, sequence.state) = (tokens, State::Decode));
    }

    /// Its worker is lost.
    pub fn recovering(&self) {
        self.change(|sequence| sequence.state = State::Recovering);
    }

    fn change(&self, change: impl FnOnce(&mut Sequence)) {
        if let Some(sequence) = self.seats.lock().sequences.get_mut(&self.n) {
            change(sequence);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.lock().sequences.remove(&self.n);
    }
}
