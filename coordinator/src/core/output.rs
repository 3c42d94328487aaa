//! What a client sees of a sequence: its tokens with their text, until a stop string, a stop token or the end.

use std::sync::Arc;

use moesaic_proto::v1::{FinishReason, RunEvent, TokenInfo};

use super::Request;
use crate::text::{Detokenizer, StopMatcher, Tokenizer};

/// News of a sequence. `tokens` are those whose text (or lack of any) is certain now.
#[derive(Debug, Default, PartialEq)]
pub struct Delta {
    /// Position of the first of `tokens`, counted from the first generated token.
    pub position: u32,
    pub tokens: Vec<TokenInfo>,
    pub text: String,
    /// In the first one, if asked for: each prompt token after the first.
    pub prompt: Vec<TokenInfo>,
    pub ending: Option<Ending>,
    /// The client has it from an earlier stream: it counts for what comes after it alone.
    pub is_known: bool,
}

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    pub reason: FinishReason,
    pub completion_tokens: u32,
    /// Tokens at the end whose text is not part of the text: an end-of-sentence or stop token, or a stop string.
    pub hidden_tokens: u32,
    /// The stop string, or the stop token as a decimal number.
    pub matched_stop: String,
}

pub struct Output {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    eos: Vec<u32>,
    /// Tokens whose text is not certain, each with the text that it added.
    held: Vec<(TokenInfo, usize)>,
    /// Bytes of text given out to the matcher and not yet by it.
    held_bytes: usize,
    tokens: u32,
    given: u32,
}

