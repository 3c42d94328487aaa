//! The tracker told what happened, event by event.

mod any_order;
mod bench;
mod twice;

use moesaic_proto::{Epoch, ExpertId};

use super::*;
use crate::error::ExpertList;
use crate::frame::Refusal;
use bench::*;

/// Worker n has expert n.
fn alone() -> Bench {
    Bench::new(&[&[0], &[1], &[2], &[3]])
}

/// Workers 0 and 1 have experts 0 and 1, workers 2 and 3 the others.
fn pairs() -> Bench {
    Bench::new(&[&[0, 1], &[0, 1], &[2, 3], &[2, 3]])
}

fn lost(experts: &[u16], number: u64, cause: Cause) -> DispatchError {
    let experts: Vec<ExpertId> = experts.iter().copied().map(ExpertId).collect();
    DispatchError::Lost { layer: LAYER, experts: experts.into(), worker: worker(number), cause }
}

#[test]
fn answers_in_any_order_come_out_in_the_order_of_the_frames() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
        let mut bench = alone();
        bench.call(1, &[[0, 1], [2, 3]]);
        for (missing, sent) in (0..4).rev().zip(order) {
            assert!(bench.ends.is_empty());
            bench.answer(sent);
            assert_eq!(bench.tracker.outstanding(), missing);
        }
        bench.assert_done(&[1]);
        assert_eq!(bench.tracker.counts(), Counts { sent: 4, terms: 4, ..Counts::default() });
        assert_eq!(bench.tracker.next_tick(bench.now), None);
    }
}

#[test]
fn a_call_without_rows_is_done_at_once() {
    let mut bench = alone();
    bench.call(1, &[]);
    bench.assert_done(&[1]);
}

#[test]
fn holders_of_an_expert_take_turns() {
    let mut bench = Bench::new(&[&[0, 1, 2], &[0, 1, 2]]);
    let mut asked = |call| {
        let sent = bench.call(call, &[[0, 1]]);
        assert_eq!(sent.len(), 1);
        bench.number_of(sent.start)
    };
    assert_eq!([1, 2, 3, 4, 6].map(&mut asked), [1, 2, 0, 1, 0]);
}

#[test]
fn duplicate_and_late_answers_are_dropped_and_counted() {
    let mut bench = alone();
    bench.call(1, &[[0, 1]]);
    bench.answer(0);
    bench.answer(0);
    assert_eq!((bench.tracker.counts().unmatched, bench.tracker.outstanding()), (1, 1));
    bench.answer(1);
    bench.answer(1);
    assert_eq!(bench.tracker.counts().unmatched, 2);
    bench.assert_done(&[1]);
}

#[test]
fn an_answer_of_another_worker_is_dropped_and_counted_and_the_right_one_still_counts() {
    let mut bench = alone();
    bench.call(1, &[[0, 1]]);
    let answer = bench.right_answer(0);
    bench.on(Event::Answer { worker: worker(1), answer });
    assert_eq!((bench.tracker.counts().misdirected, bench.tracker.outstanding()), (1, 2));
    bench.answer(0);
    bench.answer(1);
    bench.assert_done(&[1]);
}

#[test]
fn an_answer_under_another_key_is_nobodys() {
    let mut bench = alone();
    bench.call(1, &[[0, 1]]);
    let right = bench.right_answer(0);
    let Header { micro_batch, sequence, .. } = right.header;
    for header in [
        Header { micro_batch: micro_batch + 1, ..right.header },
        Header { sequence: sequence.wrapping_sub(1), ..right.header },
    ] {
        let answer = AnswerFrame { header, ..right.clone() };
        bench.on(Event::Answer { worker: worker(0), answer });
    }
    assert_eq!((bench.tracker.counts().unmatched, bench.tracker.outstanding()), (2, 2));
}

