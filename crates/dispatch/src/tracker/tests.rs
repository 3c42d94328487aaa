//! The tracker told what happened, event by event.

use std::collections::{BTreeMap, BTreeSet};

use moesaic_proto::v1::RefusalReason;
use moesaic_proto::{Epoch, ExpertId};
use proptest::prelude::*;

use super::*;
use crate::error::ExpertList;
use crate::frame::{Activations, Content, FLAG_F32, Output, Refusal, Rows, Term};

const HIDDEN: usize = 4;
const LAYER: LayerId = LayerId(9);
const DEADLINE: Duration = Duration::from_millis(100);
const MICRO_BATCH: u8 = 2;

/// One row, and each of these experts as it is.
fn frame(experts: &[u16]) -> RequestFrame {
    let content = Content {
        rows: vec![0],
        outputs: experts.iter().map(|_| Output::single(0)).collect(),
        terms: experts.iter().map(|&e| Term::new(ExpertId(e), 1.0)).collect(),
    };
    let header = Header {
        epoch: Epoch(5),
        layer: LAYER,
        micro_batch: MICRO_BATCH,
        flags: FLAG_F32,
        source: 1,
        slot: 0,
        sequence: 0,
    };
    RequestFrame::new(header, Activations::from(Rows::F32(vec![0.0; HIDDEN])), HIDDEN, content)
}

fn worker(number: u64) -> WorkerId {
    WorkerId::new(&format!("w{number}")).unwrap()
}

/// Worker `number`, over its edge of the same number.
fn to(number: u64) -> Destination {
    Destination { worker: worker(number), edge: Some(EdgeId(number)) }
}

/// The right number of values for a frame; all have this value.
fn values(frame: &RequestFrame, value: f32) -> Shared<f32> {
    vec![value; frame.output_count() * HIDDEN].into()
}

/// How a call ended: the first value of each answer, or the error.
type End = Result<Vec<f32>, DispatchError>;

/// A tracker, what it sent and how its calls ended.
struct Bench {
    tracker: Tracker,
    now: Duration,
    sent: Vec<(WorkerId, RequestFrame)>,
    ends: BTreeMap<u64, End>,
}

impl Bench {
    fn new() -> Self {
        let (tracker, now) = (Tracker::new(HIDDEN, DEADLINE), Duration::ZERO);
        Self { tracker, now, sent: Vec::new(), ends: BTreeMap::new() }
    }

    fn on(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.tracker.on_event(self.now, event, &mut actions);
        for action in actions {
            let (CallId(call), end) = match action {
                Action::Send { to, frame } => {
                    self.sent.push((to.worker, frame));
                    continue;
                }
                Action::Done { call, answers } => (call, Ok(answers.iter().map(|values| values[0]).collect())),
                Action::Failed { call, error } => (call, Err(error)),
            };
            let before = self.ends.insert(call, end);
            assert!(before.is_none(), "call {call} ended twice");
        }
    }

    /// A call with one frame for each worker and its experts; says which frames were sent.
    fn call(&mut self, call: u64, frames: &[(u64, &[u16])]) -> std::ops::Range<usize> {
        let first = self.sent.len();
        let frames = frames.iter().map(|(number, experts)| (to(*number), frame(experts))).collect();
        self.on(Event::Call { call: CallId(call), layer: LAYER, frames });
        first..self.sent.len()
    }

    /// The right answer to the frame that was sent as number `sent`.
    fn answer(&mut self, sent: usize, value: f32) {
        let (worker, frame) = self.sent[sent].clone();
        let answer = AnswerFrame::new(frame.header, Ok(values(&frame, value)));
        self.on(Event::Answer { worker, answer });
    }

    fn key(&self, sent: usize) -> FrameKey {
        FrameKey::of(&self.sent[sent].1.header)
    }

    fn edge_down(&mut self, number: u64) {
        self.on(Event::EdgeDown { edge: EdgeId(number), reason: "it fell".into() });
    }

    fn counts(&self) -> (u64, u64, u64) {
        let Counts { unmatched, misdirected, rejected } = self.tracker.counts();
        (unmatched, misdirected, rejected)
    }

