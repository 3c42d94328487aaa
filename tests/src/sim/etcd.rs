//! etcd, as far as the registry uses it: a revision for each change, leases that run out, watches from a revision, and
//! compaction. What is stored outlives the process, and its leases begin anew with it.

use std::collections::BTreeMap;
use std::time::Duration;

use moesaic_node::Member;
use moesaic_proto::v1::{Cordon, Role};
use moesaic_proto::{Placement, WorkerId};

use super::messages::{Ask, Change, Message, Told};
use super::net::{Context, Input, StreamId, Timer};

pub const MEMBER_TTL: Duration = Duration::from_secs(5);
pub const LEADER_TTL: Duration = Duration::from_secs(2);
/// How often leases are looked at.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Default)]
pub struct Etcd {
    revision: u64,
    leases: BTreeMap<u64, Lease>,
    members: BTreeMap<(Role, WorkerId), (Member, u64)>,
    placement: Option<Placement>,
    /// Id, term, lease.
    leader: Option<(WorkerId, u64, u64)>,
    cordons: BTreeMap<(Role, WorkerId), Cordon>,
    history: Vec<(u64, Change)>,
    compacted: u64,
    watches: Vec<StreamId>,
    /// Terms that placements were published in, by epoch.
    pub published: Vec<u64>,
}

struct Lease {
    ttl: Duration,
    ends: Duration,
}

impl Etcd {
    pub fn on(&mut self, context: &mut Context<'_>, input: Input) {
        match input {
            Input::Started => {
                self.watches.clear();
                self.leases.values_mut().for_each(|lease| lease.ends = context.now + lease.ttl);
                context.wake(EXPIRY_INTERVAL, "expire", 0);
            }
            Input::Timer(Timer(_, _)) => {
                self.expire(context);
                context.wake(EXPIRY_INTERVAL, "expire", 0);
            }
            Input::Broken { stream } => self.watches.retain(|watch| *watch != stream),
            Input::Message { stream, message: Message::Ask(ask) } => self.answer(context, stream, ask),
            Input::Message { message, .. } => context.violated(format!("etcd was told {message:?}")),
        }
    }

    /// Forgets the changes so far: who watches from one of them must list again.
    pub fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }

    pub fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }

    fn answer(&mut self, context: &mut Context<'_>, stream: StreamId, ask: Ask) {
        let told = match ask {
            Ask::List => Told::Listed { changes: self.snapshot(), revision: self.revision },
            Ask::Watch { from } if from <= self.compacted => Told::Cancelled,
            Ask::Watch { from } => {
                self.watches.push(stream);
                Told::Changed(self.history.iter().filter(|(at, _)| *at >= from).map(|(_, c)| c.clone()).collect())
            }
            Ask::Register(member) => {
                let lease = self.grant(context, MEMBER_TTL);
                self.put_member(context, *member, lease);
                Told::Granted { lease }
            }
            Ask::Update { lease, member } => {
                let is_alive = self.leases.contains_key(&lease);
                if is_alive {
                    self.put_member(context, *member, lease);
                }
                Told::Alive(is_alive)
            }
            Ask::KeepAlive { lease } => {
                let lease = self.leases.get_mut(&lease);
                Told::Alive(lease.map(|lease| lease.ends = context.now + lease.ttl).is_some())
            }
            Ask::Revoke { lease } => {
                self.end_lease(context, lease);
                Told::Alive(false)
            }
            Ask::Campaign { id } => Told::Elected(self.leader.is_none().then(|| {
                let lease = self.grant(context, LEADER_TTL);
                let term = self.revision + 1;
                self.leader = Some((id.clone(), term, lease));
                self.change(context, Change::Leader(Some((id, term))));
                (term, lease)
            })),
            Ask::Publish(placement) => Told::Published(self.publish(context, placement)),
        };
        context.send(stream, Message::Told(told));
    }

    /// An operator wants something of a worker.
    pub fn set_cordon(&mut self, context: &mut Context<'_>, role: Role, id: WorkerId, cordon: Option<Cordon>) {
        match cordon {
            Some(cordon) => drop(self.cordons.insert((role, id.clone()), cordon)),
            None => drop(self.cordons.remove(&(role, id.clone()))),
        }
        self.change(context, Change::Cordon(role, id, cordon));
    }

    fn publish(&mut self, context: &mut Context<'_>, placement: Placement) -> bool {
        let next = self.placement.as_ref().map_or(1, |placement| placement.epoch().0 + 1);
        let leads = self.leader.as_ref().is_some_and(|(_, term, _)| *term == placement.term());
        if placement.epoch().0 != next || !leads {
            return false;
        }
        if self.published.last().is_some_and(|last| *last > placement.term()) {
            context.violated(format!("a placement of term {} after one of {:?}", placement.term(), self.published));
        }
        self.published.push(placement.term());
        self.placement = Some(placement.clone());
        self.change(context, Change::Placement(placement));
        true
    }

    fn snapshot(&self) -> Vec<Change> {
        let members = self.members.values().map(|(member, _)| Change::Member(Box::new(member.clone())));
        let placement = self.placement.iter().map(|placement| Change::Placement(placement.clone()));
        let leader = self.leader.iter().map(|(id, term, _)| Change::Leader(Some((id.clone(), *term))));
        let cordons = self.cordons.iter().map(|((role, id), cordon)| Change::Cordon(*role, id.clone(), Some(*cordon)));
        members.chain(placement).chain(leader).chain(cordons).collect()
    }

    fn grant(&mut self, context: &Context<'_>, ttl: Duration) -> u64 {
        let lease = 1 + self.leases.last_key_value().map_or(0, |(last, _)| *last).max(self.revision << 8);
        self.leases.insert(lease, Lease { ttl, ends: context.now + ttl });
        lease
    }

    fn put_member(&mut self, context: &mut Context<'_>, member: Member, lease: u64) {
        self.members.insert((member.hello.role(), member.id.clone()), (member.clone(), lease));
        self.change(context, Change::Member(Box::new(member)));
    }

    fn expire(&mut self, context: &mut Context<'_>) {
        let over: Vec<u64> =
            self.leases.iter().filter(|(_, lease)| lease.ends <= context.now).map(|(&lease, _)| lease).collect();
        over.into_iter().for_each(|lease| self.end_lease(context, lease));
    }

    fn end_lease(&mut self, context: &mut Context<'_>, lease: u64) {
        self.leases.remove(&lease);
        let gone: Vec<_> =
            self.members.iter().filter(|(_, (_, of))| *of == lease).map(|(key, _)| key.clone()).collect();
        for (role, id) in gone {
            self.members.remove(&(role, id.clone()));
            self.change(context, Change::MemberGone(role, id));
        }
        if self.leader.as_ref().is_some_and(|(_, _, of)| *of == lease) {
            self.leader = None;
            self.change(context, Change::Leader(None));
        }
    }

    fn change(&mut self, context: &mut Context<'_>, change: Change) {
        self.revision += 1;
        self.history.push((self.revision, change.clone()));
        for watch in &self.watches {
            context.send(*watch, Message::Told(Told::Changed(vec![change.clone()])));
        }
    }
}
