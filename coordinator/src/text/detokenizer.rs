//! Tokens to text, one token at a time. Never splits a character: bytes that may still become one are held back.
//!
//! The pieces put together are what decoding all tokens at once gives.

use std::sync::Arc;

use super::Tokenizer;

/// Tokens held back at most where a decoder needs what stands before: after these the text is given out as it is.
const WINDOW_TOKENS_MAX: usize = 64;

pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    state: State,
}

enum State {
    /// Bytes of an unfinished character: at most three.
    Bytes(Vec<u8>),
    Window(Window),
}

/// For decoders that look at neighbours (word pieces, space marks): decodes the tokens of two consecutive pieces
/// together, and gives out what the second one added.
#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    /// Tokens of `ids` whose text was given out.
    given: usize,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let bytes = tokenizer.has_byte_table();
        let state = if bytes { State::Bytes(Vec::new()) } else { State::Window(Window::default()) };
        Self { tokenizer, state }
    }

    /// The text that is certain with this token; empty for special tokens.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        match &mut self.state {
            State::Bytes(held) => {
                held.extend(self.tokenizer.bytes_of(id));
                take_characters(held)
            }
            State::Window(window) => window.push(&self.tokenizer, id),
        }
    }

    /// What was held back; an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(held) => String::from_utf8_lossy(&std::mem::take(held)).into_owned(),
            State::Window(window) => window.give(&self.tokenizer),
        }
    }
}

/// Takes all but an unfinished character at the end; what can be no character becomes U+FFFD.
fn take_characters(held: &mut Vec<u8>) -> String {
    let unfinished = match held.utf8_chunks().last() {
        // At the end of a chunk, `invalid` may be the start of a character.
        Some(chunk) if std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none()) => {
            chunk.invalid().len()
        }
        _ => 0,
    };
    let rest = held.split_off(held.len() - unfinished);
    String::from_utf8_lossy(&std::mem::replace(held, rest)).into_owned()
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.ids.push(id);
        let unfinished = tokenizer.decode_window(&self.ids).ends_with(char::REPLACEMENT_CHARACTER);
        if unfinished && self.ids.len() - self.given < WINDOW_TOKENS_MAX {
            return String::new();
        }
        self.give(tokenizer)
    }

    fn give(&mut self, tokenizer: &Tokenizer) -> String {
        let before = tokenizer.decode_window(&self.ids[..self.given]);
        let after = tokenizer.decode_window(&self.ids);
        let piece = after.get(before.len()..).unwrap_or_default().to_owned();
        // An empty piece says nothing about where the next one starts: keep the tokens for it.
        if !piece.is_empty() {
            self.ids.drain(..self.given);
            self.given = self.ids.len();
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tokenizer::fixtures;

    fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer.clone());
        let mut pieces: Vec<_> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    #[test]
    fn a_character_comes_out_whole() {
        let tokenizer = Arc::new(fixtures::byte_level());
        let ids = tokenizer.encode("a🦀é", false).unwrap();
        assert_eq!(pieces(&tokenizer, &ids), ["a", "", "", "", "🦀", "", "é", ""]);
        assert_eq!(pieces(&tokenizer, &ids[..3]), ["a", "", "", "\u{FFFD}"]);
    }

    #[test]
    fn words_are_joined_by_spaces() {
        let tokenizer = Arc::new(fixtures::words());
        assert_eq!(pieces(&tokenizer, &[3, 1, 2]), ["w3", " w1", " w2", ""]);
    }

    proptest! {
        #[test]
        fn bytes_together_are_the_full_decode(ids in prop::collection::vec(0u32..290, 0..80)) {
            let tokenizer = Arc::new(fixtures::byte_level());
            prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids));
        }

        #[test]
        fn words_together_are_the_full_decode(ids in prop::collection::vec(0u32..40, 0..80)) {
            let tokenizer = Arc::new(fixtures::words());
            prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids));
        }

        /// Texts, not random bytes: for a broken run of bytes this decoder's own answer depends on what follows.
        #[test]
        fn byte_fallback_text_together_is_the_full_decode(text in "[ab é日🦀ñ]{0,20}") {
            let tokenizer = Arc::new(fixtures::byte_fallback());
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids));
        }
    }
}
