//! The worker's sequences by request id: those that a coordinator reads, and those whose call has broken or ended, which
//! are kept for a while so that a coordinator can resume them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moesaic_proto::v1::{Hello, RunRequest};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::core::batcher::SequenceId;
use crate::engine::events::{Events, Reader};
use crate::engine::handle::Running;

/// Sequences that have ended and are kept all the same, at most: a few seconds' worth.
const ENDED_MAX: usize = 1024;

/// See the module. Clones share one table.
#[derive(Clone)]
pub struct Requests {
    table: Arc<Mutex<HashMap<String, Entry>>>,
    /// How long a sequence without a reader is kept.
    keep: Duration,
}

struct Entry {
    /// Tells a sequence from one before it with the same id.
    number: u64,
    /// What was asked for, without who asked.
    run: RunRequest,
    /// The last call to read it.
    call: u64,
    /// None until the engine has taken it.
    sequence: Option<(SequenceId, Arc<Events>)>,
    reading: Reading,
}

enum Reading {
    /// Ends the reader's stream when cancelled.
    By(CancellationToken),
    /// Nobody since then.
    Nobody(Instant),
}

/// A reader's hold on a sequence. When it is dropped the sequence waits to be resumed.
pub struct Ticket {
    requests: Requests,
    id: String,
    number: u64,
    /// Cancelled when another reader takes over.
    pub taken_over: CancellationToken,
}

impl Requests {
    pub fn new(keep: Duration) -> Self {
        Self { table: Arc::default(), keep }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new sequence's id, from one that nobody reads if need be.
    pub fn take(&self, run: &RunRequest) -> Result<Ticket, Status> {
        let id = &run.request_id;
        let mut table = self.lock();
        let before = table.get(id);
        if before.is_some_and(|entry| matches!(entry.reading, Reading::By(_))) {
            return Err(Status::already_exists(format!("request_id {id} is running")));
        }
        let (number, taken_over) = (before.map_or(0, |entry| entry.number + 1), CancellationToken::new());
        let reading = Reading::By(taken_over.clone());
        table.insert(id.clone(), Entry { number, run: anonymous(run), call: run.call, sequence: None, reading });
        Ok(Ticket { requests: self.clone(), id: id.clone(), number, taken_over })
    }

    /// Takes over a sequence that is the same as `run`, from its first event on.
    pub fn resume(&self, run: &RunRequest) -> Result<(Ticket, Reader), Status> {
        let id = &run.request_id;
        let not_found = || Status::not_found(format!("there is no request {id} to resume"));
        let mut table = self.lock();
        let entry = table.get_mut(id).ok_or_else(not_found)?;
        // What was generated before it came here lacks the prompt's log-probabilities.
        let is_whole = entry.run.prompt_logprobs.is_none() || entry.run.emitted.is_empty();
        let wanted = RunRequest { emitted: entry.run.emitted.clone(), ..anonymous(run) };
        let Some((_, events)) = entry.sequence.as_ref().filter(|_| is_whole && entry.run == wanted) else {
            return Err(not_found());
        };
        let reader = events.reader(0);
        entry.call = run.call;
        let taken_over = CancellationToken::new();
        if let Reading::By(before) = std::mem::replace(&mut entry.reading, Reading::By(taken_over.clone())) {
            before.cancel();
        }
        Ok((Ticket { requests: self.clone(), id: id.clone(), number: entry.number, taken_over }, reader))
    }

    /// Forgets a sequence, unless it has been taken over from this call; its id in the engine, if it was there.
    pub fn abort(&self, id: &str, call: u64) -> Option<SequenceId> {
        let mut table = self.lock();
        table.get(id).filter(|entry| entry.call == call)?;
        table.remove(id)?.sequence.map(|(sequence, _)| sequence)
    }

    /// Sequences that run and that nobody reads.
    pub fn orphans(&self) -> usize {
        self.lock().values().filter(|entry| matches!(entry.reading, Reading::Nobody(_)) && !entry.is_over()).count()
    }

    /// Forgets those that nobody has resumed in time; the engine ends what is forgotten.
    pub fn sweep(&self) {
        let mut table = self.lock();
        let since = |entry: &Entry| match entry.reading {
            Reading::Nobody(since) => Some(since),
            Reading::By(_) => None,
        };
        table.retain(|_, entry| since(entry).is_none_or(|since| since.elapsed() < self.keep));
        let ended = table.iter().filter(|(_, entry)| entry.is_over());
        let mut ended: Vec<_> = ended.filter_map(|(id, entry)| Some((since(entry)?, id.clone()))).collect();
        if ended.len() > ENDED_MAX {
            ended.sort_unstable();
            ended[..ended.len() - ENDED_MAX].iter().for_each(|(_, id)| drop(table.remove(id)));
        }
    }
}

impl Entry {
    fn is_over(&self) -> bool {
        self.sequence.as_ref().is_none_or(|(_, events)| events.is_over())
    }
}

/// A request without its caller, as those of several coordinators are compared.
fn anonymous(run: &RunRequest) -> RunRequest {
    RunRequest { hello: None::<Hello>, resume: false, call: 0, traceparent: String::new(), ..run.clone() }
}

impl Ticket {
    /// The engine has taken the sequence.
    pub fn set(&self, running: &Running) {
        self.with_entry(|entry| entry.sequence = Some((running.id, running.events.events().clone())));
    }

    /// Changes the table's entry if it is still this reader's.
    fn with_entry(&self, change: impl FnOnce(&mut Entry)) {
        let mut table = self.requests.lock();
        let own = table.get_mut(&self.id).filter(|entry| entry.number == self.number);
        if let Some(entry) = own.filter(|_| !self.taken_over.is_cancelled()) {
            change(entry);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut is_unborn = false;
        self.with_entry(|entry| {
            is_unborn = entry.sequence.is_none();
            entry.reading = Reading::Nobody(Instant::now());
        });
        if is_unborn {
            self.requests.lock().remove(&self.id);
        }
    }
}
