//! The registry over etcd: keys under `/moesaic/<cluster>/`, values in protobuf.
//!
//! etcd-client does not mend broken watches or lease keep-alives, so one supervised task does it for each:
//!
//! * the **watch** lists the prefix, follows it from the next revision, and lists again whenever the stream breaks or
//!   the revision was compacted. A list is an atomic snapshot, so nothing is missed or seen in the wrong order. While
//!   etcd is away the last view stays in force;
//! * each **registration** holds a lease; when the lease or the connection is lost it takes a new one and writes its
//!   record again.

mod leader;
mod way;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, Error, EventType, GetOptions, KeyValue, LeaseKeepAliveStream, LeaseKeeper, PutOptions,
    Txn, TxnOp, WatchOptions, WatchStream,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_proto::v1::{Cordon, Role};
use moesaic_proto::{Placement, WorkerId};
use prost::Message;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use way::Way;

use super::records::{self, Record, cordon_key, decode_placement, member_key};
use super::{Campaign, Entry, Leader, Member, Registration, Registry, RegistryError, View};

/// How long one call may take: far more than a healthy etcd needs, far less than anybody waits.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection on which nothing comes is asked so often whether it still lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Between tries to reach an etcd that is away.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A watch on which nothing came for this long is asked whether it still lives.
const WATCH_QUIET: Duration = Duration::from_secs(10);

/// How the registry uses etcd.
#[derive(Clone, Copy, Debug)]
pub struct EtcdOptions {
    /// A member whose process is gone disappears this many seconds later. Death is noticed on the data path long before.
    pub lease_ttl_seconds: i64,
    /// A leader whose process is gone is followed by another this many seconds later, and a little.
    pub leader_ttl_seconds: i64,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self { lease_ttl_seconds: 5, leader_ttl_seconds: 2 }
    }
}

/// Connects, and lists the cluster once, so that a wrong address is an error at start.
pub fn etcd<'a>(
    endpoints: &'a [String],
    cluster: &'a str,
    options: EtcdOptions,
    way: Way,
) -> BoxFuture<'a, Result<Arc<dyn Registry>, RegistryError>> {
    Box::pin(async move {
        WorkerId::new(cluster).map_err(|_| RegistryError::Cluster { cluster: cluster.to_owned() })?;
        let unreachable = |source| RegistryError::Connect { endpoints: endpoints.join(","), source };
        let mut client = way.connect(endpoints).await.map_err(unreachable)?;
        let prefix = format!("/moesaic/{cluster}/");

        let (listed, revision) = match call(Listing::default().read(&mut client, &prefix)).await {
            Err(RegistryError::Etcd(source)) => return Err(unreachable(source)),
            other => other?,
        };
        let view = watch::Sender::new(Arc::new(listed.view(true)));
        let stop = CancellationToken::new();
        let follow = follow(client.clone(), prefix.clone(), listed, revision, view.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(follow));
        let registry: Arc<dyn Registry> = Arc::new(Etcd { client, prefix, options, view, _stop: stop.drop_guard() });
        Ok(registry)
    })
}

struct Etcd {
    client: Client,
    prefix: String,
    options: EtcdOptions,
    view: watch::Sender<Arc<View>>,
    _stop: DropGuard,
}

impl Registry for Etcd {
    fn register(&self, member: Member) -> BoxFuture<'_, Result<Registration, RegistryError>> {
        async move {
            let member = Member::from_record(member.to_record())?;
            let key = format!("{}{}", self.prefix, member_key(member.hello.role(), &member.id));
            let mut lease = Lease { client: self.client.clone(), key, ttl: self.options.lease_ttl_seconds, id: 0 };
            call(lease.take(&member)).await?;
            let (record, stop) = (watch::Sender::new(member), CancellationToken::new());
            let task = tokio::spawn(lease.keep(record.subscribe(), stop.clone()));
            Ok(Registration(Box::new(EtcdEntry { record, _stop: stop.drop_guard(), task })))
        }
        .boxed()
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    fn publish(&self, placement: Placement) -> BoxFuture<'_, Result<bool, RegistryError>> {
        let (mut client, key) = (self.client.clone(), format!("{}{}", self.prefix, records::PLACEMENT));
        async move {
            let in_force = || self.view.borrow().placement.as_ref().map_or(0, |p| p.epoch().0);
            let stored = call(client.get(key.clone(), None)).await?;
            let (epoch, revision) = match stored.kvs().first() {
                Some(kv) => {
                    (decode_placement(kv.value()).map_or_else(|_| in_force(), |p| p.epoch().0), kv.mod_revision())
                }
                None => (0, 0),
            };
            if epoch.checked_add(1) != Some(placement.epoch().0) {
                return Ok(false);
            }
            let mut when = vec![Compare::mod_revision(key.clone(), CompareOp::Equal, revision)];
            if placement.term() > 0 {
                let leader = format!("{}{}", self.prefix, records::LEADER);
                when.push(Compare::create_revision(leader, CompareOp::Equal, placement.term() as i64));
            }
            let put = TxnOp::put(key, placement.to_proto().encode_to_vec(), None);
            let txn = client.txn(Txn::new().when(when).and_then([put]));
            Ok(call(txn).await?.succeeded())
        }
        .boxed()
    }

    fn campaign(&self, id: WorkerId) -> Campaign {
        let key = format!("{}{}", self.prefix, records::LEADER);
        leader::campaign(self.client.clone(), key, id, self.options.leader_ttl_seconds, self.view())
    }

    fn set_cordon(&self, role: Role, id: WorkerId, cordon: Option<Cordon>) -> BoxFuture<'_, Result<(), RegistryError>> {
        let mut client = self.client.clone();
        let key = format!("{}{}", self.prefix, cordon_key(role, &id));
        async move {
            match cordon {
                Some(cordon) => call(client.put(key, cordon.encode_to_vec(), None)).await.map(drop),
                None => call(client.delete(key, None)).await.map(drop),
            }
        }
        .boxed()
    }
}

