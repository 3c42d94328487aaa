//! What is taken together, what is refused, what is answered.

use std::sync::mpsc::{Receiver, sync_channel};

use moesaic_dispatch::AnswerFrame;
use moesaic_dispatch::frame::{Content, Header, Output, Term};
use moesaic_proto::ExpertId;

use super::*;

/// A frame of some rows, each asked of one expert; and where its answer goes.
fn job(epoch: u32, layer: u8, rows: usize, sequence: u32) -> (Job, Receiver<AnswerFrame>) {
    let header =
        Header { epoch: Epoch(epoch), layer: LayerId(layer), micro_batch: 0, flags: 0, source: 0, slot: 0, sequence };
    let content = Content {
        rows: (0..rows as u32).collect(),
        outputs: (0..rows as u16).map(Output::single).collect(),
        terms: (0..rows).map(|_| Term::new(ExpertId(0), 1.0)).collect(),
    };
    let frame = RequestFrame::new(header, vec![0.0f32; rows].into(), 1, content);
    let (sender, answers) = sync_channel(1);
    (Job::new(frame, ReplySender::new(header, move |answer| drop(sender.send(answer)))), answers)
}

fn sequences(jobs: &[Job]) -> Vec<u32> {
    jobs.iter().map(|job| job.frame.header.sequence).collect()
}

#[test]
fn the_oldest_goes_first_and_takes_along_what_can_be_computed_with_it() {
    let mut inbox = Inbox::new(16);
    for (epoch, layer, rows, sequence) in
        [(1, 3, 2, 0), (1, 4, 2, 1), (1, 3, 2, 2), (2, 3, 2, 3), (1, 3, 9, 4), (1, 3, 1, 5)]
    {
        inbox.offer(job(epoch, layer, rows, sequence).0).unwrap();
    }
    // The one of 9 rows would cost too much, the small one behind it does not.
    assert_eq!(sequences(&inbox.take(8)), [0, 2, 5]);
    assert_eq!(sequences(&inbox.take(8)), [1]);
    assert_eq!(sequences(&inbox.take(8)), [3]);
    assert_eq!(sequences(&inbox.take(8)), [4], "the first is taken whatever it costs");
    assert!(inbox.is_empty() && inbox.take(8).is_empty());
}

#[test]
fn past_the_bound_and_after_a_stop_frames_are_given_back_with_the_reason() {
    let mut inbox = Inbox::new(1);
    inbox.offer(job(1, 3, 1, 0).0).unwrap();
    let (_, refusal) = *inbox.offer(job(1, 3, 1, 1).0).unwrap_err();
    assert_eq!((refusal.reason, refusal.detail.as_str()), (RefusalReason::Busy, "the inbox is full: 1 frames wait"));
    inbox.stop();
    let (_, refusal) = *inbox.offer(job(1, 3, 1, 1).0).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::Stopping);
    assert_eq!(sequences(&inbox.take(8)), [0], "what waits is still answered");
}

#[test]
fn a_job_that_is_dropped_answers_that_it_was_given_up() {
    let (job, answers) = job(1, 3, 1, 7);
    drop(job);
    let answer = answers.recv().unwrap();
    assert_eq!(answer.header.sequence, 7);
    assert_eq!(answer.result.unwrap_err().reason, RefusalReason::Stopping);
}
