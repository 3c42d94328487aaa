//! A process's side of the registry, with the rules of `moesaic-node`'s own: list, watch from there, list again when the
//! watch breaks; one lease for its entry, taken anew when it is lost; and for a coordinator, a candidacy.

use std::sync::Arc;
use std::time::Duration;

use moesaic_node::{Leader, Member, View};
use moesaic_proto::{Placement, WorkerId};

use super::etcd::{LEADER_TTL, MEMBER_TTL};
use super::messages::{Ask, Change, Message, Told};
use super::net::{Context, Node, StreamId};

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Default)]
pub struct Registry {
    pub view: View,
    watch: Option<StreamId>,
    watch_backoff: Duration,
    entry: Option<Entry>,
    candidate: Option<Candidate>,
    publishing: Option<StreamId>,
}

struct Entry {
    member: Member,
    stream: Option<StreamId>,
    lease: Option<u64>,
    backoff: Duration,
    is_leaving: bool,
}

struct Candidate {
    id: WorkerId,
    stream: Option<StreamId>,
    /// Term and lease, while it leads.
    elected: Option<(u64, u64)>,
    /// When what etcd has confirmed last was sent, and what it has not.
    heard: Duration,
    sent: Option<Duration>,
}

/// What news there is.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// It was something of the registry's, and nothing that matters has changed.
    Nothing,
    View,
    /// A placement was, or was not, put in force.
    Published(bool),
    /// Its entry is gone: it has left.
    Left,
}

impl Registry {
    pub fn start(&mut self, context: &mut Context<'_>, member: Member) {
        self.list(context);
        let entry = Entry { member, stream: None, lease: None, backoff: BACKOFF_MIN, is_leaving: false };
        self.entry.insert(entry).register(context);
    }

    pub fn campaign(&mut self, context: &mut Context<'_>, id: WorkerId) {
        let (stream, elected, heard, sent) = (None, None, Duration::ZERO, None);
        self.candidate = Some(Candidate { id, stream, elected, heard, sent });
        context.wake(BACKOFF_MIN, "candidate", 0);
    }

    /// The term, while this coordinator leads.
    pub fn term(&self) -> Option<u64> {
        self.candidate.as_ref()?.elected.map(|(term, _)| term)
    }

    pub fn update(&mut self, context: &mut Context<'_>, change: impl FnOnce(&mut Member)) {
        let Some(entry) = &mut self.entry else { return };
        change(&mut entry.member);
        if let (Some(stream), Some(lease)) = (entry.stream, entry.lease) {
            context.send(stream, Message::Ask(Ask::Update { lease, member: Box::new(entry.member.clone()) }));
        }
    }

    /// Gives the entry up; `News::Left` says when that is done, or cannot be.
    pub fn leave(&mut self, context: &mut Context<'_>) {
        let Some(entry) = &mut self.entry else { return };
        entry.is_leaving = true;
        match (entry.stream, entry.lease) {
            (Some(stream), Some(lease)) => context.send(stream, Message::Ask(Ask::Revoke { lease })),
            _ => context.wake(Duration::ZERO, "left", 0),
        }
    }

    pub fn publish(&mut self, context: &mut Context<'_>, placement: Placement) {
        self.publishing = Some(context.open(Node::Etcd, Message::Ask(Ask::Publish(placement))));
    }

    pub fn is_publishing(&self) -> bool {
        self.publishing.is_some()
    }

    fn list(&mut self, context: &mut Context<'_>) {
        self.watch = Some(context.open(Node::Etcd, Message::Ask(Ask::List)));
    }

    fn lose_watch(&mut self, context: &mut Context<'_>) -> News {
        self.watch = None;
        self.watch_backoff = (self.watch_backoff * 2).clamp(BACKOFF_MIN, BACKOFF_MAX);
        context.wake(self.watch_backoff, "list", 0);
        self.view.is_current = false;
        News::View
    }

    /// `None`: the stream is none of the registry's.
    pub fn on_told(&mut self, context: &mut Context<'_>, stream: StreamId, told: Told) -> Option<News> {
        if self.watch == Some(stream) {
            return Some(self.on_watch(context, stream, told));
        }
        if self.publishing == Some(stream) {
            self.publishing = None;
            context.close(stream);
            return Some(News::Published(matches!(told, Told::Published(true))));
        }
        if let Some(entry) = self.entry.as_mut().filter(|entry| entry.stream == Some(stream)) {
            return Some(entry.on_told(context, told));
        }
        let candidate = self.candidate.as_mut().filter(|candidate| candidate.stream == Some(stream))?;
        candidate.on_told(context, told);
        Some(News::Nothing)
    }

    fn on_watch(&mut self, context: &mut Context<'_>, stream: StreamId, told: Told) -> News {
        match told {
            Told::Listed { changes, revision } => {
                self.view = View { is_current: true, ..View::default() };
                changes.into_iter().for_each(|change| apply(&mut self.view, change));
                self.watch_backoff = Duration::ZERO;
                context.send(stream, Message::Ask(Ask::Watch { from: revision + 1 }));
                News::View
            }
            Told::Changed(changes) => {
                let is_news = !changes.is_empty();
                changes.into_iter().for_each(|change| apply(&mut self.view, change));
                if is_news { News::View } else { News::Nothing }
            }
            _ => {
                context.close(stream);
                self.lose_watch(context)
            }
        }
    }

