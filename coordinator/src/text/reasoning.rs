//! Splits what a reasoning model writes into its reasoning (between `<think>` and `</think>`) and its answer.
//!
//! The reasoning starts at once if the prompt already opened it, or if the text starts with `<think>`; otherwise all is
//! answer. White space around the marks belongs to neither part.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// What a piece of text added to each part.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Split {
    pub reasoning: String,
    pub answer: String,
}

pub struct ReasoningSplitter {
    part: Part,
    /// Text whose part is not yet certain.
    held: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Before anything but white space: the mark may come.
    Start,
    /// After the opening mark, before the first character of the reasoning.
    ReasoningStart,
    Reasoning,
    /// After the closing mark, before the first character of the answer.
    AnswerStart,
    Answer,
}

impl ReasoningSplitter {
    /// `opened`: the prompt ends within the reasoning.
    pub fn new(opened: bool) -> Self {
        Self { part: if opened { Part::ReasoningStart } else { Part::Start }, held: String::new() }
    }

    /// True if a rendered prompt ends with the opening mark.
    pub fn opened_by(prompt: &str) -> bool {
        prompt.trim_end().ends_with(OPEN)
    }

    pub fn push(&mut self, piece: &str) -> Split {
        self.held.push_str(piece);
        let mut split = Split::default();
        while self.step(&mut split) {}
        split
    }

    /// The rest, when no more text comes.
    pub fn finish(&mut self) -> Split {
        let rest = std::mem::take(&mut self.held);
        match self.part {
            Part::Start | Part::Answer | Part::AnswerStart => Split { answer: rest, ..Split::default() },
            Part::ReasoningStart | Part::Reasoning => Split { reasoning: rest, ..Split::default() },
        }
    }

    /// Moves on by one decision; false when more text is needed.
    fn step(&mut self, split: &mut Split) -> bool {
        match self.part {
            Part::Start => self.decide_start(),
            Part::ReasoningStart => self.skip_white_space(Part::Reasoning),
            Part::Reasoning => self.take_reasoning(&mut split.reasoning),
            Part::AnswerStart => self.skip_white_space(Part::Answer),
            Part::Answer => {
                split.answer.push_str(&std::mem::take(&mut self.held));
                false
            }
        }
    }

    fn decide_start(&mut self) -> bool {
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(OPEN) {
            self.held = rest.to_owned();
            self.part = Part::ReasoningStart;
            return true;
        }
        let undecided = OPEN.starts_with(text);
        if !undecided {
            self.part = Part::Answer;
        }
        !undecided
    }

    fn skip_white_space(&mut self, next: Part) -> bool {
        self.held = self.held.trim_start().to_owned();
        if !self.held.is_empty() {
            self.part = next;
        }
        !self.held.is_empty()
    }

    fn take_reasoning(&mut self, out: &mut String) -> bool {
        if let Some(at) = self.held.find(CLOSE) {
            out.push_str(self.held[..at].trim_end());
            self.held.drain(..at + CLOSE.len());
            self.part = Part::AnswerStart;
            return true;
        }
        // Held back: the start of a closing mark, and the white space before it.
        let tails = (1..CLOSE.len()).rev().find(|n| self.held.ends_with(&CLOSE[..*n]));
        let certain = self.held[..self.held.len() - tails.unwrap_or(0)].trim_end().len();
        out.extend(self.held.drain(..certain));
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run<'a>(opened: bool, pieces: impl IntoIterator<Item = &'a str>) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(opened);
        let mut parts: Vec<_> = pieces.into_iter().map(|piece| splitter.push(piece)).collect();
        parts.push(splitter.finish());
        let join = |f: fn(&Split) -> &str| parts.iter().map(f).collect::<String>();
        (join(|s| &s.reasoning), join(|s| &s.answer))
    }

    #[test]
    fn every_split_gives_the_same_parts() {
        let table = [
            (false, "<think>\n7+2=9\n</think>\n9", "7+2=9", "9"),
            (true, "\nwell\n\n</think>\n\nyes ", "well", "yes "),
            (false, "  plain <think> text", "", "  plain <think> text"),
            (false, "<thin", "", "<thin"),
            (false, "<think>cut off </thi", "cut off </thi", ""),
            (false, "<think>a </b> </think>", "a </b>", ""),
            (true, "</think>only <think>é</think>", "", "only <think>é</think>"),
            (false, "<think>日本\n </think>\n", "日本", ""),
            (false, "", "", ""),
            (false, " \n", "", " \n"),
        ];
        for (opened, text, reasoning, answer) in table {
            let expected = (reasoning.to_owned(), answer.to_owned());
            assert_eq!(run(opened, [text]), expected, "{text:?} whole");
            let cuts = text.char_indices().map(|(i, _)| i);
            for cut in cuts {
                assert_eq!(run(opened, [&text[..cut], &text[cut..]]), expected, "{text:?} cut at {cut}");
            }
            assert_eq!(run(opened, text.split_inclusive(|_| true)), expected, "{text:?} by characters");
        }
    }

    #[test]
    fn reasoning_is_given_out_as_it_comes() {
        let mut splitter = ReasoningSplitter::new(false);
        assert_eq!(splitter.push("<think>\nab"), Split { reasoning: "ab".into(), answer: String::new() });
        assert_eq!(splitter.push("cd"), Split { reasoning: "cd".into(), answer: String::new() });
        assert_eq!(splitter.push(" <"), Split::default());
        assert_eq!(splitter.push("5"), Split { reasoning: " <5".into(), answer: String::new() });
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            opened: bool,
            pieces in prop::collection::vec(
                prop_oneof!["[ab é\n<]{0,3}", Just("<think>".to_owned()), Just("</think>".to_owned()), "<think?|</thin?|k>|nk>"],
                0..10,
            ),
        ) {
            let whole = pieces.concat();
            prop_assert_eq!(run(opened, pieces.iter().map(String::as_str)), run(opened, [whole.as_str()]));
        }
    }
}