#[test]
fn an_answer_that_does_not_fit_what_was_asked_is_rejected_and_another_holder_asked() {
    type Change = fn(&mut AnswerFrame);
    let table: [(Change, &str); 6] = [
        (|a| a.header.epoch = Epoch(4), "gave a wrong answer: its header is Header { epoch: Epoch(4), "),
        (
            |a| a.header.layer = LayerId(8),
            "gave a wrong answer: its header is Header { epoch: Epoch(5), layer: LayerId(8)",
        ),
        (|a| a.header.source = 2, "gave a wrong answer: its header is "),
        (|a| a.header.slot = 1, "gave a wrong answer: its header is "),
        (|a| a.result = Ok(vec![0.0; 1].into()), "gave a wrong answer: it has 1 values; asked were 1 rows of 2"),
        (|a| a.result = Ok(vec![0.0; 4].into()), "gave a wrong answer: it has 4 values; asked were 1 rows of 2"),
    ];
    for (change, words) in table {
        let mut bench = pairs();
        let first = bench.call(1, &[[0, 1]]).start;
        let mut answer = bench.right_answer(first);
        change(&mut answer);
        bench.on(Event::Answer { worker: worker(1), answer: answer.clone() });
        assert_eq!((bench.tracker.counts().rejected, bench.tracker.counts().resent), (1, 1));
        assert_eq!(bench.number_of(first + 1), 0);
        bench.answer(first + 1);
        bench.assert_done(&[1]);

        // Where there is no other holder, it waits; the end tells what was wrong.
        let mut bench = Bench::new(&[&[1], &[1]]);
        bench.call(1, &[[0, 1]]);
        bench.on(Event::Answer { worker: worker(1), answer });
        assert_eq!((bench.tracker.outstanding(), bench.ends.len()), (0, 0));
        bench.edge_down(1);
        bench.pass(DEADLINE);
        let expected = format!("layer 9, experts 0, 1: worker w1 {words}");
        assert!(bench.error(1).to_string().starts_with(&expected), "{}", bench.error(1));
    }
}

#[test]
fn a_refusal_that_another_holder_may_not_share_is_no_end() {
    use RefusalReason::*;
    for reason in [Epoch, NotHeld, Busy, Stopping, Unspecified] {
        let mut bench = pairs();
        let sent = bench.call(1, &[[0, 2]]);
        let asked = bench.number_of(sent.start);
        bench.refuse(sent.start, reason);
        let again = sent.end;
        assert_eq!((bench.number_of(again), bench.tracker.outstanding()), (1 - asked, 2));
        bench.answer(sent.start + 1);
        bench.answer(again);
        bench.assert_done(&[1]);
        assert_eq!(bench.tracker.counts(), Counts { sent: 3, resent: 1, terms: 3, ..Counts::default() });
    }
}

#[test]
fn a_frame_that_is_malformed_fails_its_call_at_once_and_no_other() {
    let mut bench = pairs();
    let (own, other) = (bench.call(1, &[[0, 2]]).start, bench.call(2, &[[0, 2]]));
    bench.refuse(own, RefusalReason::Malformed);
    let cause = Cause::Refused(Refusal::new(RefusalReason::Malformed, "as told"));
    assert_eq!(*bench.error(1), lost(&[0], 1, cause));
    assert_eq!(bench.tracker.outstanding(), 2);
    other.for_each(|sent| bench.answer(sent));
    bench.assert_done(&[2]);
}

#[test]
fn an_edge_that_breaks_has_its_frames_asked_of_others_at_once() {
    let mut bench = pairs();
    // Odd calls ask workers 1 and 3, even ones 0 and 2.
    let one = bench.call(1, &[[0, 1]]).start;
    let two = bench.call(2, &[[0, 1]]).start;
    let three = bench.call(3, &[[0, 2]]);
    // What came over the edge before it broke counts.
    bench.answer(three.start);
    let before = bench.sent.len();
    bench.edge_down(1);
    assert_eq!((bench.sent.len(), bench.number_of(before)), (before + 1, 0));
    bench.edge_down(1);
    assert_eq!(bench.sent.len(), before + 1);
    // Too late.
    bench.answer(one);
    assert_eq!((bench.tracker.counts().unmatched, bench.ends.len()), (1, 0));
    [two, before, three.start + 1].into_iter().for_each(|sent| bench.answer(sent));
    bench.assert_done(&[1, 2, 3]);
    // And nobody asks it before it is heard again.
    let asked = bench.call(5, &[[0, 1]]).start;
    assert_eq!(bench.number_of(asked), 0);
    bench.heard(1);
    let asked = bench.call(7, &[[0, 1]]).start;
    assert_eq!(bench.number_of(asked), 1);
}