    /// What every failed call says, in words.
    fn words(&self, call: u64) -> String {
        self.ends[&call].as_ref().unwrap_err().to_string()
    }
}

#[test]
fn answers_in_any_order_come_out_in_the_order_of_the_frames() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let mut bench = Bench::new();
        bench.call(1, &[(0, &[1]), (1, &[2, 3]), (0, &[4])]);
        for (missing, sent) in (0..3).rev().zip(order) {
            assert!(bench.ends.is_empty());
            bench.answer(sent, sent as f32);
            assert_eq!(bench.tracker.outstanding(), missing);
        }
        assert_eq!(bench.ends, BTreeMap::from([(1, Ok(vec![0.0, 1.0, 2.0]))]));
        assert_eq!((bench.counts(), bench.tracker.next_deadline()), ((0, 0, 0), None));
    }
}

#[test]
fn a_call_without_frames_is_done_at_once() {
    let mut bench = Bench::new();
    bench.call(1, &[]);
    assert_eq!(bench.ends, BTreeMap::from([(1, Ok(vec![]))]));
}

#[test]
fn duplicate_and_late_answers_are_dropped_and_counted() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1]), (1, &[2])]);
    bench.answer(0, 1.0);
    bench.answer(0, 7.0);
    assert_eq!((bench.counts(), bench.tracker.outstanding()), ((1, 0, 0), 1));
    bench.answer(1, 2.0);
    bench.answer(1, 7.0);
    assert_eq!(bench.counts(), (2, 0, 0));
    assert_eq!(bench.ends, BTreeMap::from([(1, Ok(vec![1.0, 2.0]))]));
}

#[test]
fn an_answer_of_another_worker_is_dropped_and_counted_and_the_right_one_still_counts() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1])]);
    let frame = bench.sent[0].1.clone();
    let answer = AnswerFrame::new(frame.header, Ok(values(&frame, 7.0)));
    bench.on(Event::Answer { worker: worker(1), answer });
    assert_eq!((bench.counts(), bench.tracker.outstanding()), ((0, 1, 0), 1));
    bench.answer(0, 1.0);
    assert_eq!(bench.ends, BTreeMap::from([(1, Ok(vec![1.0]))]));
}

#[test]
fn an_answer_that_does_not_fit_what_was_asked_fails_the_call_with_layer_experts_and_worker() {
    type Change = fn(&mut AnswerFrame);
    let table: [(Change, &str); 6] = [
        (|a| a.header.epoch = Epoch(4), "gave a wrong answer: its header is Header { epoch: Epoch(4), "),
        (
            |a| a.header.layer = LayerId(8),
            "gave a wrong answer: its header is Header { epoch: Epoch(5), layer: LayerId(8)",
        ),
        (|a| a.header.source = 2, "gave a wrong answer: its header is "),
        (|a| a.header.slot = 1, "gave a wrong answer: its header is "),
        (|a| a.result = Ok(vec![0.0; HIDDEN].into()), "gave a wrong answer: it has 4 values; asked were 2 rows of 4"),
        (|a| a.result = Ok(vec![0.0; 9].into()), "gave a wrong answer: it has 9 values; asked were 2 rows of 4"),
    ];
    for (change, words) in table {
        let mut bench = Bench::new();
        bench.call(1, &[(0, &[1]), (1, &[30, 4])]);
        let (worker, frame) = bench.sent[1].clone();
        let mut answer = AnswerFrame::new(frame.header, Ok(values(&frame, 1.0)));
        change(&mut answer);
        bench.on(Event::Answer { worker, answer });
        let expected = format!("layer 9, experts 4, 30: worker w1 {words}");
        assert!(bench.words(1).starts_with(&expected), "{}", bench.words(1));
        assert_eq!((bench.counts(), bench.tracker.outstanding()), ((0, 0, 1), 0));
        bench.answer(0, 1.0);
        assert_eq!(bench.counts(), (1, 0, 1));
    }
}

