//! Judges a run by what its clients saw: nothing here knows of processes, networks or clocks.
//!
//! * lost: the answer did not come to its end, or is too short
//! * changed: what came is not what the undisturbed run gave
//! * repeated: a position came twice, or before its turn
//! * stall: the longest wait between two tokens of an answer, less the 99th percentile of the same request's waits in
//!   the undisturbed run

use std::time::Duration;

use serde::Serialize;

/// What one client saw of one answer.
#[derive(Clone, Debug)]
pub struct History {
    /// Index of the request.
    pub request: usize,
    /// Times are counted from the start of the run.
    pub sent: Duration,
    pub arrivals: Vec<Arrival>,
    /// How often it went on after its stream had broken.
    pub resumed: usize,
    pub end: End,
}

#[derive(Clone, Debug)]
pub struct Arrival {
    pub at: Duration,
    pub piece: Piece,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Token {
        position: u32,
        id: u32,
    },
    /// A server-sent event; its id is empty if it had none.
    Text {
        event: String,
        text: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Finished,
    /// Before the first token, because there is no room.
    Refused(Refusal),
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub after: Duration,
    pub has_retry_after: bool,
}

/// A whole answer: ids as decimal numbers or text, so that one comparison does for both doors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Tokens(Vec<u32>),
    Text(String),
}

/// How the undisturbed run went: the 99th percentile of waits, of each request and of all together.
#[derive(Clone, Debug, Default)]
pub struct Calm {
    pub wait_p99: Vec<Duration>,
    pub all_p99: Duration,
    /// Tokens a second.
    pub rate: f64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Judgement {
    pub streams: usize,
    pub lost: usize,
    pub changed: usize,
    pub repeated: usize,
    pub resumed: usize,
    pub stall_s: f64,
    /// The longest that an answer took to begin: no stall, and worth a look.
    pub first_s: f64,
    /// What was wrong, the most frequent first.
    pub complaints: Vec<String>,
}

const COMPLAINTS_MAX: usize = 6;

pub fn judge(histories: &[History], golden: &[Answer], calm: &Calm) -> Judgement {
    let mut judgement = Judgement { streams: histories.len(), ..Judgement::default() };
    let mut complaints = Complaints::default();
    for history in histories {
        let request = history.request;
        let (answer, repeated) = history.answer();
        let (came, whole) = (answer.len(), golden[request].len());
        if repeated > 0 {
            judgement.repeated += 1;
            complaints.add(request, "repeated", format!("{repeated} pieces came twice or before their turn"));
        }
        let fits = answer.begins(&golden[request]);
        if let Err(place) = fits {
            judgement.changed += 1;
            complaints.add(request, "changed", format!("changed from {place} on"));
        }
        let lost = match &history.end {
            End::Failed(reason) => Some(reason.as_str()),
            End::Refused(_) => Some("refused for want of room"),
            End::Finished if fits.is_ok() && came < whole => Some("it ended too early"),
            End::Finished => None,
        };
        if let Some(reason) = lost {
            judgement.lost += 1;
            complaints.add(request, reason, format!("lost after {came} of {whole}: {reason}"));
        }
        judgement.resumed += history.resumed;
        let usual = calm.wait_p99.get(request).copied().unwrap_or_default();
        let stall = history.waits().max().unwrap_or_default().saturating_sub(usual);
        judgement.stall_s = judgement.stall_s.max(stall.as_secs_f64());
        let first = history.arrivals.first().map_or(Duration::ZERO, |arrival| arrival.at.saturating_sub(history.sent));
        judgement.first_s = judgement.first_s.max(first.as_secs_f64());
    }
    judgement.complaints = complaints.told();
    judgement
}

/// The first of each kind, and how many there were.
#[derive(Default)]
struct Complaints(Vec<(String, String, usize)>);

impl Complaints {
    fn add(&mut self, request: usize, kind: &str, text: String) {
        match self.0.iter_mut().find(|(other, ..)| other == kind) {
            Some((.., count)) => *count += 1,
            None => self.0.push((kind.to_owned(), format!("request {request}: {text}"), 1)),
        }
    }

    fn told(mut self) -> Vec<String> {
        self.0.sort_by_key(|(.., count)| std::cmp::Reverse(*count));
        let told = |(_, text, count)| if count == 1 { text } else { format!("{text} ({count} like this)") };
        self.0.into_iter().take(COMPLAINTS_MAX).map(told).collect()
    }
}

impl Judgement {
    pub fn is_exact(&self) -> bool {
        self.lost + self.changed + self.repeated == 0
    }
}

impl History {
    /// What came, each position once, and how many pieces came twice or before their turn.
    pub fn answer(&self) -> (Answer, usize) {
        let mut repeated = 0;
        let (mut ids, mut text) = (Vec::new(), String::new());
        let mut events: Vec<&str> = Vec::new();
        for arrival in &self.arrivals {
            match &arrival.piece {
                Piece::Token { position, id } if *position as usize == ids.len() => ids.push(*id),
                Piece::Token { .. } => repeated += 1,
                Piece::Text { event, .. } if !event.is_empty() && events.contains(&event.as_str()) => repeated += 1,
                Piece::Text { event, text: piece } => {
                    events.push(event);
                    text.push_str(piece);
                }
            }
        }
        let is_text = self.arrivals.iter().any(|arrival| matches!(arrival.piece, Piece::Text { .. }));
        (if is_text { Answer::Text(text) } else { Answer::Tokens(ids) }, repeated)
    }