#[test]
fn a_frame_that_no_single_holder_has_is_split_over_several() {
    // One group, and worker 0 has all of it.
    let mut bench = Bench::new(&[&[0, 1], &[0, 2], &[0, 3]]);
    let lost = bench.call(2, &[[0, 1], [1, 2], [0, 2]]);
    assert_eq!((lost.len(), bench.number_of(lost.start)), (1, 0));
    bench.edge_down(0);
    let asked: Vec<_> = (lost.end..bench.sent.len()).map(|sent| bench.number_of(sent)).collect();
    assert_eq!(asked, [1, 2, 3]);
    // One of them is lost as well: it is the part that is asked again, and there is no other way now.
    bench.answer(lost.end);
    bench.edge_down(2);
    assert_eq!(bench.tracker.outstanding(), 0);
    bench.heard(0);
    assert_eq!(bench.number_of(lost.end + 3), 0);
    // What the others still answer is nobody's.
    bench.answer(lost.end + 2);
    bench.answer(lost.end + 3);
    bench.assert_done(&[2]);
    assert_eq!(bench.tracker.counts().unmatched, 1);

    // The same to the end.
    let lost = bench.call(4, &[[0, 1], [1, 2], [0, 2]]);
    bench.heard(2);
    bench.edge_down(0);
    (lost.end..bench.sent.len()).for_each(|sent| bench.answer(sent));
    bench.assert_done(&[2, 4]);
}

#[test]
fn the_end_of_a_workers_old_edge_is_not_the_end_of_its_new_one() {
    let mut bench = Bench::new(&[&[0], &[0]]);
    let old_edge = bench.edge(0).unwrap();
    let old = bench.call(1, &[[0, 1]]).start;
    bench.new_edge(0);
    bench.set_ways(5);
    // What comes over the old edge says nothing about the new one.
    bench.on(Event::Heard { edge: old_edge });
    let older = bench.call(2, &[[0, 1]]);
    assert_eq!(older.len(), 0, "it is not up yet");
    bench.answer(old);
    assert_eq!(bench.tracker.outstanding(), 0);
    bench.heard(0);
    assert_eq!(bench.tracker.outstanding(), 1);
    bench.on(Event::EdgeDown { edge: old_edge, reason: "it fell".into() });
    assert_eq!(bench.tracker.outstanding(), 1);
    bench.answer(older.start);
    bench.assert_done(&[1, 2]);
}

#[test]
fn a_frame_that_could_not_be_sent_is_asked_of_another_holder() {
    let mut bench = pairs();
    let sent = bench.call(1, &[[0, 1]]).start;
    let key = bench.key(sent);
    for _ in 0..2 {
        bench.on(Event::NotSent { key, cause: Cause::QueueFull { limit: 64 } });
    }
    assert_eq!((bench.sent.len(), bench.number_of(sent + 1)), (2, 0));
    let key = bench.key(sent + 1);
    bench.on(Event::NotSent { key, cause: Cause::QueueFull { limit: 64 } });
    assert_eq!(bench.tracker.outstanding(), 0);
    // Both are asked again a little later.
    bench.pass(RETRY_MIN);
    assert_eq!(bench.tracker.outstanding(), 1);
    bench.answer(sent + 2);
    bench.assert_done(&[1]);
}

#[test]
fn a_frame_that_nobody_takes_is_tried_again_after_20_ms_and_then_ever_more() {
    let mut bench = Bench::new(&[&[0], &[0]]);
    bench.call(1, &[[0, 1]]);
    let mut times = vec![];
    for ms in 0..2000 {
        bench.now = Duration::from_millis(ms);
        bench.heard(0);
        bench.on(Event::Tick);
        if bench.tracker.outstanding() > 0 {
            times.push(ms);
            bench.refuse(bench.sent.len() - 1, RefusalReason::Busy);
        }
    }
    assert_eq!(times, [0, 20, 60, 140, 300, 620, 1120, 1620]);
    bench.heard(0);
    bench.pass(Duration::from_millis(121));
    bench.answer(times.len());
    bench.assert_done(&[1]);
}