async fn call<T, E: Into<RegistryError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, RegistryError> {
    let seconds = CALL_TIMEOUT.as_secs();
    timeout(CALL_TIMEOUT, work).await.map_err(|_| RegistryError::Timeout { seconds })?.map_err(Into::into)
}

/// Has a lease prolonged; an error if it has run out.
async fn beat(keeper: &mut LeaseKeeper, answers: &mut LeaseKeepAliveStream) -> Result<(), Error> {
    keeper.keep_alive().await?;
    let alive = answers.message().await?.is_some_and(|answer| answer.ttl() > 0);
    alive.then_some(()).ok_or_else(|| Error::LeaseKeepAliveError("the lease has run out".into()))
}

// === the watch ===

/// What is stored, decoded. A value that is no record is left out with a warning and whatever its key held before stays.
#[derive(Clone, Default)]
struct Listing {
    members: BTreeMap<Vec<u8>, Member>,
    placement: Option<Arc<Placement>>,
    leader: Option<Leader>,
    cordons: BTreeMap<(Role, WorkerId), Cordon>,
}

impl Listing {
    /// What is stored now, and the revision at which it is. `self` is the last good listing.
    async fn read(&self, client: &mut Client, prefix: &str) -> Result<(Self, i64), RegistryError> {
        let answer = client.get(prefix, Some(GetOptions::new().with_prefix())).await?;
        let mut listing = self.clone();
        listing.members.retain(|key, _| answer.kvs().iter().any(|kv| kv.key() == key));
        (listing.leader, listing.cordons) = (None, BTreeMap::new());
        answer.kvs().iter().for_each(|kv| listing.put(prefix, kv));
        Ok((listing, answer.header().map_or(0, |header| header.revision())))
    }

    fn put(&mut self, prefix: &str, kv: &KeyValue) {
        let name = String::from_utf8_lossy(kv.key());
        let known = name.strip_prefix(prefix).unwrap_or_default();
        match Record::decode(known, kv.value(), kv.create_revision()) {
            Ok(Record::Member(member)) => drop(self.members.insert(kv.key().to_vec(), member)),
            Ok(Record::Placement(placement)) => self.placement = Some(Arc::new(placement)),
            Ok(Record::Leader(leader)) => self.leader = Some(leader),
            Ok(Record::Cordon { role, id, cordon }) => drop(self.cordons.insert((role, id), cordon)),
            Err(reason) => tracing::warn!(key = %name, reason, "registry: entry ignored"),
        }
    }

    fn delete(&mut self, prefix: &str, key: &[u8]) {
        self.members.remove(key);
        let name = String::from_utf8_lossy(key);
        let known = name.strip_prefix(prefix).unwrap_or_default();
        if known == records::LEADER {
            self.leader = None;
        } else if let Some(worker) = records::cordoned_worker(known) {
            self.cordons.remove(&worker);
        }
    }

    fn view(&self, is_current: bool) -> View {
        let members = self.members.values().map(|m| ((m.hello.role(), m.id.clone()), m.clone())).collect();
        let (placement, leader, cordons) = (self.placement.clone(), self.leader.clone(), self.cordons.clone());
        View { members, placement, leader, cordons, is_current }
    }
}

