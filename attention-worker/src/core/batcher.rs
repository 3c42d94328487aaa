//! Continuous batching: which sequences run next, with how many of their tokens, on which pages.
//!
//! A sequence waits in line until there are pages for all its tokens, is prefilled in chunks, and then decodes a token
//! a turn. It is in at most one micro-batch at a time. When a decoding sequence needs a page and none is free, the
//! youngest running sequence that is not in flight gives up its pages and waits again, its place in line given by its
//! age; its prompt and the tokens it has emitted are then prefilled again. What was emitted stays emitted.
//!
//! There is always progress: a sequence gives way to older ones only, and the oldest that is ready is part of every
//! micro-batch. Alone it fits, or it was refused at submit.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use moesaic_kernels::PAGE_TOKENS;

use super::pages::Pages;

/// In order of arrival: a smaller id is older.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SequenceId(pub u64);

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of `PAGE_TOKENS` tokens each.
    pub pages: u32,
    /// Tokens of one sequence in a micro-batch.
    pub chunk: usize,
    /// Tokens in a micro-batch.
    pub token_budget: usize,
    /// Micro-batches in flight at a time, at most.
    pub micro_batches: usize,
    /// Rows that each should have before there are several: every one reads all the weights that it needs.
    pub micro_batch_rows: usize,
    /// New sequences that may wait. Those that gave up their pages come on top: at most one a page.
    pub waiting_max: usize,
}

#[derive(Clone, Debug)]
pub struct Request {
    /// Not empty.
    pub prompt: Vec<u32>,
    /// Generated elsewhere: fewer than `max_tokens`, no stop token among them.
    pub emitted: Vec<u32>,
    /// At least 1, emitted tokens counted.
    pub max_tokens: usize,
    /// Tokens that end the sequence.
    pub stop_tokens: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the waiting line is full: {limit} requests wait already")]
    LineFull { limit: usize },
    /// The rule: prompt and max_tokens together must fit in the cache.
    #[error(
        "prompt ({prompt}) + max_tokens ({max_tokens}) = {} tokens can never fit the latent cache of {capacity} tokens",
        prompt + max_tokens
    )]
    TooLarge { prompt: usize, max_tokens: usize, capacity: usize },
}

/// A sequence's rows in a micro-batch: consecutive tokens from position `start`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub sequence: SequenceId,
    pub start: usize,
    pub tokens: Vec<u32>,
    /// Tokens of the sequence that are its prompt; what comes behind was emitted.
    pub prompt: usize,
    /// The page table, for all positions up to the last row's.
    pub pages: Vec<u32>,
    /// The last row is the last known token: a token is drawn after it.
    pub draws: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
    Aborted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub pages_total: usize,
    pub pages_free: usize,
    pub running: usize,
    pub waiting: usize,
    pub preemptions: u64,
}

pub struct Batcher {
    limits: Limits,
    pages: Pages,
    waiting: BTreeMap<SequenceId, Sequence>,
    running: BTreeMap<SequenceId, Sequence>,
    next_id: u64,
    /// Micro-batches formed so far.
    turn: u64,
    preemptions: u64,
}

struct Sequence {
    /// The prompt and what was emitted.
    tokens: Vec<u32>,
    prompt: usize,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    pages: Vec<u32>,
    /// Tokens whose latents are in the pages.
    cached: usize,
    /// Rows that are in flight; 0: not in flight.
    in_flight: usize,
    aborted: bool,
    /// When it was last part of a micro-batch.
    turn: u64,
}

impl Sequence {
    fn is_ready(&self) -> bool {
        self.in_flight == 0
    }

    fn is_decoding(&self) -> bool {
        self.tokens.len() - self.cached == 1
    }
}

impl Batcher {
    pub fn new(limits: Limits) -> Self {
        let Limits { chunk, token_budget, micro_batches, micro_batch_rows, .. } = limits;
        let least = chunk.min(token_budget).min(micro_batches).min(micro_batch_rows);
        assert!(least > 0, "limits of 0 let nothing run: {limits:?}");
        Self {
            limits,
            pages: Pages::new(limits.pages),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            next_id: 0,
            turn: 0,
            preemptions: 0,
        }
    }

    pub fn submit(&mut self, request: Request) -> Result<SequenceId, Refused> {
        let Request { prompt, emitted, max_tokens, stop_tokens } = request;
        assert!(!prompt.is_empty() && emitted.len() < max_tokens, "nothing to generate");
        let capacity = self.pages.total() * PAGE_TOKENS;
        if prompt.len().saturating_add(max_tokens) > capacity {
            return Err(Refused::TooLarge { prompt: prompt.len(), max_tokens, capacity });
        }
        if self.waiting.len() >= self.limits.waiting_max {
            return Err(Refused::LineFull { limit: self.limits.waiting_max });
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence {
            prompt: prompt.len(),
            tokens: [prompt, emitted].concat(),
            max_tokens,
            stop_tokens,
            pages: Vec::new(),
            cached: 0,
            in_flight: 0,
            aborted: false,
            turn: 0,
        };
        self.waiting.insert(id, sequence);
        Ok(id)
    }

    /// Ends a sequence: at once (true), or when its micro-batch comes back. False too if there is no such sequence.
    pub fn abort(&mut self, id: SequenceId) -> bool {
        match self.running.get_mut(&id) {
            Some(sequence) if !sequence.is_ready() => {
                sequence.aborted = true;
                false
            }
            _ => self.remove(id),
        }
    }

    /// Forgets a sequence and frees its pages, whose micro-batch, if it was in one, has ended. False if there is none.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let Some(sequence) = self.running.remove(&id) else { return self.waiting.remove(&id).is_some() };
        self.pages.give_back(id, sequence.pages);
        true
    }

