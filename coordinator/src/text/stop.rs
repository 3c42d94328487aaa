//! Stop strings: ends the text before the first one, wherever it lies across tokens.
//!
//! The match that is complete first wins; of those that end at the same byte, the longest. So the answer does not depend
//! on how the text was cut into pieces.

/// What is certain after a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub struct Emitted {
    pub text: String,
    /// Index of the stop string that ended the text.
    pub matched: Option<usize>,
}

pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the start of a stop string.
    held: String,
}

impl StopMatcher {
    /// None of `stops` is empty.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|s| !s.is_empty()), "an empty stop string matches everywhere");
        Self { stops, held: String::new() }
    }

    /// Takes the next piece of text. After a match nothing more may be pushed.
    pub fn push(&mut self, piece: &str) -> Emitted {
        let searched = self.held.len();
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_match(searched) {
            self.held.truncate(start);
            return Emitted { text: std::mem::take(&mut self.held), matched: Some(stop) };
        }
        let kept = self.held.split_off(self.certain());
        Emitted { text: std::mem::replace(&mut self.held, kept), matched: None }
    }

    /// The rest, when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start and index of the match that ends first, after the first `searched` bytes.
    fn first_match(&self, searched: usize) -> Option<(usize, usize)> {
        let ends = self.stops.iter().enumerate().filter_map(|(i, stop)| {
            // A match cannot end within what was searched before.
            let from = self.char_boundary((searched + 1).saturating_sub(stop.len()));
            self.held[from..].find(stop.as_str()).map(|at| (from + at + stop.len(), from + at, i))
        });
        ends.min().map(|(_, start, i)| (start, i))
    }

    fn char_boundary(&self, mut at: usize) -> usize {
        at = at.min(self.held.len());
        while !self.held.is_char_boundary(at) {
            at -= 1;
        }
        at
    }

    /// Bytes at the front that can be part of no stop string to come.
    fn certain(&self) -> usize {
        let starts_a_stop = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.char_boundary((self.held.len() + 1).saturating_sub(longest));
        let tails = self.held[from..].char_indices().map(|(i, _)| from + i);
        tails.into_iter().find(|at| starts_a_stop(&self.held[*at..])).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut text = String::new();
        for piece in pieces {
            let emitted = matcher.push(piece);
            text += &emitted.text;
            if emitted.matched.is_some() {
                return (text, emitted.matched);
            }
        }
        (text + &matcher.finish(), None)
    }

    #[test]
    fn ends_before_the_first_stop_string() {
        type Row = (&'static [&'static str], &'static [&'static str], &'static str, Option<usize>);
        let table: [Row; 8] = [
            (&[], &["ab", "c"], "abc", None),
            (&["END"], &["xE", "N", "Dy"], "x", Some(0)),
            (&["END"], &["xE", "N"], "xEN", None),
            (&["aab"], &["aa", "a", "b"], "a", Some(0)),
            (&["bcd", "c"], &["abcd"], "ab", Some(1)),
            (&["b", "ab"], &["xab"], "x", Some(1)),
            (&["é!"], &["caf", "é", "!"], "caf", Some(0)),
            (&["日本"], &["日", "日本"], "日", Some(0)),
        ];
        for (stops, pieces, text, matched) in table {
            assert_eq!(run(stops, pieces), (text.to_owned(), matched), "{stops:?} {pieces:?}");
        }
    }

    #[test]
    fn gives_out_what_is_certain_at_once() {
        let mut matcher = StopMatcher::new(vec!["###".into()]);
        assert_eq!(matcher.push("abc#").text, "abc");
        assert_eq!(matcher.push("d").text, "#d");
    }

    /// Byte by byte: the first end, then the first start.
    fn oracle(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 0..=text.len() {
            let matches = stops.iter().enumerate().filter(|(_, s)| text.as_bytes()[..end].ends_with(s.as_bytes()));
            if let Some((i, stop)) = matches.min_by_key(|(i, s)| (usize::MAX - s.len(), *i)) {
                return (text[..end - stop.len()].to_owned(), Some(i));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn every_cut_gives_the_same(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,3}", 0..12),
        ) {
            let whole = pieces.concat();
            let stop_refs: Vec<_> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<_> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stop_refs, &pieces), oracle(&stops, &whole));
        }
    }
}
