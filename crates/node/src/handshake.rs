//! Whether two nodes may work together: what each says of itself in its first message, compared field by field.

use moesaic_proto::ids::InvalidWorkerId;
use moesaic_proto::v1::{Hello, Role};
use moesaic_proto::{PROTOCOL_VERSION, WorkerId};

/// Characters of a field that a mismatch repeats.
const SHOWN_CHARS_MAX: usize = 80;

/// The first field in which two nodes do not match.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} does not match: here {own:?}, peer {peer:?}")]
pub struct Mismatch {
    pub field: &'static str,
    pub own: String,
    pub peer: String,
}

/// What this process says of itself; `source` is 0 until somebody sets it.
pub fn hello(cluster: &str, role: Role, id: &WorkerId, fingerprint: &str, numerics: &str) -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        cluster: cluster.to_owned(),
        role: role.into(),
        id: id.as_str().to_owned(),
        incarnation: uuid::Uuid::new_v4().as_u64_pair().0,
        fingerprint: fingerprint.to_owned(),
        numerics: numerics.to_owned(),
        source: 0,
        expert_numerics: String::new(),
        nccl: String::new(),
    }
}

/// The id that a node was given, or one drawn for it: `role` and 8 hexadecimal digits.
pub fn worker_id(given: Option<&str>, role: &str) -> Result<WorkerId, InvalidWorkerId> {
    match given {
        Some(id) => WorkerId::new(id),
        None => WorkerId::new(&format!("{role}-{:08x}", uuid::Uuid::new_v4().as_fields().0)),
    }
}

/// The numerics that a node works with, in a peer of that role.
fn numerics_in(hello: &Hello, role: Role) -> &str {
    match &hello.expert_numerics {
        experts if role == Role::ExpertWorker && !experts.is_empty() => experts,
        _ => &hello.numerics,
    }
}

/// Compares a peer's Hello with ours; `expected` is the role that the peer must have. Numerics are compared where both
/// compute: a coordinator's are empty.
pub fn check(own: &Hello, peer: &Hello, expected: Role) -> Result<(), Mismatch> {
    let same = |field, own: &dyn ToString, peer: &dyn ToString| {
        let (own, peer) = (own.to_string(), peer.to_string());
        if own == peer {
            return Ok(());
        }
        Err(Mismatch { field, own, peer: peer.chars().take(SHOWN_CHARS_MAX).collect() })
    };
    same("protocol_version", &own.protocol_version, &peer.protocol_version)?;
    same("cluster", &own.cluster, &peer.cluster)?;
    same("role", &expected.as_str_name(), &peer.role().as_str_name())?;
    same("fingerprint", &own.fingerprint, &peer.fingerprint)?;
    if !own.numerics.is_empty() && !peer.numerics.is_empty() {
        same("numerics", &numerics_in(own, expected), &numerics_in(peer, own.role()))?;
    }
    match WorkerId::new(&peer.id) {
        Ok(_) => Ok(()),
        Err(error) => Err(Mismatch { field: "id", own: "a valid id".into(), peer: error.id }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(role: Role) -> Hello {
        hello("c", role, &WorkerId::new("a").unwrap(), "f00d", "f32")
    }

    #[test]
    fn each_field_that_differs_is_named_with_both_values() {
        type Change = fn(&mut Hello);
        let table: [(Change, &str, &str); 6] = [
            (|h| h.protocol_version = 99, "protocol_version", "99"),
            (|h| h.cluster = "d".into(), "cluster", "d"),
            (|h| h.role = Role::Coordinator.into(), "role", "ROLE_COORDINATOR"),
            (|h| h.fingerprint = "beef".into(), "fingerprint", "beef"),
            (|h| h.numerics = "bf16".into(), "numerics", "bf16"),
            (|h| h.id = "NOT valid".into(), "id", "NOT valid"),
        ];
        for (change, field, value) in table {
            let mut peer = own(Role::ExpertWorker);
            change(&mut peer);
            let mismatch = check(&own(Role::AttentionWorker), &peer, Role::ExpertWorker).unwrap_err();
            assert_eq!((mismatch.field, mismatch.peer.as_str()), (field, value));
            assert!(mismatch.to_string().contains(field));
        }
    }

    #[test]
    fn experts_may_be_computed_otherwise_if_their_attention_workers_say_so() {
        let gpu = |mut hello: Hello| {
            hello.numerics = "bf16-sm_90a".into();
            hello
        };
        let (mut attention, experts) = (own(Role::AttentionWorker), gpu(own(Role::ExpertWorker)));
        assert_eq!(check(&attention, &experts, Role::ExpertWorker).unwrap_err().field, "numerics");
        attention.expert_numerics = "bf16-sm_90a".into();
        assert_eq!(check(&attention, &experts, Role::ExpertWorker), Ok(()));
        assert_eq!(check(&experts, &attention, Role::AttentionWorker), Ok(()));
        let other = own(Role::ExpertWorker);
        let mismatch = check(&other, &attention, Role::AttentionWorker).unwrap_err();
        assert_eq!((mismatch.own.as_str(), mismatch.peer.as_str()), ("f32", "bf16-sm_90a"));
    }

    #[test]
    fn matching_nodes_pass_and_a_coordinator_needs_no_numerics() {
        assert_eq!(check(&own(Role::AttentionWorker), &own(Role::ExpertWorker), Role::ExpertWorker), Ok(()));
        let mut coordinator = own(Role::Coordinator);
        coordinator.numerics.clear();
        assert_eq!(check(&own(Role::AttentionWorker), &coordinator, Role::Coordinator), Ok(()));
    }
}