#[test]
fn an_answer_under_another_key_is_nobodys() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1])]);
    let (worker, frame) = bench.sent[0].clone();
    let Header { micro_batch, sequence, .. } = frame.header;
    for header in [
        Header { micro_batch: micro_batch + 1, ..frame.header },
        Header { sequence: sequence.wrapping_sub(1), ..frame.header },
    ] {
        let answer = AnswerFrame::new(header, Ok(values(&frame, 7.0)));
        bench.on(Event::Answer { worker: worker.clone(), answer });
    }
    assert_eq!((bench.counts(), bench.tracker.outstanding()), ((2, 0, 0), 1));
}

#[test]
fn a_refusal_fails_the_call_and_is_no_wrong_answer() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1]), (1, &[2])]);
    let (worker, frame) = bench.sent[0].clone();
    let refusal = Refusal::new(RefusalReason::Busy, "the inbox is full");
    bench.on(Event::Answer { worker, answer: AnswerFrame::new(frame.header, Err(refusal)) });
    assert_eq!(bench.words(1), "layer 9, expert 1: worker w0 refused: REFUSAL_REASON_BUSY: the inbox is full");
    assert_eq!((bench.counts(), bench.tracker.outstanding()), ((0, 0, 0), 0));
}

#[test]
fn an_edge_that_breaks_fails_the_calls_that_wait_for_it_and_no_others() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1]), (1, &[2])]);
    bench.call(2, &[(0, &[3])]);
    bench.call(3, &[(1, &[5]), (1, &[6])]);
    // What came over the edge before it broke counts.
    let answered = bench.call(4, &[(1, &[7]), (0, &[8])]).start;
    bench.answer(answered, 4.0);

    bench.edge_down(1);
    let cause = Cause::EdgeDown { reason: "it fell".into() };
    let lost = |experts: Vec<u16>| {
        let experts: Vec<ExpertId> = experts.into_iter().map(ExpertId).collect();
        Err(DispatchError::Lost { layer: LAYER, experts: experts.into(), worker: worker(1), cause: cause.clone() })
    };
    assert_eq!(bench.ends, BTreeMap::from([(1, lost(vec![2])), (3, lost(vec![5]))]));
    assert_eq!(bench.words(1), "layer 9, expert 2: worker w1 is gone: it fell");

    bench.edge_down(1);
    bench.answer(2, 2.0);
    bench.answer(answered + 1, 4.5);
    assert_eq!((&bench.ends[&2], &bench.ends[&4]), (&Ok(vec![2.0]), &Ok(vec![4.0, 4.5])));
    assert_eq!(bench.tracker.outstanding(), 0);
}

#[test]
fn the_end_of_a_workers_old_edge_is_not_the_end_of_its_new_one() {
    let mut bench = Bench::new();
    let ways = [Some(EdgeId(1)), Some(EdgeId(2)), None];
    for (call, edge) in ways.into_iter().enumerate() {
        let frames = vec![(Destination { worker: worker(0), edge }, frame(&[1]))];
        bench.on(Event::Call { call: CallId(call as u64), layer: LAYER, frames });
    }
    bench.edge_down(1);
    assert_eq!(bench.ends.keys().copied().collect::<Vec<_>>(), [0]);
    assert_eq!(bench.tracker.outstanding(), 2);
}

#[test]
fn a_frame_that_could_not_be_sent_fails_its_call_with_the_cause() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1]), (1, &[2])]);
    let key = bench.key(1);
    for _ in 0..2 {
        bench.on(Event::NotSent { key, cause: Cause::QueueFull { limit: 64 } });
    }
    assert_eq!(bench.words(1), "layer 9, expert 2: worker w1 takes no more frames: 64 wait to be sent to it");
    assert_eq!(bench.tracker.outstanding(), 0);
}

#[test]
fn the_deadline_fails_the_oldest_call_and_names_a_worker_that_did_not_answer() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1]), (1, &[2]), (2, &[3])]);
    bench.answer(0, 1.0);
    bench.now = Duration::from_millis(1);
    bench.call(2, &[(2, &[4])]);
    assert_eq!(bench.tracker.next_deadline(), Some(DEADLINE));

    bench.now = DEADLINE - Duration::from_nanos(1);
    bench.on(Event::Tick);
    assert!(bench.ends.is_empty());
    bench.now = DEADLINE;
    bench.on(Event::Tick);
    assert_eq!(bench.words(1), "layer 9, expert 2: worker w1 did not answer within 100 ms");
    assert_eq!((bench.ends.len(), bench.tracker.outstanding()), (1, 1));

    assert_eq!(bench.tracker.next_deadline(), Some(DEADLINE + Duration::from_millis(1)));
    bench.now = Duration::from_secs(3600);
    bench.on(Event::Tick);
    assert_eq!(bench.words(2), "layer 9, expert 4: worker w2 did not answer within 100 ms");
    assert_eq!((bench.tracker.outstanding(), bench.tracker.next_deadline()), (0, None));
}

