//! Silent, late and slow workers: what is asked twice, and how much of it.

use std::ops::Range;

use super::*;

/// Workers 0, 1 and 2 have everything.
fn three() -> Bench {
    Bench::new(&[&[0, 1, 2], &[0, 1, 2]])
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Some calls of one frame, one after the other, each answered after `time`, while all workers speak.
fn warm(bench: &mut Bench, calls: Range<u64>, time: Duration) {
    for call in calls {
        let sent = bench.call(call, &[[0, 1]]).start;
        bench.pass_with(time, &[0, 1, 2, 3]);
        bench.answer(sent);
    }
}

#[test]
fn what_a_silent_worker_was_asked_is_asked_of_others_as_well_and_the_first_answer_counts() {
    let mut bench = three();
    // Silence is not bounded by the credit.
    bench.tracker.credit = 0.0;
    bench.pass_with(ms(100), &[0, 1, 2, 3]);
    let first = bench.call(3, &[[0, 1]]).start;
    assert_eq!(bench.number_of(first), 0);
    bench.pass_with(SILENT_AFTER, &[1, 2, 3]);
    assert_eq!((bench.rank(0), bench.sent.len()), (Rank::Good, 1));
    bench.pass_with(ms(20), &[1, 2, 3]);
    assert_eq!((bench.rank(0), bench.sent.len(), bench.number_of(1)), (Rank::Silent, 2, 1));
    // Once, until that one is silent as well.
    bench.pass_with(SILENT_AFTER, &[2, 3]);
    assert_eq!(bench.sent.len(), 2);
    bench.pass_with(ms(20), &[2, 3]);
    assert_eq!((bench.sent.len(), bench.number_of(2)), (3, 2));
    bench.pass_with(ms(1000), &[2, 3]);
    assert_eq!(bench.sent.len(), 3);

    // The second one comes back first.
    bench.answer(1);
    bench.assert_done(&[3]);
    assert_eq!(bench.tracker.outstanding(), 0);
    [0, 2].into_iter().for_each(|sent| bench.answer(sent));
    let counts = Counts { sent: 3, hedged: 2, terms: 6, terms_hedged: 4, unmatched: 2, ..Counts::default() };
    assert_eq!((bench.tracker.counts(), bench.tracker.credit), (counts, 0.08));
}

#[test]
fn a_silent_worker_is_asked_only_where_there_is_no_other() {
    let mut bench = three();
    bench.pass_with(ms(500), &[1, 3]);
    for call in 1..5 {
        let sent = bench.call(call, &[[0, 1]]).start;
        assert_eq!(bench.number_of(sent), 1);
    }
    bench.edge_down(1);
    assert_eq!((bench.sent.len(), bench.tracker.outstanding()), (8, 4));
    let silent: Vec<u64> = (4..8).map(|sent| bench.number_of(sent)).collect();
    assert_eq!(silent, [2, 2, 0, 2]);
    bench.heard(0);
    bench.heard(2);
    (4..8).for_each(|sent| bench.answer(sent));
    bench.assert_done(&[1, 2, 3, 4]);
}

#[test]
fn where_all_are_silent_a_frame_waits_for_one_to_speak() {
    let mut bench = three();
    bench.tracker.credit = 0.0;
    let first = bench.call(1, &[[0, 1]]).start;
    bench.pass_with(ms(1500), &[3]);
    assert_eq!((bench.sent.len(), bench.number_of(first)), (1, 1));
    // At the latest after the longest wait between two tries.
    bench.pass_with(RETRY_MAX, &[2, 3]);
    assert_eq!((bench.sent.len(), bench.number_of(1)), (2, 2));
    bench.answer(1);
    bench.assert_done(&[1]);
}

#[test]
fn a_late_frame_is_asked_of_another_good_holder_once_and_within_the_credit() {
    let mut bench = three();
    // They need 10 ms as a rule, and so are late after 40.
    warm(&mut bench, 0..9, ms(10));
    bench.tracker.credit = 3.0;
    let before = bench.tracker.counts();
    let first = bench.call(9, &[[0, 1]]).start;
    bench.pass_with(ms(40), &[0, 1, 2, 3]);
    assert_eq!(bench.tracker.counts().hedged, before.hedged);
    bench.pass_with(ms(200), &[0, 1, 2, 3]);
    assert_eq!((bench.tracker.counts().hedged, bench.sent.len()), (before.hedged + 1, first + 2));
    assert_eq!((bench.number_of(first), bench.number_of(first + 1)), (0, 1));
    bench.answer(first + 1);

    // There is no credit for the next one, which waits.
    let second = bench.call(10, &[[0, 1]]).start;
    bench.pass_with(ms(200), &[0, 1, 2, 3]);
    assert_eq!(bench.sent.len(), second + 1);
    bench.tracker.credit = 2.0;
    bench.pass_with(ms(10), &[0, 1, 2, 3]);
    assert_eq!((bench.sent.len(), bench.tracker.credit), (second + 2, 0.0));
    bench.answer(second);
    bench.assert_done(&(0..11).collect::<Vec<_>>());
}

#[test]
fn a_frame_whose_second_worker_is_lost_may_be_asked_of_a_third() {
    let mut bench = three();
    let first = bench.call(1, &[[0, 1]]).start;
    bench.pass_with(ms(100), &[0, 1, 2, 3]);
    assert_eq!((bench.number_of(first), bench.number_of(first + 1)), (1, 2));
    bench.edge_down(2);
    assert_eq!(bench.tracker.outstanding(), 1, "it still waits for the first");
    bench.pass_with(ms(10), &[0, 1, 3]);
    assert_eq!(bench.number_of(first + 2), 0);
    bench.edge_down(1);
    bench.edge_down(0);
    assert_eq!(bench.tracker.outstanding(), 0);
    bench.heard(2);
    bench.answer(first + 3);
    bench.assert_done(&[1]);
}

/// Workers that take so many ms for an answer, or never give one.
struct Pace {
    bench: Bench,
    times: [Option<u64>; 3],
    /// Frames that were looked at, and those that will be answered, and when.
    seen: usize,
    due: Vec<(Duration, usize)>,
}

impl Pace {
    fn new(times: [u64; 3]) -> Self {
        Self { bench: three(), times: times.map(Some), seen: 0, due: Vec::new() }
    }

    /// Calls one after the other; how many frames worker 0 got.
    fn run(&mut self, calls: Range<u64>) -> usize {
        let first = self.seen;
        for call in calls {
            self.bench.call(call, &[[0, 1]]);
            while !self.bench.ends.contains_key(&call) {
                for sent in self.seen..self.bench.sent.len() {
                    let time = self.times[self.bench.number_of(sent) as usize];
                    self.due.extend(time.map(|time| (self.bench.now + ms(time), sent)));
                }
                self.seen = self.bench.sent.len();
                self.bench.pass_with(ms(1), &[0, 1, 2, 3]);
                let now = self.bench.now;
                let (due, later) = self.due.iter().partition(|(at, _)| *at <= now);
                self.due = later;
                let due: Vec<(Duration, usize)> = due;
                due.into_iter().for_each(|(_, sent)| self.bench.answer(sent));
            }
        }
        (first..self.seen).filter(|sent| self.bench.number_of(*sent) == 0).count()
    }

    fn is_slow(&self) -> bool {
        self.bench.rank(0) == Rank::Slow
    }
}

#[test]
fn a_slow_worker_is_steered_around_and_probed_until_it_is_well_again() {
    let mut pace = Pace::new([4, 4, 4]);
    assert_eq!(pace.run(0..30), 10);
    // Its answers come after those of the others that are asked as well, and still say how slow it is.
    pace.times[0] = Some(80);
    let asked = pace.run(30..60);
    assert!(pace.is_slow() && asked <= 5, "{asked} frames");
    let start = pace.bench.now;
    let asked = pace.run(60..560);
    let probes = (pace.bench.now - start).as_millis() as usize / 500;
    assert!(pace.is_slow() && (probes - 1..=probes + 1).contains(&asked), "{asked} frames, {probes} probes");

    // It recovers after some probes, though the others' answers come before its own.
    pace.times[0] = Some(5);
    let start = pace.bench.now;
    let mut call = 560;
    while pace.is_slow() {
        pace.run(call..call + 1);
        call += 1;
    }
    assert!(pace.bench.now - start < Duration::from_secs(4), "after {:?}", pace.bench.now - start);
    assert_eq!(pace.run(call..call + 30), 10);
    pace.bench.assert_done(&(0..call + 30).collect::<Vec<_>>());
    let Counts { terms, terms_hedged, .. } = pace.bench.tracker.counts();
    assert!(terms_hedged * 20 < terms, "{terms_hedged} of {terms}");
}

#[test]
fn a_worker_that_sends_pings_back_and_never_answers_is_slow_soon() {
    for warm in [0, 30] {
        let mut pace = Pace::new([1, 1, 1]);
        pace.run(0..warm);
        pace.times[0] = None;
        let asked = pace.run(100..300);
        assert!(pace.is_slow() && asked <= 6, "{asked} frames");
    }
}

#[test]
fn one_late_answer_makes_nobody_slow_and_neither_does_a_freeze_for_long() {
    let mut bench = three();
    warm(&mut bench, 0..30, ms(10));
    let sent = bench.call(30, &[[0, 1]]).start;
    bench.pass_with(ms(30), &[0, 1, 2, 3]);
    bench.answer(sent);
    assert_eq!((bench.number_of(sent), bench.rank(0)), (0, Rank::Good));

    // It freezes with three frames, and answers them when it thaws.
    let frozen: Vec<usize> = [33, 36, 39].map(|call| bench.call(call, &[[0, 1]]).start).into();
    bench.pass_with(ms(2500), &[1, 2, 3]);
    (frozen[2] + 1..bench.sent.len()).for_each(|sent| bench.answer(sent));
    bench.heard(0);
    frozen.into_iter().for_each(|sent| bench.answer(sent));
    let thawed = bench.now;
    let mut call = 100;
    while bench.rank(0) == Rank::Slow {
        warm(&mut bench, call..call + 1, ms(10));
        call += 1;
    }
    assert!(bench.now - thawed < Duration::from_secs(3), "after {:?}", bench.now - thawed);
}

#[test]
fn a_slow_worker_that_holds_some_of_what_others_compute_is_probed_with_that() {
    // Worker 1 has everything, worker 0 one of the experts, and is slow.
    let mut bench = Bench::new(&[&[0, 1], &[1]]);
    for call in (0..40).step_by(2) {
        let sent = bench.call(call, &[[0, 1]]);
        let number = sent.clone().find(|sent| bench.number_of(*sent) == 1);
        bench.pass_with(ms(1), &[0, 1]);
        number.into_iter().for_each(|sent| bench.answer(sent));
        bench.pass_with(ms(70), &[0, 1]);
        let rest: Vec<usize> = (sent.start..bench.sent.len()).filter(|sent| Some(*sent) != number).collect();
        rest.into_iter().for_each(|sent| bench.answer(sent));
    }
    assert_eq!(bench.rank(0), Rank::Slow);
    bench.pass_with(ms(500), &[0, 1]);
    let sent = bench.call(100, &[[0, 1], [0, 1]]);
    let asked: Vec<_> = sent.clone().map(|sent| (bench.number_of(sent), bench.sent[sent].1.terms().len())).collect();
    assert_eq!(asked, [(1, 4), (0, 2)]);
    // Nobody waits for its answer.
    assert_eq!(bench.tracker.outstanding(), 1);
    bench.answer(sent.start);
    bench.answer(sent.start + 1);
    let unmatched = bench.tracker.counts().unmatched;
    bench.answer(sent.start + 1);
    assert_eq!(bench.tracker.counts().unmatched, unmatched + 1);
    assert!(bench.tracker.given_up.is_empty());
}

#[test]
fn a_slow_worker_that_alone_has_an_expert_is_asked_and_not_probed() {
    let mut bench = Bench::new(&[&[0], &[1]]);
    for call in 0..10 {
        let sent = bench.call(call, &[[0, 1]]).start;
        bench.pass_with(ms(1), &[0, 1]);
        bench.answer(sent + 1);
        bench.pass_with(ms(70), &[0, 1]);
        bench.answer(sent);
    }
    assert_eq!(bench.rank(0), Rank::Slow);
    bench.pass_with(ms(1000), &[0, 1]);
    bench.call(10, &[[0, 1]]);
    bench.pass_with(ms(1000), &[0, 1]);
    assert_eq!((bench.tracker.counts().hedged, bench.tracker.outstanding()), (0, 2));
}

#[test]
fn what_nobody_waits_for_is_forgotten_after_a_while() {
    let mut bench = three();
    bench.call(1, &[[0, 1]]);
    bench.on(Event::Abandoned { call: CallId(1) });
    bench.call(2, &[[0, 1]]);
    assert_eq!(bench.tracker.given_up.len(), 1);
    bench.pass_with(DEADLINE, &[0, 1, 2, 3]);
    bench.pass_with(TICK, &[0, 1, 2, 3]);
    bench.call(3, &[[0, 1]]);
    bench.pass(TICK);
    let kept: Vec<u32> = bench.tracker.given_up.keys().map(|key| key.sequence).collect();
    assert!(!kept.contains(&bench.key(0).sequence), "{kept:?}");
    bench.edge_down(0);
    bench.edge_down(1);
    bench.edge_down(2);
    assert!(bench.tracker.given_up.is_empty());
}
