//! The registry of one process: a table and its watchers. A member lives as long as its registration.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_proto::v1::{Cordon, Role};
use moesaic_proto::{Placement, WorkerId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Campaign, Entry, Leader, Member, Registration, Registry, RegistryError, View};

/// A registry for nodes of this process.
pub fn embedded() -> Arc<dyn Registry> {
    Arc::new(Embedded { view: watch::Sender::new(Arc::new(View { is_current: true, ..View::default() })) })
}

/// Of the only leader that there is: the first to run.
const TERM: u64 = 1;

struct Embedded {
    view: watch::Sender<Arc<View>>,
}

impl Registry for Embedded {
    fn register(&self, member: Member) -> BoxFuture<'_, Result<Registration, RegistryError>> {
        let entry = EmbeddedEntry {
            view: self.view.clone(),
            key: (member.hello.role(), member.id.clone()),
            incarnation: member.hello.incarnation,
        };
        async move {
            let member = Member::from_record(member.to_record())?;
            self.view.send_modify(|view| drop(Arc::make_mut(view).members.insert(entry.key.clone(), member)));
            Ok(Registration(Box::new(entry)))
        }
        .boxed()
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    fn publish(&self, placement: Placement) -> BoxFuture<'_, Result<bool, RegistryError>> {
        let published = self.view.send_if_modified(|view| {
            let in_force = view.placement.as_ref().map_or(0, |placement| placement.epoch().0);
            let is_led = placement.term() == 0 || view.leader.as_ref().is_some_and(|l| l.term == placement.term());
            let follows = is_led && in_force.checked_add(1) == Some(placement.epoch().0);
            if follows {
                Arc::make_mut(view).placement = Some(Arc::new(placement));
            }
            follows
        });
        async move { Ok(published) }.boxed()
    }

    fn campaign(&self, id: WorkerId) -> Campaign {
        let (view, stop) = (self.view.clone(), CancellationToken::new());
        let (term, elected) = watch::channel(None);
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut news = view.subscribe();
            let elect = async {
                while news.wait_for(|view| view.leader.is_none()).await.is_ok() {
                    let elect = |view: &mut Arc<View>| {
                        let is_free = view.leader.is_none();
                        if is_free {
                            Arc::make_mut(view).leader = Some(Leader { id: id.clone(), term: TERM });
                        }
                        is_free
                    };
                    if view.send_if_modified(elect) {
                        return;
                    }
                }
            };
            if stopped.run_until_cancelled(elect).await.is_none() {
                return;
            }
            let _lead = Lead(view);
            term.send_replace(Some(TERM));
            stopped.cancelled().await;
        });
        Campaign { term: elected, task, stop: stop.drop_guard() }
    }

    fn set_cordon(&self, role: Role, id: WorkerId, cordon: Option<Cordon>) -> BoxFuture<'_, Result<(), RegistryError>> {
        self.view.send_modify(|view| {
            let cordons = &mut Arc::make_mut(view).cordons;
            match cordon {
                Some(cordon) => cordons.insert((role, id), cordon),
                None => cordons.remove(&(role, id)),
            };
        });
        async { Ok(()) }.boxed()
    }
}

/// The lead, until it is dropped: with its campaign, or with the runtime that this ran in.
struct Lead(watch::Sender<Arc<View>>);

impl Drop for Lead {
    fn drop(&mut self) {
        self.0.send_modify(|view| Arc::make_mut(view).leader = None);
    }
}

struct EmbeddedEntry {
    view: watch::Sender<Arc<View>>,
    key: (Role, WorkerId),
    incarnation: u64,
}

impl EmbeddedEntry {
    /// Changes the entry if it is still this process's own.
    fn change(&self, change: impl FnOnce(&mut View)) {
        self.view.send_if_modified(|view| {
            let own = view.members.get(&self.key).is_some_and(|m| m.hello.incarnation == self.incarnation);
            if own {
                change(Arc::make_mut(view));
            }
            own
        });
    }
}

impl Entry for EmbeddedEntry {
    fn update(&self, member: Member) {
        self.change(|view| drop(view.members.insert(self.key.clone(), member)));
    }

    fn leave(self: Box<Self>) -> BoxFuture<'static, ()> {
        async move { drop(self) }.boxed()
    }
}

impl Drop for EmbeddedEntry {
    fn drop(&mut self) {
        self.change(|view| drop(view.members.remove(&self.key)));
    }
}
