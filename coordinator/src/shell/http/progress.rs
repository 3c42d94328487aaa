//! How far a stream has come, as the `id` of its events: with the same request and the last id that arrived
//! (`Last-Event-ID`) any coordinator goes on from there.
//!
//! `<request id>/<seed>/<position>,<position>,...`: the seed in hexadecimal digits; for each choice the tokens that have
//! been sent, and a dot after those of a choice that has ended.

use std::fmt;
use std::str::FromStr;

use http::HeaderMap;

use crate::core::{ApiError, Delta};

const HEADER: &str = "last-event-id";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub request_id: String,
    pub seed: u64,
    pub choices: Vec<ChoiceProgress>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChoiceProgress {
    /// Tokens that have been sent.
    pub position: u32,
    pub has_ended: bool,
}

impl Progress {
    pub fn new(request_id: String, seed: u64, choices: usize) -> Self {
        Self { request_id, seed, choices: vec![ChoiceProgress::default(); choices] }
    }

    /// What a client that comes back has, if it does.
    pub fn of_headers(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let Some(value) = headers.get(HEADER) else { return Ok(None) };
        let parsed = value.to_str().ok().and_then(|text| text.parse().ok());
        let wrong = || ApiError::invalid("Last-Event-ID", "is not the id of an event of this server");
        parsed.map(Some).ok_or_else(wrong)
    }

    pub fn advance(&mut self, choice: usize, delta: &Delta) {
        let sent = &mut self.choices[choice];
        sent.position = sent.position.max(delta.position + delta.tokens.len() as u32);
        sent.has_ended |= delta.ending.is_some();
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:x}/", self.request_id, self.seed)?;
        for (i, choice) in self.choices.iter().enumerate() {
            let (comma, dot) = (if i == 0 { "" } else { "," }, if choice.has_ended { "." } else { "" });
            write!(f, "{comma}{}{dot}", choice.position)?;
        }
        Ok(())
    }
}

impl FromStr for Progress {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('/');
        let (Some(id), Some(seed), Some(choices), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(());
        };
        let choice = |text: &str| {
            let (digits, has_ended) = text.strip_suffix('.').map_or((text, false), |digits| (digits, true));
            digits.parse().map(|position| ChoiceProgress { position, has_ended }).map_err(drop)
        };
        let choices = choices.split(',').map(choice).collect::<Result<_, _>>()?;
        Ok(Self { request_id: id.to_owned(), seed: u64::from_str_radix(seed, 16).map_err(drop)?, choices })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_was_written() {
        let mut progress = Progress::new("chatcmpl-1:a".into(), u64::MAX, 2);
        assert_eq!(progress.to_string(), "chatcmpl-1:a/ffffffffffffffff/0,0");
        progress.advance(1, &Delta { position: 2, tokens: vec![Default::default(); 3], ..Delta::default() });
        progress.choices[0].has_ended = true;
        assert_eq!(progress.to_string(), "chatcmpl-1:a/ffffffffffffffff/0.,5");
        assert_eq!(progress.to_string().parse(), Ok(progress));
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in ["", "a/1", "a/1/", "a/x/1", "a/1/-1", "a/1/1..", "a/1/1/1", "a/1/1,,2", "a/1/99999999999"] {
            assert_eq!(text.parse::<Progress>(), Err(()), "{text:?}");
        }
    }
}