#[test]
fn a_frame_that_waits_is_asked_at_once_when_a_holder_can_be_reached() {
    let mut bench = pairs();
    (0..2).for_each(|number| bench.edge_down(number));
    // One was never asked, the other lost; they wait long by now.
    let never = bench.call(1, &[[0, 1]]);
    let lost = bench.call(2, &[[2, 3]]).start;
    (2..4).for_each(|number| bench.edge_down(number));
    assert_eq!((never.len(), bench.sent.len(), bench.tracker.outstanding()), (0, 2, 0));
    for _ in 0..100 {
        bench.pass(TICK);
    }
    bench.heard(2);
    assert_eq!((bench.sent.len(), bench.number_of(lost + 2)), (3, 2));
    // A placement under which the survivor has all.
    bench.holders = vec![vec![2]; 4];
    bench.set_ways(6);
    assert_eq!((bench.sent.len(), bench.number_of(lost + 3)), (4, 2));
    let epochs: Vec<u32> = bench.sent.iter().map(|(_, frame)| frame.header.epoch.0).collect();
    assert_eq!(epochs, [5, 5, 5, 6]);
    assert_eq!(bench.tracker.counts(), Counts { sent: 4, resent: 2, terms: 8, ..Counts::default() });
    bench.answer(lost + 2);
    bench.answer(lost + 3);
    bench.assert_done(&[1, 2]);
}

#[test]
fn a_worker_that_has_done_with_an_older_placement_is_asked_again_under_the_one_in_use() {
    let mut bench = Bench::new(&[&[0], &[0]]);
    let sent = bench.call(1, &[[0, 1]]).start;
    bench.set_ways(6);
    bench.refuse(sent, RefusalReason::Epoch);
    assert_eq!(bench.sent[sent + 1].1.header.epoch, Epoch(6));
    assert_eq!(bench.rank(0), Rank::Good);
    bench.answer(sent + 1);
    bench.assert_done(&[1]);

    // Not twice.
    let sent = bench.call(2, &[[0, 1]]);
    bench.refuse(sent.start, RefusalReason::Epoch);
    assert_eq!((bench.sent.len(), bench.rank(0)), (sent.end, Rank::Avoided));
}

#[test]
fn a_worker_that_refuses_or_answers_wrongly_is_left_alone_for_a_while() {
    let mut bench = pairs();
    let asked = |bench: &mut Bench, call| {
        let sent = bench.call(call, &[[0, 1]]).start;
        bench.number_of(sent)
    };
    assert_eq!(asked(&mut bench, 1), 1);
    bench.refuse(0, RefusalReason::Stopping);
    assert_eq!((asked(&mut bench, 3), asked(&mut bench, 5)), (0, 0));
    bench.pass(Duration::from_millis(300));
    (0..4).for_each(|number| bench.heard(number));
    bench.pass(Duration::from_millis(300));
    assert_eq!(asked(&mut bench, 7), 1);
    // A full inbox says nothing about the next frame.
    bench.refuse(bench.sent.len() - 1, RefusalReason::Busy);
    assert_eq!(asked(&mut bench, 9), 1);
}