/// Follows the prefix for ever.
async fn follow(
    mut client: Client,
    prefix: String,
    mut listing: Listing,
    mut revision: i64,
    view: watch::Sender<Arc<View>>,
) {
    loop {
        let reason = follow_from(&mut client, &prefix, &mut listing, revision, &view).await;
        tracing::warn!(reason, "registry: not following etcd; the last view stays in force");
        set_view(&view, listing.view(false));
        let mut backoff = BACKOFF_MIN;
        (listing, revision) = loop {
            sleep(backoff).await;
            match call(listing.read(&mut client, &prefix)).await {
                Ok(listed) => break listed,
                Err(error) => tracing::debug!(%error, "registry: etcd is still away"),
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        };
        set_view(&view, listing.view(true));
    }
}

/// Follows from one listing until the stream ends, and why it did.
async fn follow_from(
    client: &mut Client,
    prefix: &str,
    listing: &mut Listing,
    revision: i64,
    view: &watch::Sender<Arc<View>>,
) -> String {
    let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
    let open = client.watch(prefix, Some(options));
    let mut stream = match call(open).await {
        Ok(stream) => stream,
        Err(error) => return error.to_string(),
    };
    loop {
        let answer = match next_message(&mut stream).await {
            Ok(answer) => answer,
            Err(reason) => return reason,
        };
        if answer.canceled() {
            return format!("watch cancelled, compacted at {}: {}", answer.compact_revision(), answer.cancel_reason());
        }
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => listing.put(prefix, kv),
                EventType::Delete => listing.delete(prefix, kv.key()),
            }
        }
        set_view(view, listing.view(true));
    }
}

/// The next message; a quiet stream must answer a request for progress.
async fn next_message(stream: &mut WatchStream) -> Result<etcd_client::WatchResponse, String> {
    let ended = |message: Result<Option<_>, Error>| match message {
        Ok(Some(answer)) => Ok(answer),
        Ok(None) => Err("etcd closed the watch".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    if let Ok(message) = timeout(WATCH_QUIET, stream.message()).await {
        return ended(message);
    }
    stream.request_progress().await.map_err(|e| e.to_string())?;
    match timeout(CALL_TIMEOUT, stream.message()).await {
        Ok(message) => ended(message),
        Err(_) => Err("the watch does not answer".into()),
    }
}

fn set_view(view: &watch::Sender<Arc<View>>, new: View) {
    view.send_if_modified(|old| {
        let changed = **old != new;
        if changed {
            *old = Arc::new(new);
        }
        changed
    });
}

// === a registration ===

struct EtcdEntry {
    record: watch::Sender<Member>,
    _stop: DropGuard,
    task: JoinHandle<()>,
}

impl Entry for EtcdEntry {
    fn update(&self, member: Member) {
        self.record.send_replace(member);
    }

    fn leave(self: Box<Self>) -> BoxFuture<'static, ()> {
        let Self { record, _stop: stop, task } = *self;
        async move {
            drop(stop);
            // The task revokes the lease within its call's timeout; if it failed, the lease runs out.
            let _ = task.await;
            drop(record);
        }
        .boxed()
    }
}

/// A member's lease and the record that hangs on it.
struct Lease {
    client: Client,
    key: String,
    ttl: i64,
    /// 0 for none.
    id: i64,
}

impl Lease {
    /// Takes a new lease and writes the record under it.
    async fn take(&mut self, member: &Member) -> Result<(), RegistryError> {
        self.id = self.client.lease_grant(self.ttl, None).await?.id();
        self.write(member).await
    }

    async fn write(&mut self, member: &Member) -> Result<(), RegistryError> {
        let options = PutOptions::new().with_lease(self.id);
        self.client.put(self.key.clone(), member.to_record().encode_to_vec(), Some(options)).await?;
        Ok(())
    }

    /// Keeps the entry until `stop`, then gives it up.
    async fn keep(mut self, mut record: watch::Receiver<Member>, stop: CancellationToken) {
        stop.run_until_cancelled(self.keep_up(&mut record)).await;
        let revoke = self.client.lease_revoke(self.id);
        if let Err(error) = call(revoke).await {
            tracing::warn!(key = self.key, %error, "registry: entry not removed; its lease runs out by itself");
        }
    }

    async fn keep_up(&mut self, record: &mut watch::Receiver<Member>) {
        loop {
            let lost = self.keep_alive(record).await;
            tracing::warn!(key = self.key, reason = %lost, "registry: lease lost; registering again");
            let mut backoff = BACKOFF_MIN;
            loop {
                let member = record.borrow_and_update().clone();
                match call(self.take(&member)).await {
                    Ok(()) => break,
                    Err(error) => tracing::debug!(key = self.key, %error, "registry: still not registered"),
                }
                sleep(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
            tracing::info!(key = self.key, "registry: registered again");
        }
    }

    /// Keeps the lease alive and writes what changes, until one of them fails.
    async fn keep_alive(&mut self, record: &mut watch::Receiver<Member>) -> RegistryError {
        match self.try_keep_alive(record).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_keep_alive(
        &mut self,
        record: &mut watch::Receiver<Member>,
    ) -> Result<std::convert::Infallible, RegistryError> {
        let opened = self.client.lease_keep_alive(self.id);
        let (mut keeper, mut answers) = call(opened).await?;
        let interval = Duration::from_secs(self.ttl.unsigned_abs()) / 3;
        loop {
            tokio::select! {
                () = sleep(interval) => {}
                changed = record.changed() => {
                    let member = record.borrow_and_update().clone();
                    if changed.is_ok() {
                        call(self.write(&member)).await?;
                    }
                }
            }
            call(beat(&mut keeper, &mut answers)).await?;
        }
    }
}
