//! What is stored under `/moesaic/<cluster>/`: keys, and values in protobuf. Every entry is checked before it counts.

use moesaic_proto::v1::{self, Cordon, Role};
use moesaic_proto::{Placement, WorkerId};
use prost::Message;

use super::{Leader, Member};
use crate::identity::{role_name, role_of_name};

pub(super) const PLACEMENT: &str = "placement";
pub(super) const LEADER: &str = "leader";
const CORDONS: &str = "cordons/";
const WORKERS: &str = "workers/";

/// A valid entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    Member(Member),
    Placement(Placement),
    Leader(Leader),
    Cordon { role: Role, id: WorkerId, cordon: Cordon },
}

impl Record {
    /// `key` is what follows the cluster's prefix; `created` is the revision at which it was made, a leader's term. The
    /// error is for people: what is stored may be anybody's.
    pub fn decode(key: &str, value: &[u8], created: i64) -> Result<Self, String> {
        if key == PLACEMENT {
            return decode_placement(value).map(Self::Placement);
        }
        if key == LEADER {
            return decode_leader(value, created).map(Self::Leader);
        }
        if key.starts_with(CORDONS) {
            let (role, id) = cordoned_worker(key).ok_or("the key names no worker")?;
            return Ok(Self::Cordon { role, id, cordon: Cordon::decode(value).map_err(|e| e.to_string())? });
        }
        if key.starts_with(WORKERS) {
            return decode_member(key, value).map(Self::Member);
        }
        Err("the key is not one of ours".into())
    }
}

pub(super) fn decode_placement(value: &[u8]) -> Result<Placement, String> {
    let message = v1::Placement::decode(value).map_err(|e| e.to_string())?;
    Placement::try_from(&message).map_err(|e| e.to_string())
}

/// A record must stand under its own key, so that nobody can speak for another.
fn decode_member(key: &str, value: &[u8]) -> Result<Member, String> {
    let record = v1::MemberRecord::decode(value).map_err(|e| e.to_string())?;
    let member = Member::from_record(record).map_err(|e| e.to_string())?;
    match member_key(member.hello.role(), &member.id) == key {
        true => Ok(member),
        false => Err(format!("the record is that of {}", member.id)),
    }
}

fn decode_leader(value: &[u8], created: i64) -> Result<Leader, String> {
    let record = v1::LeaderRecord::decode(value).map_err(|e| e.to_string())?;
    let id = WorkerId::new(&record.id).map_err(|e| e.to_string())?;
    Ok(Leader { id, term: created.unsigned_abs() })
}

/// Whose cordon stands under a key, if it is one.
pub(super) fn cordoned_worker(key: &str) -> Option<(Role, WorkerId)> {
    let (role, id) = key.strip_prefix(CORDONS)?.split_once('/')?;
    Some((role_of_name(role)?, WorkerId::new(id).ok()?))
}

fn role_and_id(role: Role, id: &WorkerId) -> String {
    format!("{}/{id}", role_name(role))
}

/// After the prefix.
pub fn member_key(role: Role, id: &WorkerId) -> String {
    format!("{WORKERS}{}", role_and_id(role, id))
}

/// After the prefix.
pub fn cordon_key(role: Role, id: &WorkerId) -> String {
    format!("{CORDONS}{}", role_and_id(role, id))
}
