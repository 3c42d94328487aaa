//! Who is there and who holds what: the same trait over a table in this process and over etcd.

mod embedded;
mod etcd;
pub mod records;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::BoxFuture;
use moesaic_proto::v1::{Cordon, Hello, MemberRecord, Role};
use moesaic_proto::{Epoch, Placement, WorkerId};
use rustls::RootCertStore;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::DropGuard;

pub use embedded::embedded;
pub use etcd::{EtcdOptions, Way, etcd};

use crate::connect::Peer;
use crate::tls::Tls;

/// A node's name, in bytes: as long as a host name may be.
const NODE_LEN_MAX: usize = 253;

/// The cluster as one node sees it. With the registry away the last view stays in force.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    pub members: BTreeMap<(Role, WorkerId), Member>,
    pub placement: Option<Arc<Placement>>,
    pub leader: Option<Leader>,
    /// What operators want of workers.
    pub cordons: BTreeMap<(Role, WorkerId), Cordon>,
    /// Whether the view is kept up to date; false while the registry is away.
    pub is_current: bool,
}

/// The one coordinator that writes placements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    pub id: WorkerId,
    /// Grows from leader to leader.
    pub term: u64,
}

impl View {
    /// Whether an expert worker has in memory what a placement gives it.
    pub fn has_loaded(&self, worker: &WorkerId, placement: &Placement) -> bool {
        let member = self.members.get(&(Role::ExpertWorker, worker.clone()));
        member.is_some_and(|member| member.epoch_loaded >= placement.epoch())
    }

    pub fn of_role(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.values().filter(move |member| member.hello.role() == role)
    }
}

/// A node that is alive.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    pub hello: Hello,
    pub id: WorkerId,
    /// "host:port"
    pub address: String,
    /// Expert workers: the newest placement epoch whose experts are loaded; 0 for none.
    pub epoch_loaded: Epoch,
    /// What it stands on and may fail with.
    pub node: String,
    /// Expert workers: experts that it can hold, over all layers; 0 for as many as it is given.
    pub expert_slots: u32,
    /// It is about to stop.
    pub draining: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error(
        "registry {spec:?} is unknown; expected embedded, etcd://host:port[,host:port] or etcds://host:port[,host:port]"
    )]
    Spec { spec: String },
    #[error("registry {spec:?} is over TLS; set tls to the folder of this node's certificate")]
    NoCertificate { spec: String },
    #[error("cluster {cluster:?} is not 1 to 63 characters of a-z, 0-9 and -")]
    Cluster { cluster: String },
    #[error("no etcd answers at {endpoints}")]
    Connect { endpoints: String, source: etcd_client::Error },
    #[error("etcd did not answer within {seconds} s")]
    Timeout { seconds: u64 },
    #[error("etcd refused")]
    Etcd(#[from] etcd_client::Error),
    #[error("member {id}: {reason}")]
    Member { id: String, reason: String },
}

/// Where members, their leases and the placement are kept.
pub trait Registry: Send + Sync + 'static {
    /// Makes the member known until the registration is given up. A newer process of the same role and id takes the
    /// older one's place.
    fn register(&self, member: Member) -> BoxFuture<'_, Result<Registration, RegistryError>>;

    /// The newest view, and news of it.
    fn view(&self) -> watch::Receiver<Arc<View>>;

    /// Puts a placement in force if its epoch follows the one in force (1 if there is none) and the leader of its term
    /// still leads. False: somebody was first.
    fn publish(&self, placement: Placement) -> BoxFuture<'_, Result<bool, RegistryError>>;

    /// Runs for leader until the campaign is given up.
    fn campaign(&self, id: WorkerId) -> Campaign;

    /// Sets or takes back (`None`) an operator's wish.
    fn set_cordon(&self, role: Role, id: WorkerId, cordon: Option<Cordon>) -> BoxFuture<'_, Result<(), RegistryError>>;
}

/// A coordinator's candidacy. Dropping it gives the lead up in the background.
pub struct Campaign {
    /// This coordinator's term while it leads.
    pub term: watch::Receiver<Option<u64>>,
    task: JoinHandle<()>,
    stop: DropGuard,
}

