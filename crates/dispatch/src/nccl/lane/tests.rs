//! What a slot that was sent ahead may be.

use moesaic_proto::v1::Choices;

use super::*;

const ROW_BYTES: usize = 12;
const SLOT: usize = SLOT_TABLE_BYTES + SLOT_ROWS * ROW_BYTES;

/// The beginning of a slot with `count` rows of two choices each, and its load.
fn slot(count: u32, choices: Option<Choices>) -> (Vec<u8>, Load) {
    let message = v1::Frame { choices, ..Default::default() }.encode_to_vec();
    let mut start = vec![0xa5; SLOT_TABLE_BYTES];
    start[Head::LEN..][..message.len()].copy_from_slice(&message);
    let table = SLOT_TABLE_BYTES - Split::table_bytes(SLOT_ROWS, 2);
    start[table..][..4].copy_from_slice(&count.to_le_bytes());
    start[table + Split::CHOICES..].iter_mut().zip(1..).for_each(|(byte, value)| *byte = value);
    (start, Load::new(message.len(), SLOT_ROWS * ROW_BYTES))
}

fn choices(top_k: u32) -> Option<Choices> {
    Some(Choices { top_k, ..Default::default() })
}

#[test]
fn its_table_says_how_many_rows_it_has_and_what_they_chose() {
    for count in [0, 1, 3, SLOT_ROWS as u32] {
        let (start, load) = slot(count, choices(2));
        let (frame, bytes) = taken_ahead(&start, load, SLOT).unwrap();
        assert_eq!(bytes, count as usize * ROW_BYTES);
        assert_eq!(frame.terms.len(), count as usize * 2 * size_of::<Term>());
        assert!(frame.terms.iter().zip(1..).all(|(byte, value): (&u8, u8)| *byte == value));
    }
}

#[test]
fn what_it_cannot_be_ends_the_lane() {
    let error = |(start, load): (Vec<u8>, Load), slot| taken_ahead(&start, load, slot).unwrap_err();
    assert_eq!(error(slot(33, choices(2)), SLOT), "a slot that was sent ahead has 33 rows; expected at most 32");
    assert_eq!(error(slot(1, None), SLOT), "a slot that was sent ahead says no choices");
    for top_k in [64, 1 << 20, u32::MAX] {
        let words = format!("a slot has no room for a table of 32 rows with {top_k} choices each");
        assert_eq!(error(slot(1, choices(top_k)), SLOT), words);
    }
    let words = "is not that of a full one";
    assert!(error(slot(1, choices(2)), SLOT - 1).ends_with(words));
    let (start, load) = slot(1, choices(2));
    assert!(error((start, Load { rows: load.rows - 1, ..load }), SLOT).ends_with(words));
    // Bytes of a message that is none.
    let (mut start, load) = slot(1, choices(2));
    start[Head::LEN] = 0xff;
    assert!(taken_ahead(&start, load, SLOT).is_err());
}
