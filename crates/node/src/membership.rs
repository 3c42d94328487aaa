//! What a process needs to be a node: who it is, its certificate, if the cluster has them, and the registry.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use moesaic_proto::WorkerId;
use moesaic_proto::ids::InvalidWorkerId;
use moesaic_proto::v1::Role;

use crate::tls::{self, Tls, TlsError};
use crate::{Connector, Registry, RegistryError, config, handshake, registry};

/// What makes a process a member of its cluster.
#[derive(Clone, Debug, clap::Args)]
pub struct MemberSettings {
    /// Unique among the cluster's nodes of its role; that of its certificate, or drawn, if not given
    #[arg(long)]
    pub id: Option<String>,
    /// The cluster that it belongs to: a-z, 0-9 and -
    #[arg(long, default_value = "moesaic")]
    pub cluster: String,
    /// etcd://host:port[,host:port], or etcds://... over TLS
    // Or "embedded", inside `moesaic up`.
    #[arg(long, default_value = "etcd://127.0.0.1:2379")]
    pub registry: String,
    /// The address that other nodes can reach, if it is not the one to listen on
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Where to serve probes (/livez, /startupz, /readyz) and Prometheus' /metrics, without TLS
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// http://host:port of an OpenTelemetry collector that takes OTLP over gRPC; nothing is traced if not given
    #[arg(long, value_name = "URL")]
    pub traces: Option<String>,
    /// A folder with this node's certificate: tls.crt, tls.key, ca.crt and, if there is one, ca.crl; no TLS if not given
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// The authorities of etcd's certificate, in PEM, if they are not those of --tls
    #[arg(long, value_name = "FILE")]
    pub registry_ca: Option<PathBuf>,
}

impl Default for MemberSettings {
    fn default() -> Self {
        config::defaults()
    }
}

#[derive(Clone)]
pub struct Membership {
    pub registry: Arc<dyn Registry>,
    pub tls: Option<Tls>,
}

#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("tls")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl MemberSettings {
    /// Of the node `id` of that cluster.
    pub fn named(id: impl Into<String>, cluster: &str) -> Self {
        Self { id: Some(id.into()), cluster: cluster.to_owned(), ..Self::default() }
    }

    /// Reads the certificate, and connects to the registry.
    pub async fn open(&self, role: Role) -> Result<Membership, MembershipError> {
        let open = |dir: &PathBuf| Tls::open(dir, &self.cluster, role, self.id.as_deref());
        let tls = self.tls.as_ref().map(open).transpose()?;
        let authorities = self.registry_ca.as_deref().map(tls::authorities).transpose()?;
        let registry = registry::open_over(&self.registry, &self.cluster, tls.clone(), authorities).await?;
        Ok(Membership { registry, tls })
    }
}

impl Membership {
    /// Opens connections to other nodes.
    pub fn connector(&self) -> Connector {
        Connector::over(self.tls.clone())
    }

    /// The id that the node was given, that of its certificate, or one drawn for it.
    pub fn id(&self, given: Option<&str>, role: &str) -> Result<WorkerId, InvalidWorkerId> {
        let certified = self.tls.as_ref().map(|tls| tls.own().id.as_str());
        handshake::worker_id(given.or(certified), role)
    }

    /// Runs `work`, and meanwhile takes up new certificates as they come.
    pub async fn keep_up<T>(&self, work: impl Future<Output = T>) -> T {
        let follow = async {
            match &self.tls {
                Some(tls) => tls.follow().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = work => done,
            never = follow => match never {},
        }
    }
}

/// Without TLS.
impl From<Arc<dyn Registry>> for Membership {
    fn from(registry: Arc<dyn Registry>) -> Self {
        Self { registry, tls: None }
    }
}