impl Campaign {
    /// Gives the lead up, so that another can take it at once, and waits until it is done.
    pub async fn resign(self) {
        drop(self.stop);
        // A campaign that has panicked leads nothing.
        let _ = self.task.await;
    }
}

/// A member's entry. Dropping it gives the entry up in the background.
pub struct Registration(Box<dyn Entry>);

trait Entry: Send + Sync {
    fn update(&self, member: Member);
    fn leave(self: Box<Self>) -> BoxFuture<'static, ()>;
}

impl Registration {
    /// Replaces the entry's record.
    pub fn update(&self, member: Member) {
        self.0.update(member);
    }

    /// Gives the entry up and waits until others can see it, or the registry does not answer.
    pub async fn leave(self) {
        self.0.leave().await;
    }
}

/// Opens the registry that `spec` names: "embedded" or "etcd://host:port[,host:port]".
pub async fn open(spec: &str, cluster: &str) -> Result<Arc<dyn Registry>, RegistryError> {
    open_over(spec, cluster, None, None).await
}

/// The same; also "etcds://host:port[,host:port]" over TLS, where this node shows its certificate and etcd one of
/// `authorities` or, if there are none, of the cluster's.
pub async fn open_over(
    spec: &str,
    cluster: &str,
    tls: Option<Tls>,
    authorities: Option<RootCertStore>,
) -> Result<Arc<dyn Registry>, RegistryError> {
    let unknown = || RegistryError::Spec { spec: spec.to_owned() };
    if spec == "embedded" {
        return Ok(embedded());
    }
    let (scheme, endpoints) =
        spec.split_once("://").filter(|(_, endpoints)| !endpoints.is_empty()).ok_or_else(unknown)?;
    let endpoints: Vec<String> = endpoints.split(',').map(str::to_owned).collect();
    let way = match (scheme, tls) {
        ("etcd", _) => Way::Plain,
        ("etcds", Some(tls)) => Way::Tls { tls, authorities },
        ("etcds", None) => return Err(RegistryError::NoCertificate { spec: spec.to_owned() }),
        _ => return Err(unknown()),
    };
    etcd(&endpoints, cluster, EtcdOptions::default(), way).await
}

impl Member {
    /// One that has loaded nothing and stays. Its node is its own id if none is given.
    pub fn new(hello: Hello, id: WorkerId, address: String, node: Option<&str>) -> Self {
        let node = node.unwrap_or(id.as_str()).to_owned();
        Self { hello, id, address, epoch_loaded: Epoch(0), node, expert_slots: 0, draining: false }
    }

    /// Whom to connect to.
    pub fn peer(&self) -> Peer {
        Peer { role: self.hello.role(), id: Some(self.id.clone()), address: self.address.clone() }
    }

    pub fn to_record(&self) -> MemberRecord {
        let (hello, address) = (Some(self.hello.clone()), self.address.clone());
        let (epoch_loaded, node, expert_slots) = (self.epoch_loaded.0, self.node.clone(), self.expert_slots);
        MemberRecord { hello, address, epoch_loaded, node, expert_slots, draining: self.draining }
    }

    /// Checks a record that came from elsewhere.
    pub fn from_record(record: MemberRecord) -> Result<Self, RegistryError> {
        let hello = record.hello.unwrap_or_default();
        let refused = |reason: String| RegistryError::Member { id: hello.id.chars().take(80).collect(), reason };
        let id = WorkerId::new(&hello.id).map_err(|e| refused(e.to_string()))?;
        if matches!(hello.role(), Role::Unspecified | Role::Operator) {
            return Err(refused(format!("role {} is no member's", hello.role)));
        }
        if record.address.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
            let given: String = record.address.chars().take(80).collect();
            return Err(refused(format!("address {given:?} is not host:port")));
        }
        if record.node.len() > NODE_LEN_MAX {
            return Err(refused(format!("node has {} bytes; expected at most {NODE_LEN_MAX}", record.node.len())));
        }
        let MemberRecord { address, epoch_loaded, node, expert_slots, draining, .. } = record;
        Ok(Self { id, hello, address, epoch_loaded: Epoch(epoch_loaded), node, expert_slots, draining })
    }
}
