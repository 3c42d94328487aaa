//! Slots between two sides, with whatever the stream and the communicator do to their order.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// Slots have room for 12,288 bytes of rows.
const LARGEST: usize = SLOT_TABLE_BYTES + 12_288;

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The sender has a frame of so many bytes.
    Send(usize),
    /// It has had nothing for a while.
    Idle,
    /// What it said over the stream arrives.
    Stream,
    /// The receiver looks for its next slot.
    Slot,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![(0..20_000usize).prop_map(Step::Send), Just(Step::Idle), Just(Step::Stream), Just(Step::Slot)]
}

proptest! {
    /// Every frame comes once, in order; and when all has come and the sender is idle, nobody waits.
    #[test]
    fn all_frames_come_in_order_and_an_idle_lane_has_no_receive(steps in prop::collection::vec(step(), 0..200)) {
        let (mut outgoing, mut incoming) = (Outgoing::new(7, LARGEST), Incoming::new(7, LARGEST, 20_000));
        let (mut wakes, mut slots) = (VecDeque::new(), VecDeque::new());
        let (mut sent, mut received) = (Vec::new(), Vec::new());
        let rest = [Step::Idle].into_iter().chain(std::iter::repeat_n([Step::Stream, Step::Slot], 500).flatten());
        for step in steps.into_iter().chain(rest) {
            let departure = match step {
                Step::Send(rows) => {
                    sent.push(rows);
                    Some(outgoing.send(Kind::Frame, Load::new(0, rows)))
                }
                Step::Idle => outgoing.idle(),
                Step::Stream => {
                    if let Some(sequence) = wakes.pop_front() {
                        incoming.wake(sequence);
                    }
                    None
                }
                Step::Slot => {
                    if incoming.is_awaited() && let Some((slot_bytes, head)) = slots.pop_front() {
                        prop_assert_eq!(incoming.slot_bytes(), slot_bytes);
                        let head = incoming.receive(&head).unwrap();
                        received.extend((head.kind == Kind::Frame).then_some(head.load.bytes()));
                    }
                    None
                }
            };
            if let Some(Departure { head, slot_bytes, wakes: is_told }) = departure {
                wakes.extend(is_told.then_some(head.sequence));
                slots.push_back((slot_bytes, head.encode()));
            }
        }
        prop_assert_eq!(received, sent);
        prop_assert!(slots.is_empty() && !incoming.is_awaited());
    }

    /// Any bytes are a head or an error, and a head is its bytes.
    #[test]
    fn heads_are_read_or_refused(mut bytes in any::<[u8; Head::LEN]>(), is_ours in any::<bool>(), kind in 0..5u32) {
        if is_ours {
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[12..16].copy_from_slice(&kind.to_le_bytes());
        }
        match Head::decode(&bytes) {
            Ok(head) => prop_assert_eq!(head.encode(), bytes),
            Err(fault) => prop_assert!(!is_ours || kind == 4, "{}", fault),
        }
    }
}

fn header(sequence: u32) -> Header {
    let micro_batch = (sequence % 2) as u8;
    let (epoch, layer) = (moesaic_proto::Epoch(1), moesaic_proto::LayerId(0));
    Header { epoch, layer, micro_batch, flags: 0, source: 0, slot: 0, sequence }
}

#[test]
fn a_lane_that_fails_gives_back_what_is_not_answered_and_only_its_own() {
    let mut carrier = Carrier::default();
    let first = carrier.offer();
    assert!(!carrier.has_room());
    carrier.up(first + 1);
    assert!(!carrier.has_room(), "another lane is up");
    carrier.up(first);
    (0..5).for_each(|sequence| carrier.carry(&header(sequence), sequence));
    let answer = |sequence| AnswerFrame::new(header(sequence), Ok(Vec::new().into()));
    assert!(carrier.answered(answer(2)).is_some());
    assert_eq!(carrier.fail(first), Some(vec![0, 1, 3, 4]));
    // Its threads may say so late.
    carrier.up(first);
    assert!(!carrier.is_up() && !carrier.has(first));
    let second = carrier.offer();
    carrier.up(first);
    assert!(!carrier.is_up(), "another lane is up");
    carrier.up(second);
    (0..LANE_FRAMES_MAX as u32).for_each(|sequence| carrier.carry(&header(sequence), sequence));
    assert!(!carrier.has_room());
    assert_eq!(carrier.fail(first), None);
    assert!(carrier.is_up());
}

