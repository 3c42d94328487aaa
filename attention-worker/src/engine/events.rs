//! What a sequence has said so far. The engine appends and never waits; readers come and go and read from any place, so
//! that a sequence whose reader is gone can be taken over.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moesaic_dispatch::DispatchError;
use tokio::sync::Notify;

use super::handle::Token;
use crate::core::batcher::Finish;

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Token {
        /// Counted from the first generated token.
        index: usize,
        token: Token,
        /// With the first token, if asked for: the prompt's tokens after the first.
        prompt: Vec<Token>,
        /// The last event.
        finish: Option<Finish>,
    },
    /// The last event.
    Aborted,
    /// The last event.
    Failed(DispatchError),
}

impl Event {
    fn is_last(&self) -> bool {
        !matches!(self, Self::Token { finish: None, .. })
    }
}

/// A sequence's events, from its first token on; at most max_tokens and a last word.
#[derive(Debug, Default)]
pub struct Events {
    said: Mutex<Said>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Said {
    events: Vec<Event>,
    /// The engine is gone: no more will come.
    is_closed: bool,
}

impl Said {
    fn is_over(&self) -> bool {
        self.is_closed || self.events.last().is_some_and(Event::is_last)
    }
}

impl Events {
    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, event: Event) {
        self.said().events.push(event);
        self.news.notify_waiters();
    }

    /// Whether the last event is there.
    pub fn is_over(&self) -> bool {
        self.said().is_over()
    }

    /// Reads from the event of this number on.
    pub fn reader(self: &Arc<Self>, next: usize) -> Reader {
        Reader { events: self.clone(), next }
    }
}

/// The engine's end: without it nothing more is said.
#[derive(Debug)]
pub struct Speaker(pub Arc<Events>);

impl Speaker {
    /// Nobody could read what is said any more.
    pub fn is_unheard(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        self.0.said().is_closed = true;
        self.0.news.notify_waiters();
    }
}

/// A place in a sequence's events.
#[derive(Debug)]
pub struct Reader {
    events: Arc<Events>,
    next: usize,
}

impl Reader {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            let news = self.events.news.notified();
            tokio::pin!(news);
            // From here on nothing is missed.
            news.as_mut().enable();
            {
                let said = self.events.said();
                if let Some(event) = said.events.get(self.next) {
                    self.next += 1;
                    return Some(event.clone());
                }
                if said.is_over() {
                    return None;
                }
            }
            news.await;
        }
    }

    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(index: usize, finish: Option<Finish>) -> Event {
        Event::Token { index, token: Token { token: 7, logprobs: None }, prompt: Vec::new(), finish }
    }

    #[tokio::test]
    async fn readers_read_from_where_they_like_and_end_with_the_last_event() {
        let speaker = Speaker(Arc::default());
        let mut all = speaker.0.reader(0);
        let waiting =
            tokio::spawn(async move { [all.next().await, all.next().await, all.next().await, all.next().await] });
        speaker.0.push(token(0, None));
        tokio::task::yield_now().await;
        speaker.0.push(token(1, None));
        let mut late = speaker.0.reader(1);
        assert_eq!(late.next().await, Some(token(1, None)));
        assert!(!speaker.0.is_over() && !speaker.is_unheard());
        speaker.0.push(token(2, Some(Finish::Length)));
        assert_eq!([late.next().await, late.next().await], [Some(token(2, Some(Finish::Length))), None]);
        let all = waiting.await.unwrap();
        assert_eq!(all, [Some(token(0, None)), Some(token(1, None)), Some(token(2, Some(Finish::Length))), None]);
        drop(late);
        assert!(speaker.0.is_over() && speaker.is_unheard());
    }

    #[tokio::test]
    async fn an_engine_that_ends_leaves_nobody_waiting() {
        let speaker = Speaker(Arc::default());
        let mut reader = speaker.0.reader(0);
        let waiting = tokio::spawn(async move { reader.next().await });
        tokio::task::yield_now().await;
        drop(speaker);
        assert_eq!(waiting.await.unwrap(), None);
    }
}
