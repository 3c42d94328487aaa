//! A cluster that asks everybody who they are: each node with a certificate of one authority, and API keys. And all
//! kinds of callers to try it with.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use moesaic::certs::{Authority, Leaf, Validity, folder};
use moesaic_attention_worker as attention_worker;
use moesaic_coordinator as coordinator;
use moesaic_coordinator::core::keys;
use moesaic_expert_worker as expert_worker;
use moesaic_kernels::{Backend, Pool};
use moesaic_model::Checkpoint;
use moesaic_node::{Identity, Member, MemberSettings, Membership, Peer, Registry, Tls, registry};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;
use moesaic_worker::WorkerSettings;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cluster::PATIENCE;
use crate::fixtures;

pub const CLUSTER: &str = "test";
/// The keys that the coordinator knows, and one that it does not.
pub const INFER_KEY: &str = "moe-infer-canary-7d1f";
pub const OPERATE_KEY: &str = "moe-operate-canary-51ac";
pub const STRANGERS_KEY: &str = "moe-stranger-canary-90be";

/// What a client shows of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    NoCertificate,
    /// Of the cluster's authority, with a role.
    Role(Role),
    OtherAuthority,
    OtherCluster,
    Expired,
    NotYetValid,
    Revoked,
    /// Good, and without an identity.
    Nameless,
}

pub struct Secured {
    pub authority: Authority,
    pub registry: Arc<dyn Registry>,
    /// The coordinator's, the attention worker's and the expert worker's.
    pub peers: [Peer; 3],
    pub dir: TempDir,
    revoked: Leaf,
    stop: CancellationToken,
    nodes: Vec<JoinHandle<anyhow::Result<()>>>,
}

pub fn identity(cluster: &str, role: Role, id: &str) -> Identity {
    Identity { cluster: cluster.into(), role, id: WorkerId::new(id).unwrap() }
}

/// The coordinators' file of keys.
pub fn keys_file(dir: &Path) -> PathBuf {
    let entry = |(name, key, scope)| {
        format!("[[keys]]\nname = {name:?}\nsha256 = {:?}\nscopes = [{scope:?}]\n", keys::written_hash(key))
    };
    let text: String = [("user", INFER_KEY, "infer"), ("operator", OPERATE_KEY, "operate")].map(entry).concat();
    let path = dir.join("keys.toml");
    std::fs::write(&path, text).unwrap();
    path
}

impl Secured {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(CLUSTER).unwrap();
        let good = Validity::days(1);
        let revoked = authority.leaf(Some(&identity(CLUSTER, Role::Operator, "gone")), &[], good).unwrap();
        let list = authority.revoked(std::slice::from_ref(&revoked.serial)).unwrap();
        let registry = registry::open("embedded", CLUSTER).await.unwrap();
        let membership = |role, id: &str| {
            let folder = folder(dir.path(), role, id);
            authority.leaf(Some(&identity(CLUSTER, role, id)), &[], good).unwrap().write(&folder).unwrap();
            std::fs::write(folder.join("ca.crl"), &list).unwrap();
            let tls = Some(Tls::open(&folder, CLUSTER, role, Some(id)).unwrap());
            Membership { registry: registry.clone(), tls }
        };
        let checkpoint = Arc::new(Checkpoint::open(&fixtures::folder("tiny-r1")).unwrap());
        let (pool, stop) = (Pool::new(1), CancellationToken::new());
        let mut nodes = Vec::new();
        let worker = |id| WorkerSettings { member: MemberSettings::named(id, CLUSTER), ..Default::default() };
        let config = expert_worker::Config { worker: worker("e0"), ..Default::default() };
        let context = expert_worker::Context {
            membership: membership(Role::ExpertWorker, "e0"),
            hub: None,
            backend: Backend::Cpu(config.worker.dtype().unwrap().numerics(), pool.clone()),
            fabric: None,
            checkpoint: checkpoint.clone(),
            profile: Arc::default(),
        };
        nodes.push(tokio::spawn(expert_worker::run(config, context, stop.clone())));
        let config = attention_worker::Config { worker: worker("a0"), cache_tokens: Some(4096), ..Default::default() };
        let context = attention_worker::Context {
            membership: membership(Role::AttentionWorker, "a0"),
            hub: None,
            backend: Backend::Cpu(config.worker.dtype().unwrap().numerics(), pool),
            fabric: None,
            checkpoint,
            profile: Arc::default(),
        };
        nodes.push(tokio::spawn(attention_worker::run(config, context, stop.clone())));
        let config = coordinator::Config {
            model: Some(fixtures::folder("tiny-r1")),
            member: MemberSettings::named("c0", CLUSTER),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            keys: Some(keys_file(dir.path())),
            ..Default::default()
        };
        let context = coordinator::Context { membership: membership(Role::Coordinator, "c0") };
        let front = coordinator::Coordinator::bind(config, context).unwrap();
        let door = Peer { role: Role::Coordinator, id: None, address: front.address().to_string() };
        nodes.push(tokio::spawn(front.serve(stop.clone())));

        let mut view = registry.view();
        let of = |role| move |view: &Arc<moesaic_node::View>| view.of_role(role).next().map(Member::peer);
        let mut peers = vec![door];
        for role in [Role::AttentionWorker, Role::ExpertWorker] {
            let joined = tokio::time::timeout(PATIENCE, view.wait_for(|view| of(role)(view).is_some())).await;
            peers.push(of(role)(&joined.expect("it joins").unwrap()).unwrap());
        }
        let peers = peers.try_into().expect("three");
        Self { authority, registry, peers, dir, revoked, stop, nodes }
    }

    /// A folder with what a client shows; None: it has no certificate.
    pub fn folder_of(&self, shown: Shown) -> Option<PathBuf> {
        let (good, day) = (Validity::days(1), time::Duration::days(1));
        let operator = identity(CLUSTER, Role::Operator, "o");
        let leaf = |identity, validity| self.authority.leaf(Some(identity), &[], validity).unwrap();
        let leaf = match shown {
            Shown::NoCertificate => return None,
            Shown::Role(role) => leaf(&identity(CLUSTER, role, "x"), good),
            Shown::OtherAuthority => {
                let other = Authority::new(CLUSTER).unwrap().leaf(Some(&operator), &[], good).unwrap();
                // It knows whom it talks to, and is not known itself.
                let authority = leaf(&operator, good).authority;
                Leaf { authority, ..other }
            }
            Shown::OtherCluster => leaf(&identity("other", Role::Operator, "o"), good),
            Shown::Expired => leaf(&operator, Validity { from: good.from - day * 3, to: good.from - day }),
            Shown::NotYetValid => leaf(&operator, Validity { from: good.to, to: good.to + day }),
            Shown::Revoked => self.revoked.clone(),
            Shown::Nameless => self.authority.leaf(None, &[], good).unwrap(),
        };
        let folder = self.dir.path().join(format!("client-{shown:?}"));
        leaf.write(&folder).unwrap();
        Some(folder)
    }

    pub async fn stop(self) {
        self.stop.cancel();
        for node in self.nodes {
            tokio::time::timeout(Duration::from_secs(30), node).await.expect("it stops").unwrap().unwrap();
        }
    }
}