#[test]
fn what_leaves_ahead_is_carried_once_it_is_claimed() {
    let mut carrier = Carrier::default();
    let lane = carrier.offer();
    carrier.up(lane);
    let answer = |sequence| AnswerFrame::new(header(sequence), Ok(Vec::new().into()));
    (0..4).for_each(|sequence| carrier.carry_ahead(&header(sequence)));
    // One that is answered first, one afterwards, one that asks nothing, one that is not claimed in time.
    assert!(carrier.answered(answer(0)).is_none());
    assert!(matches!(carrier.claim(&header(0), || 0), Claim::Answered(early) if early.header == answer(0).header));
    assert!(matches!(carrier.claim(&header(1), || 1), Claim::Carried));
    assert!(carrier.answered(answer(1)).is_some());
    carrier.forget(&header(2));
    assert!(matches!(carrier.claim(&header(2), || 2), Claim::None));
    assert!(matches!(carrier.claim(&header(5), || 5), Claim::None), "it has not left");
    (10..12).for_each(|sequence| carrier.carry_ahead(&header(sequence)));
    assert!(matches!(carrier.claim(&header(10), || 10), Claim::Carried));
    assert_eq!(carrier.fail(lane), Some(vec![10]));
    assert!(matches!(carrier.claim(&header(3), || 3), Claim::None), "it goes again");
    let lane = carrier.offer();
    carrier.up(lane);
    (0..LANE_FRAMES_MAX as u32).for_each(|sequence| carrier.carry_ahead(&header(sequence)));
    assert!(!carrier.has_room());
}

#[test]
fn what_is_not_due_is_a_fault_that_says_what_was() {
    let next = LARGEST as u32;
    let head =
        |generation, sequence, kind, rows| Head { generation, sequence, kind, load: Load::new(0, rows), next }.encode();
    let followed_by =
        |next| Head { generation: 7, sequence: 0, kind: Kind::Frame, load: Load::default(), next }.encode();
    let table = [
        (head(6, 0, Kind::Frame, 1), "a slot of lane 6 came over lane 7"),
        (head(7, 1, Kind::Frame, 1), "slot 1 came where 0 was due"),
        (head(7, 0, Kind::Frame, 101), "a load of 101 bytes; expected at most 100"),
        (head(7, 0, Kind::Park, 1), "a load of 1 bytes; expected at most 0"),
        ([0; Head::LEN], "a slot begins with 0x00000000, which is none"),
        (followed_by(8191), "a slot of 8191 bytes is to follow; expected 8192 to 20480"),
        (followed_by(20_481), "a slot of 20481 bytes is to follow; expected 8192 to 20480"),
    ];
    for (bytes, words) in table {
        assert_eq!(Incoming::new(7, LARGEST, 100).receive(&bytes).unwrap_err().to_string(), words);
    }
}

#[test]
fn slots_are_as_large_as_the_last_frames_were() {
    let mut outgoing = Outgoing::new(7, LARGEST);
    let mut sizes = |rows: usize, count: usize| -> Vec<usize> {
        let send = |_| outgoing.send(Kind::Frame, Load::new(10, rows)).slot_bytes - SLOT_TABLE_BYTES;
        (0..count).map(send).collect()
    };
    // The first is the largest, and what has no room in that says nothing.
    assert_eq!(sizes(0, 2), [12_288; 2]);
    assert_eq!(sizes(12_289, 2), [12_288; 2]);
    assert_eq!(sizes(5000, 3), [12_288, 8192, 8192]);
    // Larger ones come behind a slot once.
    assert_eq!(sizes(12_288, 2), [8192, 12_288]);
    // Smaller ones are padded until the larger ones are long gone.
    assert_eq!(sizes(100, 66), [vec![12_288; 64], vec![4096; 2]].concat());
    assert_eq!(outgoing.idle().unwrap().slot_bytes, SLOT_TABLE_BYTES + 4096);
}

#[test]
fn what_has_no_room_in_a_slot_comes_behind_it() {
    let slot = SLOT_TABLE_BYTES + 4096;
    let room = SLOT_TABLE_BYTES - Head::LEN;
    let in_slot = Place { message: Head::LEN, rows: SLOT_TABLE_BYTES, behind: None };
    let behind = |rows, behind| Place { message: 0, rows, behind: Some(behind) };
    let table = [
        ((0, 0), in_slot),
        ((room, 4096), in_slot),
        ((room + 1, 4096), behind(SLOT_TABLE_BYTES, SLOT_TABLE_BYTES + 4096)),
        ((300, 4097), behind(512, 512 + 4097)),
        ((0, 5000), behind(0, 5000)),
    ];
    // A table is before rows that were sent ahead.
    let ahead = Load::new(300, 5000).place(Kind::Ahead, slot);
    assert_eq!(ahead, behind(SLOT_TABLE_BYTES, SLOT_TABLE_BYTES + 5000));
    assert_eq!(Load::new(300, 4096).place(Kind::Ahead, slot), in_slot);
    for ((message, rows), place) in table {
        assert_eq!(Load::new(message, rows).place(Kind::Frame, slot), place, "{message}, {rows}");
    }
}
