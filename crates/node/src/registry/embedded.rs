//! The registry of one process: a table and its watchers. A member lives as long as its registration.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_proto::v1::Role;
use moesaic_proto::{Placement, WorkerId};
use tokio::sync::watch;

use super::{Entry, Member, Registration, Registry, RegistryError, View};

/// A registry for nodes of this process.
pub fn embedded() -> Arc<dyn Registry> {
    Arc::new(Embedded { view: watch::Sender::new(Arc::default()) })
}

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
            let follows = in_force.checked_add(1) == Some(placement.epoch().0);
            if follows {
                Arc::make_mut(view).placement = Some(Arc::new(placement));
            }
            follows
        });
        async move { Ok(published) }.boxed()
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
