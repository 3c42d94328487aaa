//! One suite for both registries, and what only etcd can do: expire, restart, compact, hold what is not ours.
//! Starts etcd from the PATH (or $MOESAIC_ETCD) on free loopback ports and ends it by its id.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use moesaic_node::registry::{self, EtcdOptions};
use moesaic_node::{Member, Registry, View, handshake};
use moesaic_proto::v1::{Cordon, Role};
use moesaic_proto::{Epoch, LayerId, Placement, WorkerId};

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

struct Etcd {
    child: Child,
    endpoint: String,
    peer: String,
    data: tempfile::TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn spawn(data: &Path, endpoint: &str, peer: &str) -> Child {
    let program = std::env::var("MOESAIC_ETCD").unwrap_or_else(|_| "etcd".into());
    let (client, peer) = (format!("http://{endpoint}"), format!("http://{peer}"));
    Command::new(&program)
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("{program} cannot be started ({e}): install etcd-server, or set MOESAIC_ETCD"))
}

impl Etcd {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let (endpoint, peer) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        Self { child: spawn(data.path(), &endpoint, &peer), endpoint, peer, data }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = spawn(self.data.path(), &self.endpoint, &self.peer);
    }

    async fn registry(&self) -> Arc<dyn Registry> {
        let options = EtcdOptions { lease_ttl_seconds: 2, ..EtcdOptions::default() };
        retry(|| registry::etcd(std::slice::from_ref(&self.endpoint), "test", options, registry::Way::Plain)).await
    }

    async fn client(&self) -> etcd_client::Client {
        retry(|| etcd_client::Client::connect([&self.endpoint], None)).await
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn retry<T, E: std::fmt::Debug, F: Future<Output = Result<T, E>>>(mut make: impl FnMut() -> F) -> T {
    let start = tokio::time::Instant::now();
    loop {
        match make().await {
            Ok(value) => return value,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn until(registry: &Arc<dyn Registry>, what: &str, holds: impl Fn(&View) -> bool) {
    let mut view = registry.view();
    let waited = tokio::time::timeout(PATIENCE, view.wait_for(|view| holds(view))).await;
    assert!(waited.is_ok(), "never seen: {what}; last view: {:?}", registry.view().borrow());
}

fn member(id: &str, epoch: u32) -> Member {
    let id = WorkerId::new(id).unwrap();
    let hello = handshake::hello("test", Role::ExpertWorker, &id, "f00d", "f32");
    let member = Member::new(hello, id, "127.0.0.1:7000".into(), Some("n"));
    Member { epoch_loaded: Epoch(epoch), expert_slots: 5, ..member }
}

fn has(view: &View, id: &str, epoch: u32) -> bool {
    view.of_role(Role::ExpertWorker).any(|m| m.id.as_str() == id && m.epoch_loaded == Epoch(epoch))
}

fn placement(epoch: u32) -> Placement {
    let layers = BTreeMap::from([(LayerId(1), vec![vec![0]])]);
    Placement::new(Epoch(epoch), vec![WorkerId::new("a").unwrap()], layers).unwrap()
}

/// What every registry promises; `one` and `two` are the views of two nodes on the same cluster.
async fn suite(one: Arc<dyn Registry>, two: Arc<dyn Registry>) {
    let a = one.register(member("a", 0)).await.unwrap();
    let b = two.register(member("b", 0)).await.unwrap();
    until(&one, "b on one", |v| has(v, "b", 0)).await;
    until(&two, "a on two", |v| has(v, "a", 0)).await;

    let stored = one.view().borrow().members.values().next().unwrap().clone();
    a.update(Member { epoch_loaded: Epoch(7), ..stored });
    until(&two, "a's update", |v| has(v, "a", 7)).await;

    b.leave().await;
    until(&one, "b gone", |v| v.members.len() == 1).await;
    drop(a);
    until(&two, "a gone", |v| v.members.is_empty()).await;

    assert!(!one.publish(placement(2)).await.unwrap(), "epoch 2 does not follow none");
    let (first, second) = tokio::join!(one.publish(placement(1)), two.publish(placement(1)));
    assert_ne!(first.unwrap(), second.unwrap(), "one publisher is first, the other is told");
    until(&two, "epoch 1", |v| v.placement.as_ref().is_some_and(|p| p.epoch() == Epoch(1))).await;
    assert!(!two.publish(placement(1)).await.unwrap());
    assert!(two.publish(placement(2)).await.unwrap());
    until(&one, "epoch 2", |v| v.placement.as_ref().is_some_and(|p| **p == placement(2))).await;

    let bad = Member { address: "nowhere".into(), ..member("c", 0) };
    let refused = one.register(bad).await.err().unwrap().to_string();
    assert!(refused.contains("nowhere"), "{refused}");
}

/// Of two coordinators one leads; when it gives the lead up the other one does, with a greater term where terms grow;
/// and only the leader's placements are taken.
async fn leads(one: Arc<dyn Registry>, two: Arc<dyn Registry>) -> (u64, u64) {
    let (a, b) = (WorkerId::new("a").unwrap(), WorkerId::new("b").unwrap());
    let first = one.campaign(a.clone());
    let old = *first.term.clone().wait_for(Option::is_some).await.unwrap();
    let old = old.unwrap();
    until(&two, "a leads", |v| v.leader.as_ref().is_some_and(|l| l.id == a && l.term == old)).await;
    let second = two.campaign(b.clone());
    assert!(!one.publish(placement(1).with_term(old + 1)).await.unwrap(), "of a term that nobody leads");
    assert!(one.publish(placement(1).with_term(old)).await.unwrap());
    assert_eq!(*second.term.borrow(), None);

    first.resign().await;
    let new = second.term.clone().wait_for(Option::is_some).await.unwrap().unwrap();
    until(&one, "b leads", |v| v.leader.as_ref().is_some_and(|l| l.id == b && l.term == new)).await;
    assert!(two.publish(placement(2).with_term(new)).await.unwrap());

    let drain = Cordon { drain: true };
    one.set_cordon(Role::ExpertWorker, a.clone(), Some(drain)).await.unwrap();
    until(&two, "the cordon", |v| v.cordons.get(&(Role::ExpertWorker, a.clone())) == Some(&drain)).await;
    one.set_cordon(Role::ExpertWorker, a.clone(), None).await.unwrap();
    until(&two, "no cordon", |v| v.cordons.is_empty()).await;
    second.resign().await;
    until(&one, "no leader", |v| v.leader.is_none()).await;
    (old, new)
}

#[tokio::test]
async fn embedded_has_one_leader() {
    let registry = registry::embedded();
    leads(registry.clone(), registry).await;
}

#[tokio::test]
async fn etcd_has_one_leader_and_refuses_the_one_before() {
    let etcd = Etcd::start();
    let (one, two) = (etcd.registry().await, etcd.registry().await);
    let (old, new) = leads(one.clone(), two).await;
    assert!(old < new);
    assert!(!one.publish(placement(3).with_term(old)).await.unwrap());
}

/// A leader whose etcd is gone steps down by itself; when etcd is back there is one again.
#[tokio::test]
async fn a_leader_without_etcd_steps_down() {
    let mut etcd = Etcd::start();
    let one = etcd.registry().await;
    let campaign = one.campaign(WorkerId::new("a").unwrap());
    let mut term = campaign.term.clone();
    let old = term.wait_for(Option::is_some).await.unwrap().unwrap();
    etcd.kill();
    tokio::time::timeout(Duration::from_secs(3), term.wait_for(Option::is_none)).await.unwrap().unwrap();
    assert!(!one.view().borrow().is_current);
    etcd.restart();
    let new = tokio::time::timeout(PATIENCE, term.wait_for(Option::is_some)).await.unwrap().unwrap().unwrap();
    assert!(old < new);
}

#[tokio::test]
async fn embedded_keeps_the_promises() {
    let registry = registry::embedded();
    suite(registry.clone(), registry).await;
}

#[tokio::test]
async fn etcd_keeps_the_promises() {
    let etcd = Etcd::start();
    suite(etcd.registry().await, etcd.registry().await).await;
}

#[tokio::test]
async fn views_and_leases_outlive_etcd() {
    let mut etcd = Etcd::start();
    let (one, two) = (etcd.registry().await, etcd.registry().await);
    let _a = one.register(member("a", 0)).await.unwrap();
    until(&two, "a", |v| has(v, "a", 0)).await;

    etcd.kill();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(has(&two.view().borrow(), "a", 0), "the last view stays in force");
    etcd.restart();

    // Proves that the watch is back, and that a's lease is kept or taken anew for longer than its time to live.
    let b = retry(|| one.register(member("b", 3))).await;
    until(&two, "b after the restart", |v| has(v, "b", 3)).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    until(&two, "a after its lease's time", |v| has(v, "a", 0) && has(v, "b", 3)).await;
    b.leave().await;
    until(&two, "b gone", |v| v.members.len() == 1).await;
}

#[tokio::test]
async fn a_member_whose_process_is_gone_disappears_with_its_lease() {
    let etcd = Etcd::start();
    let watcher = etcd.registry().await;
    let endpoint = etcd.endpoint.clone();
    // A runtime of its own, shut down without a word to etcd: as if the process were killed.
    let gone = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let options = EtcdOptions { lease_ttl_seconds: 2, ..EtcdOptions::default() };
            let registry = registry::etcd(&[endpoint], "test", options, registry::Way::Plain).await.unwrap();
            std::mem::forget(registry.register(member("a", 0)).await.unwrap());
        });
        runtime.shutdown_background();
    });
    gone.join().unwrap();
    until(&watcher, "a", |v| has(v, "a", 0)).await;
    until(&watcher, "a gone", |v| v.members.is_empty()).await;
}