    /// Between one piece and the next.
    pub fn waits(&self) -> impl Iterator<Item = Duration> + '_ {
        self.arrivals.windows(2).map(|pair| pair[1].at.saturating_sub(pair[0].at))
    }

    /// Those that ended in a part of the run.
    pub fn waits_within(&self, from: Duration, to: Duration) -> impl Iterator<Item = Duration> + '_ {
        let within = self.arrivals.windows(2).filter(move |pair| from <= pair[1].at && pair[1].at < to);
        within.map(|pair| pair[1].at.saturating_sub(pair[0].at))
    }

    /// The one in the middle of which `time` lies.
    pub fn wait_at(&self, time: Duration) -> Option<Duration> {
        let pair = self.arrivals.windows(2).find(|pair| pair[0].at <= time && time < pair[1].at)?;
        Some(pair[1].at - pair[0].at)
    }

    pub fn arrived_by(&self, time: Duration) -> usize {
        self.arrivals.iter().filter(|arrival| arrival.at <= time).count()
    }
}

impl Answer {
    pub fn len(&self) -> usize {
        match self {
            Self::Tokens(ids) => ids.len(),
            Self::Text(text) => text.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is how `whole` begins; if not, the first place where they differ.
    fn begins(&self, whole: &Self) -> Result<(), usize> {
        match (self, whole) {
            (Self::Tokens(part), Self::Tokens(whole)) => prefix(part, whole),
            (Self::Text(part), Self::Text(whole)) => prefix(part.as_bytes(), whole.as_bytes()),
            // Nothing has come yet: which of the two it was to be is not known.
            (part, _) if part.is_empty() => Ok(()),
            _ => Err(0),
        }
    }
}

fn prefix<T: PartialEq>(part: &[T], whole: &[T]) -> Result<(), usize> {
    let same = part.iter().zip(whole).take_while(|(a, b)| a == b).count();
    if same == part.len() { Ok(()) } else { Err(same) }
}

impl Calm {
    pub fn of(histories: &[History], requests: usize) -> Self {
        let of_request = |request| histories.iter().filter(move |history: &&History| history.request == request);
        let wait_p99 = (0..requests).map(|request| p99(of_request(request).flat_map(History::waits))).collect();
        Self { wait_p99, all_p99: p99(histories.iter().flat_map(History::waits)), rate: rate(histories, None) }
    }
}

/// The smallest that is not exceeded by 99 of 100.
pub fn p99(waits: impl Iterator<Item = Duration>) -> Duration {
    let mut waits: Vec<Duration> = waits.collect();
    waits.sort_unstable();
    let rank = (waits.len() * 99).div_ceil(100);
    waits.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// Tokens a second in a part of the run; unset: while all clients were busy.
pub fn rate(histories: &[History], part: Option<(Duration, Duration)>) -> f64 {
    let (from, to) = part.unwrap_or_else(|| busy(histories));
    let within = |arrival: &&Arrival| from <= arrival.at && arrival.at < to;
    let count = histories.iter().flat_map(|history| &history.arrivals).filter(within).count();
    count as f64 / to.saturating_sub(from).as_secs_f64().max(f64::MIN_POSITIVE)
}

/// From the first token of the slowest to begin to the last start of a request.
fn busy(histories: &[History]) -> (Duration, Duration) {
    let first = |history: &History| history.arrivals.first().map(|arrival| arrival.at);
    let begun = histories.iter().filter(|history| history.sent < Duration::from_millis(100)).filter_map(first).max();
    let ended = histories.iter().map(|history| history.sent).max();
    (begun.unwrap_or_default(), ended.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u32; 4] = [7, 8, 9, 7];

    fn tokens(pieces: &[(u64, u32, u32)], end: End) -> History {
        let arrival = |&(ms, position, id): &(u64, u32, u32)| Arrival {
            at: Duration::from_millis(ms),
            piece: Piece::Token { position, id },
        };
        let arrivals = pieces.iter().map(arrival).collect();
        History { request: 0, sent: Duration::ZERO, arrivals, resumed: 0, end }
    }

    fn text(pieces: &[(&str, &str)], end: End) -> History {
        let piece = |(event, text): &(&str, &str)| Piece::Text { event: (*event).into(), text: (*text).into() };
        let arrivals = pieces.iter().map(|p| Arrival { at: Duration::ZERO, piece: piece(p) }).collect();
        History { request: 0, sent: Duration::ZERO, arrivals, resumed: 0, end }
    }

    fn check(history: History, golden: Answer, expect: [usize; 3]) {
        let judgement = judge(&[history], &[golden], &Calm::default());
        assert_eq!([judgement.lost, judgement.changed, judgement.repeated], expect, "{:?}", judgement.complaints);
        assert_eq!(judgement.is_exact(), judgement.complaints.is_empty());
    }

    #[test]
    fn token_streams() {
        let failed = || End::Failed("broken".into());
        let cases = [
            (vec![(1, 0, 7), (2, 1, 8), (3, 2, 9), (4, 3, 7)], End::Finished, [0, 0, 0]),
            // One of the middle differs; one too many.
            (vec![(1, 0, 7), (2, 1, 3), (3, 2, 9), (4, 3, 7)], End::Finished, [0, 1, 0]),
            (vec![(1, 0, 7), (2, 1, 8), (3, 2, 9), (4, 3, 7), (5, 4, 7)], End::Finished, [0, 1, 0]),
            // Too short, by its end or by an error; nothing at all.
            (vec![(1, 0, 7), (2, 1, 8)], End::Finished, [1, 0, 0]),
            (vec![(1, 0, 7), (2, 1, 8)], failed(), [1, 0, 0]),
            (vec![], failed(), [1, 0, 0]),
            // Wrong and then broken.
            (vec![(1, 0, 8)], failed(), [1, 1, 0]),
            // A position twice; one before its turn, which then lacks.
            (vec![(1, 0, 7), (2, 1, 8), (3, 1, 8), (4, 2, 9), (5, 3, 7)], End::Finished, [0, 0, 1]),
            (vec![(1, 0, 7), (2, 2, 9), (3, 3, 7)], End::Finished, [1, 0, 1]),
        ];
        for (pieces, end, expect) in cases {
            check(tokens(&pieces, end), Answer::Tokens(GOLDEN.into()), expect);
        }
    }

    #[test]
    fn text_streams() {
        let golden = || Answer::Text("one two".into());
        check(text(&[("a-0", "one"), ("a-1", " two")], End::Finished), golden(), [0, 0, 0]);
        check(text(&[("", "one"), ("", " two")], End::Finished), golden(), [0, 0, 0]);
        // An event twice is seen by its id, or by the text.
        check(text(&[("a-0", "one"), ("a-0", "one"), ("a-1", " two")], End::Finished), golden(), [0, 0, 1]);
        check(text(&[("", "one"), ("", "one"), ("", " two")], End::Finished), golden(), [0, 1, 0]);
        check(text(&[("a-0", "one")], End::Finished), golden(), [1, 0, 0]);
        check(text(&[], End::Failed("broken".into())), golden(), [1, 0, 0]);
    }

    #[test]
    fn complaints_of_one_kind_are_one() {
        let lost = || tokens(&[(1, 0, 7)], End::Failed("broken".into()));
        let histories = [tokens(&[(1, 0, 8)], End::Finished), lost(), lost()];
        let told = judge(&histories, &[Answer::Tokens(GOLDEN.into())], &Calm::default()).complaints;
        assert_eq!(told, ["request 0: lost after 1 of 4: broken (2 like this)", "request 0: changed from 0 on"]);
    }

    #[test]
    fn a_refusal_is_lost() {
        let refusal = Refusal { after: Duration::ZERO, has_retry_after: true };
        check(tokens(&[], End::Refused(refusal)), Answer::Tokens(GOLDEN.into()), [1, 0, 0]);
    }

    #[test]
    fn a_stall_is_what_goes_beyond_the_usual() {
        let history = tokens(&[(100, 0, 7), (110, 1, 8), (400, 2, 9), (420, 3, 7)], End::Finished);
        let stall = |usual_ms| {
            let calm = Calm { wait_p99: vec![Duration::from_millis(usual_ms)], ..Calm::default() };
            judge(std::slice::from_ref(&history), &[Answer::Tokens(GOLDEN.into())], &calm).stall_s
        };
        let judgement = judge(std::slice::from_ref(&history), &[Answer::Tokens(GOLDEN.into())], &Calm::default());
        assert!((judgement.first_s - 0.100).abs() < 1e-9);
        assert!((stall(0) - 0.290).abs() < 1e-9);
        assert!((stall(90) - 0.200).abs() < 1e-9);
        assert_eq!(stall(1000), 0.0);
    }

    #[test]
    fn percentiles() {
        let of = |n: u64| p99((1..=n).map(Duration::from_millis)).as_millis();
        assert_eq!([of(0), of(1), of(50), of(100), of(101), of(200)], [0, 1, 50, 99, 100, 198]);
    }

    #[test]
    fn waits_and_rates() {
        let history = tokens(&[(100, 0, 7), (200, 1, 8), (400, 2, 9), (420, 3, 7)], End::Finished);
        let ms = Duration::from_millis;
        assert_eq!(history.waits_within(ms(200), ms(420)).collect::<Vec<_>>(), [ms(100), ms(200)]);
        assert_eq!([history.wait_at(ms(300)), history.wait_at(ms(420))], [Some(ms(200)), None]);
        assert_eq!(history.arrived_by(ms(400)), 3);
        assert!((rate(&[history], Some((ms(100), ms(420)))) - 3.0 / 0.32).abs() < 1e-9);
    }
}