#[test]
fn the_deadline_fails_a_call_and_names_who_did_not_answer_or_was_lost_last_or_that_there_was_nobody() {
    let mut bench = alone();
    let first = bench.call(1, &[[0, 1]]).start;
    bench.answer(first);
    bench.now = Duration::from_millis(1);
    bench.call(2, &[[1, 2]]);
    bench.edge_down(3);
    bench.call(3, &[[0, 3]]);
    let fourth = bench.call(4, &[[0, 1]]).start;
    bench.refuse(fourth, RefusalReason::Busy);
    bench.edge_down(0);

    bench.now = DEADLINE - Duration::from_nanos(1);
    bench.on(Event::Tick);
    assert!(bench.ends.is_empty());
    bench.now = DEADLINE;
    bench.on(Event::Tick);
    assert_eq!(bench.error(1).to_string(), "layer 9, expert 1: worker w1 did not answer within 3000 ms");
    assert_eq!(bench.ends.len(), 1);

    bench.now = DEADLINE * 100;
    bench.on(Event::Tick);
    assert_eq!(bench.error(2).to_string(), "layer 9, expert 1: worker w1 did not answer within 3000 ms");
    assert_eq!(*bench.error(3), lost(&[0], 0, Cause::EdgeDown { reason: "it fell".into() }));
    assert_eq!(
        bench.error(4).to_string(),
        "layer 9, expert 0: worker w0 refused: REFUSAL_REASON_BUSY: as told",
        "the edge broke after it had lost the frame"
    );
    assert_eq!((bench.tracker.outstanding(), bench.tracker.next_tick(bench.now)), (0, None));

    bench.call(5, &[[0, 3]]);
    bench.pass(DEADLINE);
    let nobody = "layer 9, expert 0: no holder was to be had for 3000 ms ()";
    assert_eq!(bench.error(5).to_string(), nobody.replace("expert 0", "experts 0, 3"));
}

#[test]
fn a_call_that_was_abandoned_leaves_nothing_and_never_ends() {
    let mut bench = alone();
    bench.call(1, &[[0, 1]]);
    bench.call(2, &[[0, 1]]);
    bench.answer(0);
    bench.on(Event::Abandoned { call: CallId(1) });
    assert_eq!(bench.tracker.outstanding(), 2);
    bench.answer(1);
    bench.edge_down(1);
    bench.on(Event::Abandoned { call: CallId(1) });
    bench.on(Event::Abandoned { call: CallId(77) });
    assert_eq!((bench.ends.len(), bench.tracker.counts().unmatched), (0, 1));
    bench.on(Event::Abandoned { call: CallId(2) });
    bench.pass(DEADLINE);
    assert_eq!((bench.ends.len(), bench.tracker.outstanding(), bench.tracker.next_tick(bench.now)), (0, 0, None));
}

#[test]
fn sequence_numbers_begin_again_after_the_last_and_pass_over_those_in_use() {
    let mut bench = alone();
    bench.call(1, &[[0, 1]]);
    bench.call(2, &[[0, 1]]);
    bench.answer(2);
    bench.answer(3);
    bench.tracker.next_sequence = u32::MAX;
    bench.call(3, &[[0, 1], [2, 3]]);
    let sequences: Vec<u32> = bench.sent.iter().map(|(_, frame)| frame.header.sequence).collect();
    assert_eq!(sequences, [0, 1, 2, 3, u32::MAX, 2, 3, 4]);
    (0..2).chain(4..8).for_each(|sent| bench.answer(sent));
    bench.assert_done(&[1, 2, 3]);
}

#[test]
fn an_error_lists_the_first_few_of_many_experts() {
    let list = |experts: std::ops::Range<u16>| ExpertList::from(experts.map(ExpertId).collect::<Vec<_>>()).to_string();
    assert_eq!(list(3..4), "expert 3");
    assert_eq!(list(0..8), "experts 0, 1, 2, 3, 4, 5, 6, 7");
    assert_eq!(list(0..10), "experts 0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
}

#[test]
fn nothing_is_kept_of_a_worker_that_was_forgotten() {
    let mut bench = alone();
    bench.call(1, &[[0, 1]]);
    let [gone, other] = [bench.edge(0), None].map(|edge| Destination { worker: worker(0), edge });
    bench.tracker.forget(&other);
    assert_eq!(bench.rank(0), Rank::Good, "it is reached over its edge");
    bench.tracker.forget(&gone);
    bench.answer(0);
    bench.answer(1);
    bench.assert_done(&[1]);
    assert_eq!((bench.rank(0), bench.rank(1)), (Rank::Down, Rank::Good));
    assert_eq!(bench.tracker.health().figures(&worker(0)), Figures::default());
    bench.heard(0);
    assert_eq!(bench.rank(0), Rank::Down);
}