    pub fn on_broken(&mut self, context: &mut Context<'_>, stream: StreamId) -> Option<News> {
        if self.watch == Some(stream) {
            return Some(self.lose_watch(context));
        }
        if self.publishing == Some(stream) {
            self.publishing = None;
            return Some(News::Published(false));
        }
        if let Some(entry) = self.entry.as_mut().filter(|entry| entry.stream == Some(stream)) {
            return Some(entry.lose(context));
        }
        let candidate = self.candidate.as_mut().filter(|candidate| candidate.stream == Some(stream))?;
        candidate.stream = None;
        Some(News::Nothing)
    }

    /// `None`: the task is none of the registry's.
    pub fn on_timer(&mut self, context: &mut Context<'_>, task: &str, number: u64) -> Option<News> {
        match task {
            "list" => self.list(context),
            "register" => self.entry.as_mut()?.register(context),
            "beat" => {
                if let Some(entry) = self.entry.as_mut().filter(|entry| entry.lease == Some(number)) {
                    entry.beat(context);
                }
            }
            "left" => return Some(News::Left),
            "candidate" => self.candidate.as_mut()?.step(context, &self.view),
            _ => return None,
        }
        Some(News::Nothing)
    }
}

fn apply(view: &mut View, change: Change) {
    match change {
        Change::Member(member) => drop(view.members.insert((member.hello.role(), member.id.clone()), *member)),
        Change::MemberGone(role, id) => drop(view.members.remove(&(role, id))),
        Change::Placement(placement) => view.placement = Some(Arc::new(placement)),
        Change::Leader(leader) => view.leader = leader.map(|(id, term)| Leader { id, term }),
        Change::Cordon(role, id, Some(cordon)) => drop(view.cordons.insert((role, id), cordon)),
        Change::Cordon(role, id, None) => drop(view.cordons.remove(&(role, id))),
    }
}

impl Entry {
    fn register(&mut self, context: &mut Context<'_>) {
        if !self.is_leaving {
            self.stream = Some(context.open(Node::Etcd, Message::Ask(Ask::Register(Box::new(self.member.clone())))));
        }
    }

    fn beat(&mut self, context: &mut Context<'_>) {
        if let (Some(stream), Some(lease)) = (self.stream, self.lease) {
            context.send(stream, Message::Ask(Ask::KeepAlive { lease }));
            context.wake(MEMBER_TTL / 3, "beat", lease);
        }
    }

    fn on_told(&mut self, context: &mut Context<'_>, told: Told) -> News {
        match told {
            Told::Granted { lease } => {
                (self.lease, self.backoff) = (Some(lease), BACKOFF_MIN);
                context.wake(MEMBER_TTL / 3, "beat", lease);
                // What has changed since it was asked for.
                if let Some(stream) = self.stream {
                    context.send(stream, Message::Ask(Ask::Update { lease, member: Box::new(self.member.clone()) }));
                }
                News::Nothing
            }
            Told::Alive(true) => News::Nothing,
            _ => {
                if let Some(stream) = self.stream {
                    context.close(stream);
                }
                self.lose(context)
            }
        }
    }

    fn lose(&mut self, context: &mut Context<'_>) -> News {
        (self.stream, self.lease) = (None, None);
        if self.is_leaving {
            return News::Left;
        }
        context.wake(self.backoff, "register", 0);
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        News::Nothing
    }
}

impl Candidate {
    fn step(&mut self, context: &mut Context<'_>, view: &View) {
        match self.elected {
            Some((_, lease)) => {
                if context.now >= self.heard + LEADER_TTL {
                    self.step_down(context);
                } else if self.sent.is_none() || self.stream.is_none() {
                    let ask = Message::Ask(Ask::KeepAlive { lease });
                    match self.stream {
                        Some(stream) => context.send(stream, ask),
                        None => self.stream = Some(context.open(Node::Etcd, ask)),
                    }
                    self.sent = Some(context.now);
                }
                context.wake(LEADER_TTL / 8, "candidate", 0);
            }
            None => {
                if self.stream.is_none() && view.leader.is_none() && view.is_current {
                    self.stream = Some(context.open(Node::Etcd, Message::Ask(Ask::Campaign { id: self.id.clone() })));
                    self.sent = Some(context.now);
                }
                context.wake(LEADER_TTL / 4, "candidate", 0);
            }
        }
    }

    fn step_down(&mut self, context: &mut Context<'_>) {
        self.elected = None;
        if let Some(stream) = self.stream.take() {
            context.close(stream);
        }
    }

    fn on_told(&mut self, context: &mut Context<'_>, told: Told) {
        match told {
            Told::Elected(Some(elected)) => {
                // Since before etcd granted the lease.
                self.heard = self.sent.take().unwrap_or(context.now);
                self.elected = Some(elected);
            }
            Told::Alive(true) => self.heard = self.sent.take().unwrap_or(self.heard),
            _ => self.step_down(context),
        }
    }
}