#[tokio::test]
async fn a_compaction_while_disconnected_loses_no_member() {
    let mut etcd = Etcd::start();
    let (one, two) = (etcd.registry().await, etcd.registry().await);
    let _a = one.register(member("a", 0)).await.unwrap();
    until(&two, "a", |v| has(v, "a", 0)).await;
    etcd.kill();
    etcd.restart();
    let mut client = etcd.client().await;
    let mut revision = 0;
    for i in 0..20 {
        let put = retry(|| {
            let mut client = client.clone();
            async move { client.put("/elsewhere", format!("{i}"), None).await }
        });
        revision = put.await.header().unwrap().revision();
    }
    client.compact(revision, None).await.unwrap();
    let _b = retry(|| one.register(member("b", 0))).await;
    until(&two, "both", |v| has(v, "a", 0) && has(v, "b", 0)).await;
}

#[tokio::test]
async fn what_is_not_ours_is_ignored() {
    let mut etcd = Etcd::start();
    let one = etcd.registry().await;
    assert!(one.publish(placement(1)).await.unwrap());
    let _a = one.register(member("a", 0)).await.unwrap();
    until(&one, "a and epoch 1", |v| has(v, "a", 0) && v.placement.is_some()).await;

    let mut client = etcd.client().await;
    client.put("/moesaic/test/workers/expert-worker/a", "\u{7f}not protobuf", None).await.unwrap();
    client.put("/moesaic/test/workers/expert-worker/x", "\u{1}", None).await.unwrap();
    client.put("/moesaic/test/placement", vec![0xff; 1 << 20], None).await.unwrap();
    client.put("/moesaic/test/strange", "", None).await.unwrap();
    let _b = one.register(member("b", 0)).await.unwrap();
    until(&one, "b, after all of them", |v| has(v, "b", 0)).await;
    let view = one.view().borrow().clone();
    assert!(has(&view, "a", 0) && view.members.len() == 2);
    assert_eq!(view.placement.as_deref(), Some(&placement(1)));

    // Listing again meets the same values; the last good ones still count, and are what a publisher follows.
    etcd.kill();
    etcd.restart();
    let _c = retry(|| one.register(member("c", 0))).await;
    until(&one, "c, after listing again", |v| has(v, "c", 0)).await;
    let view = one.view().borrow().clone();
    assert!(has(&view, "b", 0) && view.placement.as_deref() == Some(&placement(1)), "{view:?}");
    assert!(retry(|| one.publish(placement(2))).await);
}

#[tokio::test]
async fn errors_at_start_name_what_is_wrong() {
    for (spec, cluster, expected) in [
        ("redis://x", "c", "redis://x"),
        ("etcd://", "c", "etcd://"),
        ("etcd://127.0.0.1:1", "c", "127.0.0.1:1"),
        ("etcd://127.0.0.1:1", "Not A Name", "Not A Name"),
    ] {
        let error = registry::open(spec, cluster).await.err().unwrap().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}