#[test]
fn a_call_that_was_abandoned_leaves_nothing_and_never_ends() {
    let mut bench = Bench::new();
    bench.call(1, &[(0, &[1]), (1, &[2])]);
    bench.call(2, &[(0, &[3])]);
    bench.answer(0, 1.0);
    bench.on(Event::Abandoned { call: CallId(1) });
    assert_eq!(bench.tracker.outstanding(), 1);
    bench.answer(1, 2.0);
    bench.edge_down(1);
    bench.now = DEADLINE;
    bench.on(Event::Abandoned { call: CallId(1) });
    bench.on(Event::Abandoned { call: CallId(77) });
    assert_eq!((bench.ends.len(), bench.counts()), (0, (1, 0, 0)));
    bench.on(Event::Abandoned { call: CallId(2) });
    assert_eq!((bench.tracker.outstanding(), bench.tracker.next_deadline()), (0, None));
}

#[test]
fn sequence_numbers_begin_again_after_the_last() {
    let mut bench = Bench::new();
    bench.tracker.next_sequence = u32::MAX - 1;
    bench.call(1, &[(0, &[1]), (0, &[2])]);
    bench.call(2, &[(0, &[3]), (0, &[4])]);
    let sequences: Vec<u32> = bench.sent.iter().map(|(_, frame)| frame.header.sequence).collect();
    assert_eq!(sequences, [u32::MAX - 1, u32::MAX, 0, 1]);
    (0..4).for_each(|sent| bench.answer(sent, sent as f32));
    assert_eq!(bench.ends, BTreeMap::from([(1, Ok(vec![0.0, 1.0])), (2, Ok(vec![2.0, 3.0]))]));
}

#[test]
fn an_error_lists_the_first_few_of_many_experts() {
    let list = |experts: std::ops::Range<u16>| ExpertList::from(experts.map(ExpertId).collect::<Vec<_>>()).to_string();
    assert_eq!(list(3..4), "expert 3");
    assert_eq!(list(0..8), "experts 0, 1, 2, 3, 4, 5, 6, 7");
    assert_eq!(list(0..10), "experts 0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
}

/// What may happen next; numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    Call(Vec<u64>),
    Answer(usize),
    Misdirected(usize),
    Short(usize),
    OldEpoch(usize),
    Refused(usize),
    NotSent(usize),
    EdgeDown(u64),
    Abandon(usize),
    Pass(u64),
}

const WORKERS: u64 = 3;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => prop::collection::vec(0..WORKERS, 0..5).prop_map(Step::Call),
        8 => any::<usize>().prop_map(Step::Answer),
        1 => any::<usize>().prop_map(Step::Misdirected),
        1 => any::<usize>().prop_map(Step::Short),
        1 => any::<usize>().prop_map(Step::OldEpoch),
        1 => any::<usize>().prop_map(Step::Refused),
        1 => any::<usize>().prop_map(Step::NotSent),
        1 => (0..WORKERS).prop_map(Step::EdgeDown),
        1 => any::<usize>().prop_map(Step::Abandon),
        1 => (0u64..60).prop_map(Step::Pass),
    ]
}

/// A bench, and what the steps so far must have come to.
struct Model {
    bench: Bench,
    calls: u64,
    /// For each call the frames that were sent for it.
    frames: BTreeMap<u64, std::ops::Range<usize>>,
    abandoned: BTreeSet<u64>,
}

impl Model {
    fn new(first_sequence: u32) -> Self {
        let mut bench = Bench::new();
        bench.tracker.next_sequence = first_sequence;
        Self { bench, calls: 0, frames: BTreeMap::new(), abandoned: BTreeSet::new() }
    }

