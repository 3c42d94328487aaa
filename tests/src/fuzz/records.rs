//! What stands in the registry, and what a leader publishes.

use moesaic_node::Member;
use moesaic_node::registry::records::{Record, cordon_key, member_key};
use moesaic_proto::{ExpertId, Placement, v1};
use prost::Message;

use super::checks::{check_error, within};

pub fn placement(data: &[u8]) {
    let Ok(message) = v1::Placement::decode(data) else { return };
    // A message of lists of numbers, most of them of one byte on the wire.
    match within(64 * data.len() + (16 << 10), || Placement::try_from(&message)) {
        Err(error) => check_error(error),
        Ok(placement) => check_placement(&placement, &message),
    }
}

fn check_placement(placement: &Placement, message: &v1::Placement) {
    assert_eq!(&placement.to_proto(), message);
    assert!(placement.epoch().0 > 0);
    let layers: Vec<usize> = placement.layers().map(|layer| usize::from(layer.0)).collect();
    assert!(placement.is_for(&layers, placement.experts()));
    let mut held = 0;
    for (layer, expert, holders) in placement.experts_of_layers() {
        assert!(!holders.is_empty() && holders.iter().all(|w| (*w as usize) < placement.workers().len()));
        assert_eq!(placement.holders(layer, expert), holders);
        held += holders.len();
    }
    assert!(placement.is_covered(|_| true));
    // Counting a worker's experts reads all of them.
    if placement.workers().len() <= 16 {
        let by_worker = placement.workers().iter().map(|worker| {
            let shard: usize = placement.shard(worker).values().map(Vec::len).sum();
            assert_eq!(shard, placement.held_by(worker));
            shard
        });
        assert_eq!(by_worker.sum::<usize>(), held);
    }
    if let Some(layer) = placement.layers().next() {
        assert!(placement.holders(layer, ExpertId(placement.experts() as u16)).is_empty());
    }
}

/// `<key>\0<value>`: an entry as a watch brings it.
pub fn registry(data: &[u8]) {
    let Some(end) = data.iter().position(|byte| *byte == 0) else { return };
    let (key, value) = (String::from_utf8_lossy(&data[..end]), &data[end + 1..]);
    match Record::decode(&key, value, -7) {
        Err(reason) => check_error(reason),
        Ok(Record::Member(member)) => {
            assert_eq!(member_key(member.hello.role(), &member.id), key);
            assert_eq!(Member::from_record(member.to_record()).unwrap(), member);
        }
        Ok(Record::Cordon { role, id, .. }) => assert_eq!(cordon_key(role, &id), key),
        Ok(Record::Placement(placement)) => {
            assert_eq!(Placement::try_from(&placement.to_proto()).as_ref(), Ok(&placement))
        }
        Ok(Record::Leader(leader)) => assert_eq!(leader.term, 7),
    }
}