    /// How many micro-batches are worth having in flight.
    pub fn micro_batches(&self) -> usize {
        let Limits { chunk, micro_batches, micro_batch_rows, .. } = self.limits;
        let rows: usize = self.running.values().map(|s| (s.tokens.len() - s.cached).min(chunk)).sum();
        (rows / micro_batch_rows).clamp(1, micro_batches)
    }

    /// The next micro-batch, empty if nothing can run now. Decoding sequences are spread over `micro_batches`.
    pub fn form(&mut self, micro_batches: usize) -> Vec<Part> {
        self.turn += 1;
        self.admit();
        let mut parts = Vec::new();
        let mut budget = self.limits.token_budget;
        let mut share = self.running.len().div_ceil(micro_batches);
        for id in self.candidates() {
            if budget == 0 {
                break;
            }
            // A younger candidate may have given up its pages for an older one meanwhile.
            let Some(sequence) = self.running.get(&id) else { continue };
            if sequence.is_decoding() {
                if share == 0 || !self.has_room(id) {
                    continue;
                }
                share -= 1;
            }
            let part = self.take(id, budget);
            budget -= part.tokens.len();
            parts.push(part);
        }
        parts
    }

    /// A sequence's rows came back; `token` is what was drawn if its part draws. What became of it, if it ended: then
    /// it is forgotten and its pages are free.
    pub fn complete(&mut self, id: SequenceId, token: Option<u32>) -> Option<Finish> {
        let sequence = self.running.get_mut(&id).expect("a sequence in flight is not removed");
        sequence.cached += std::mem::take(&mut sequence.in_flight);
        if let Some(token) = token.filter(|_| !sequence.aborted) {
            debug_assert_eq!(sequence.cached, sequence.tokens.len(), "a token drawn before the prompt was done");
            sequence.tokens.push(token);
        }
        let finish = if sequence.aborted {
            Finish::Aborted
        } else if token.is_some_and(|token| sequence.stop_tokens.contains(&token)) {
            Finish::Stop
        } else if sequence.tokens.len() - sequence.prompt == sequence.max_tokens {
            Finish::Length
        } else {
            return None;
        };
        self.remove(id);
        Some(finish)
    }

    /// The prompt and the tokens emitted so far.
    pub fn tokens(&self, id: SequenceId) -> Option<(&[u32], &[u32])> {
        let sequence = self.running.get(&id).or_else(|| self.waiting.get(&id))?;
        Some(sequence.tokens.split_at(sequence.prompt))
    }

    pub fn is_aborted(&self, id: SequenceId) -> bool {
        self.running.get(&id).is_some_and(|sequence| sequence.aborted)
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub fn counts(&self) -> Counts {
        Counts {
            pages_total: self.pages.total(),
            pages_free: self.pages.free(),
            running: self.running.len(),
            waiting: self.waiting.len(),
            preemptions: self.preemptions,
        }
    }

    /// Oldest first, and nobody overtakes: who is first in line waits until there are pages for all its tokens.
    fn admit(&mut self) {
        while let Some(first) = self.waiting.first_entry() {
            let needed = first.get().tokens.len().div_ceil(PAGE_TOKENS);
            let Some(pages) = self.pages.take(*first.key(), needed) else { return };
            let (id, sequence) = first.remove_entry();
            self.running.insert(id, Sequence { pages, ..sequence });
        }
    }

    /// The oldest, then who decodes, longest not served first, then who is prefilled, oldest first.
    fn candidates(&self) -> Vec<SequenceId> {
        let ready = self.running.iter().filter(|(_, sequence)| sequence.is_ready());
        let mut ranked: Vec<_> = ready
            .enumerate()
            .map(|(rank, (&id, s))| (rank > 0, !s.is_decoding(), if s.is_decoding() { s.turn } else { 0 }, id))
            .collect();
        ranked.sort_unstable();
        ranked.into_iter().map(|(.., id)| id).collect()
    }

    /// Whether a decoding sequence has a page for its token, if need be from a younger one.
    fn has_room(&mut self, id: SequenceId) -> bool {
        let sequence = &self.running[&id];
        if sequence.cached < sequence.pages.len() * PAGE_TOKENS {
            return true;
        }
        loop {
            if let Some(page) = self.pages.take(id, 1) {
                self.running.get_mut(&id).expect("it was there above").pages.extend(page);
                return true;
            }
            let mut youngest_first = self.running.range((Excluded(id), Unbounded)).rev();
            let Some((&victim, _)) = youngest_first.find(|(_, sequence)| sequence.is_ready()) else { return false };
            self.preempt(victim);
        }
    }

    fn preempt(&mut self, id: SequenceId) {
        let mut sequence = self.running.remove(&id).expect("a victim is running");
        self.pages.give_back(id, std::mem::take(&mut sequence.pages));
        sequence.cached = 0;
        self.preemptions += 1;
        self.waiting.insert(id, sequence);
    }

    /// The next rows of a sequence, now in flight.
    fn take(&mut self, id: SequenceId, budget: usize) -> Part {
        let sequence = self.running.get_mut(&id).expect("a candidate is running");
        let start = sequence.cached;
        let rows = (sequence.tokens.len() - start).min(self.limits.chunk).min(budget);
        sequence.in_flight = rows;
        sequence.turn = self.turn;
        let end = start + rows;
        Part {
            sequence: id,
            start,
            tokens: sequence.tokens[start..end].to_vec(),
            prompt: sequence.prompt,
            pages: sequence.pages[..end.div_ceil(PAGE_TOKENS)].to_vec(),
            draws: end == sequence.tokens.len(),
        }
    }
}

#[cfg(test)]
mod tests;