    fn step(&mut self, step: Step) {
        let sent = self.bench.sent.len();
        match step {
            Step::Call(workers) => {
                let frames: Vec<(u64, &[u16])> = workers.iter().map(|&number| (number, &[1, 2][..])).collect();
                let frames = self.bench.call(self.calls, &frames);
                self.frames.insert(self.calls, frames);
                self.calls += 1;
            }
            Step::EdgeDown(number) => self.bench.edge_down(number),
            Step::Abandon(any) if self.calls > 0 => {
                let call = any as u64 % self.calls;
                if !self.bench.ends.contains_key(&call) {
                    self.abandoned.insert(call);
                }
                self.bench.on(Event::Abandoned { call: CallId(call) });
            }
            Step::Pass(ms) => {
                self.bench.now += Duration::from_millis(ms);
                self.bench.on(Event::Tick);
            }
            Step::NotSent(any) if sent > 0 => {
                let key = self.bench.key(any % sent);
                self.bench.on(Event::NotSent { key, cause: Cause::QueueFull { limit: 1 } });
            }
            // Each frame has an answer of its own.
            Step::Answer(any) if sent > 0 => self.bench.answer(any % sent, (any % sent) as f32),
            step => self.wrong_answer(step),
        }
    }

    fn wrong_answer(&mut self, step: Step) {
        let (Step::Misdirected(any) | Step::Short(any) | Step::OldEpoch(any) | Step::Refused(any)) = step else {
            return;
        };
        let Some(last) = self.bench.sent.len().checked_sub(1) else { return };
        let (mut worker, frame) = self.bench.sent[any % (last + 1)].clone();
        let mut answer = AnswerFrame::new(frame.header, Ok(values(&frame, -1.0)));
        match step {
            Step::Short(_) => answer.result = Ok(vec![-1.0; HIDDEN].into()),
            Step::OldEpoch(_) => answer.header.epoch = Epoch(1),
            Step::Refused(_) => answer.result = Err(Refusal::new(RefusalReason::Busy, "full")),
            _ => worker = self::worker(WORKERS),
        }
        self.bench.on(Event::Answer { worker, answer });
    }

    /// Every outstanding frame has an open call, and every open call waits for something; all others have ended.
    fn check(&self) {
        let tracker = &self.bench.tracker;
        for (key, outstanding) in &tracker.frames {
            let call = tracker.calls.get(&outstanding.call).expect("an outstanding frame has a call");
            assert_eq!(call.frames[outstanding.part], *key);
            assert!(call.answers[outstanding.part].is_none());
        }
        let missing: usize = tracker.calls.values().map(|call| call.missing).sum();
        assert_eq!(missing, tracker.outstanding());
        assert!(tracker.calls.values().all(|call| call.missing > 0 && self.bench.now < call.deadline));
        for call in 0..self.calls {
            let (open, ended) = (tracker.calls.contains_key(&CallId(call)), self.bench.ends.contains_key(&call));
            let states = [open, ended, self.abandoned.contains(&call)];
            assert_eq!(states.into_iter().filter(|&is| is).count(), 1, "call {call}: {states:?}");
        }
    }

    /// After the last deadline nothing is left, and what is done has exactly its own frames' answers.
    fn finish(mut self) {
        self.bench.now += DEADLINE;
        self.bench.on(Event::Tick);
        self.check();
        assert_eq!((self.bench.tracker.outstanding(), self.bench.tracker.next_deadline()), (0, None));
        for (call, end) in &self.bench.ends {
            if let Ok(answers) = end {
                let own: Vec<f32> = self.frames[call].clone().map(|sent| sent as f32).collect();
                assert_eq!(*answers, own);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_happens_each_call_ends_once_and_nothing_stays_outstanding(
        steps in prop::collection::vec(step(), 0..80),
        first_sequence in prop_oneof![Just(0u32), (u32::MAX - 20)..=u32::MAX],
    ) {
        let mut model = Model::new(first_sequence);
        for step in steps {
            model.step(step);
            model.check();
        }
        model.finish();
    }
}