impl Output {
    pub fn new(request: &Request, tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer),
            matcher: StopMatcher::new(request.stop.clone()),
            stop: request.stop.clone(),
            stop_token_ids: request.stop_token_ids.clone(),
            eos: request.eos.clone(),
            held: Vec::new(),
            held_bytes: 0,
            tokens: 0,
            given: 0,
        }
    }

    /// Takes the worker's next event. None: nothing is certain yet. After an ending nothing more may be pushed.
    pub fn push(&mut self, event: RunEvent) -> Option<Delta> {
        let finish = event.finish.map(|_| event.finish());
        let mut delta = Delta { prompt: event.prompt, position: self.given, ..Delta::default() };
        if let Some(info) = event.token {
            self.tokens += 1;
            let id = info.token;
            let is_stop = self.stop_token_ids.contains(&id) || self.eos.contains(&id);
            if is_stop && finish == Some(FinishReason::Stop) {
                self.end_with_stop_token(info, &mut delta);
                return Some(delta);
            }
            let piece = self.detokenizer.push(id);
            self.take(Some(info), &piece, &mut delta);
        }
        if let (None, Some(reason)) = (&delta.ending, finish) {
            self.end(reason, &mut delta);
        }
        let news = !delta.tokens.is_empty() || !delta.prompt.is_empty() || delta.ending.is_some();
        news.then_some(delta)
    }

    /// Ends the sequence from here: what was held back is given out.
    pub fn abort(&mut self) -> Delta {
        let mut delta = Delta { position: self.given, ..Delta::default() };
        self.end(FinishReason::Aborted, &mut delta);
        delta
    }

    fn take(&mut self, info: Option<TokenInfo>, piece: &str, delta: &mut Delta) {
        self.held_bytes += piece.len();
        if let Some(info) = info {
            self.held.push((info, piece.len()));
        } else if let Some((_, bytes)) = self.held.last_mut() {
            *bytes += piece.len();
        }
        let emitted = self.matcher.push(piece);
        delta.text.push_str(&emitted.text);
        self.held_bytes -= emitted.text.len();
        if let Some(stop) = emitted.matched {
            let hidden = self.give_tokens_with_text(delta);
            let hidden_tokens = hidden as u32;
            delta.ending = Some(self.ending(FinishReason::Stop, hidden_tokens, self.stop[stop].clone()));
        } else {
            self.give_certain_tokens(delta);
        }
    }

    /// Gives out the tokens at the front whose text was given out whole. A token that has no text of its own (the first
    /// bytes of a character) waits for the one that completes it.
    fn give_certain_tokens(&mut self, delta: &mut Delta) {
        let mut after: usize = self.held_bytes;
        let mut certain = self.held.len();
        for (_, bytes) in self.held.iter().rev() {
            if after == 0 {
                break;
            }
            certain -= 1;
            after = after.saturating_sub(*bytes);
        }
        self.give(certain, delta);
    }

    /// After a stop string: gives out every token, and counts those at the end that have no part in the text.
    fn give_tokens_with_text(&mut self, delta: &mut Delta) -> usize {
        let mut cut = self.held_bytes;
        let hidden = self.held.iter().rev().take_while(|(_, bytes)| {
            let whole = cut > 0 && cut >= *bytes;
            cut = cut.saturating_sub(*bytes);
            whole
        });
        let hidden = hidden.count();
        self.give(self.held.len(), delta);
        hidden
    }

    fn give(&mut self, count: usize, delta: &mut Delta) {
        delta.tokens.extend(self.held.drain(..count).map(|(info, _)| info));
        self.given += count as u32;
    }

    fn end_with_stop_token(&mut self, info: TokenInfo, delta: &mut Delta) {
        let matched = if self.stop_token_ids.contains(&info.token) { info.token.to_string() } else { String::new() };
        self.flush(delta);
        if delta.ending.is_some() {
            // The last held text completed a stop string after all.
            return;
        }
        self.held.push((info, 0));
        self.give(self.held.len(), delta);
        delta.ending = Some(self.ending(FinishReason::Stop, 1, matched));
    }

    fn end(&mut self, reason: FinishReason, delta: &mut Delta) {
        self.flush(delta);
        if delta.ending.is_none() {
            self.give(self.held.len(), delta);
            delta.ending = Some(self.ending(reason, 0, String::new()));
        }
    }

    /// No more text comes: what was held back is certain.
    fn flush(&mut self, delta: &mut Delta) {
        let rest = self.detokenizer.finish();
        self.take(None, &rest, delta);
        if delta.ending.is_none() {
            delta.text.push_str(&self.matcher.finish());
            self.held_bytes = 0;
        }
    }

    fn ending(&self, reason: FinishReason, hidden_tokens: u32, matched_stop: String) -> Ending {
        Ending { reason, completion_tokens: self.tokens, hidden_tokens, matched_stop }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Params;
    use crate::model::Model;
    use crate::text::tokenizer::fixtures::{byte_level, folder};

    struct Run {
        output: Output,
        deltas: Vec<Delta>,
    }

    fn run(params: Params, text: &str, end: Option<(u32, FinishReason)>) -> Run {
        let tokenizer = Arc::new(byte_level());
        let request = params.request(vec![5], &Model::open(&folder(), None).unwrap(), None).unwrap();
        let mut output = Output::new(&request, tokenizer.clone());
        let mut ids = tokenizer.encode(text, false).unwrap();
        ids.extend(end.map(|(id, _)| id));
        let last = ids.len() - 1;
        let mut deltas = Vec::new();
        for (i, id) in ids.into_iter().enumerate() {
            let mut event = RunEvent { position: i as u32, ..RunEvent::default() };
            event.token = Some(TokenInfo { token: id, ..TokenInfo::default() });
            event.finish = end.filter(|_| i == last).map(|(_, reason)| reason.into());
            deltas.extend(output.push(event));
            if deltas.last().is_some_and(|d| d.ending.is_some()) {
                break;
            }
        }
        Run { output, deltas }
    }

    impl Run {
        fn text(&self) -> String {
            self.deltas.iter().map(|d| d.text.as_str()).collect()
        }

        /// Tokens of each delta; positions must follow on each other.
        fn counts(&self) -> Vec<usize> {
            let mut position = 0;
            for delta in &self.deltas {
                assert_eq!(delta.position, position);
                position += delta.tokens.len() as u32;
            }
            self.deltas.iter().map(|d| d.tokens.len()).collect()
        }

        fn ending(&self) -> (FinishReason, u32, u32, &str) {
            let ending = self.deltas.last().unwrap().ending.as_ref().unwrap();
            (ending.reason, ending.completion_tokens, ending.hidden_tokens, &ending.matched_stop)
        }
    }

    fn stop(stop: &str) -> Params {
        Params { stop: vec![stop.into()], ..Params::default() }
    }

    #[test]
    fn the_end_of_sentence_is_counted_and_has_no_text() {
        let run = run(Params::default(), "9é", Some((1, FinishReason::Stop)));
        assert_eq!(run.text(), "9é");
        assert_eq!(run.counts(), [1, 1, 1, 1]);
        assert_eq!(run.ending(), (FinishReason::Stop, 4, 1, ""));
    }

    #[test]
    fn a_stop_string_ends_the_text_and_tokens_wait_for_it() {
        let run = run(stop("END"), "aENbENDzz", Some((1, FinishReason::Stop)));
        assert_eq!(run.text(), "aENb");
        assert_eq!(run.counts(), [1, 3, 3]);
        assert_eq!(run.ending(), (FinishReason::Stop, 7, 3, "END"));
    }

    #[test]
    fn a_stop_string_that_does_not_come_is_text() {
        let run = run(stop("END"), "aEN", Some((1, FinishReason::Stop)));
        assert_eq!((run.text().as_str(), run.counts()), ("aEN", vec![1, 3]));
        assert_eq!(run.ending(), (FinishReason::Stop, 4, 1, ""));
    }

    #[test]
    fn a_stop_token_is_named_and_length_and_abort_flush() {
        let params = Params { stop_token_ids: vec![26], ..stop("zz") };
        let named = run(params, "ab", Some((26, FinishReason::Stop)));
        assert_eq!(named.ending(), (FinishReason::Stop, 3, 1, "26"));
        let cut = run(stop("zz"), "abz", Some((16 + 0xC3, FinishReason::Length)));
        assert_eq!(cut.text(), "abz\u{FFFD}");
        assert_eq!(cut.ending(), (FinishReason::Length, 4, 0, ""));
        let mut aborted = run(stop("zz"), "abz", None);
        let last = aborted.output.abort();
        assert_eq!((last.text.as_str(), last.tokens.len(), last.position), ("z", 1, 2));
    }
}
