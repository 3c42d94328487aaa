//! What a running sequence has given so far: enough to have it go on on another worker, each position once and in order.

use std::cmp::Ordering;

use moesaic_proto::v1::{RunEvent, RunRequest};

/// See the module.
#[derive(Clone, Debug)]
pub struct Journal {
    /// The request, and in `emitted` the tokens that have come.
    run: RunRequest,
}

/// What an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The next one.
    Next,
    /// It has come before.
    Known,
    /// Something before it is missing: its worker is not to be trusted with this sequence.
    Gap,
}

impl Journal {
    pub fn new(run: RunRequest) -> Self {
        Self { run }
    }

    /// Takes an event's token if it is the next one.
    pub fn accept(&mut self, event: &RunEvent) -> Place {
        let Some(token) = &event.token else { return Place::Next };
        match (event.position as usize).cmp(&self.run.emitted.len()) {
            Ordering::Less => Place::Known,
            Ordering::Greater => Place::Gap,
            Ordering::Equal => {
                self.run.emitted.push(token.clone());
                Place::Next
            }
        }
    }

    /// The request as another worker has to be asked: what has come is part of it.
    pub fn run(&self) -> &RunRequest {
        &self.run
    }

    /// Tokens that have come.
    pub fn position(&self) -> usize {
        self.run.emitted.len()
    }
}

#[cfg(test)]
mod tests {
    use moesaic_proto::v1::TokenInfo;

    use super::*;

    fn event(position: u32, token: u32) -> RunEvent {
        let token = Some(TokenInfo { token, ..Default::default() });
        RunEvent { position, token, ..Default::default() }
    }

    #[test]
    fn each_position_counts_once_and_in_order() {
        let mut journal = Journal::new(RunRequest { prompt: vec![1, 2], ..Default::default() });
        let events = [(0, Place::Next), (0, Place::Known), (2, Place::Gap), (1, Place::Next), (0, Place::Known)];
        for (position, place) in events {
            assert_eq!(journal.accept(&event(position, 10 + position)), place);
        }
        assert_eq!(journal.accept(&RunEvent::default()), Place::Next, "a word without a token");
        let emitted: Vec<u32> = journal.run().emitted.iter().map(|info| info.token).collect();
        assert_eq!((emitted, journal.run().prompt.len(), journal.position()), (vec![10, 11], 2, 2));
    }
}
