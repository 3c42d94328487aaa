//! What a process needs to be a node: its certificate, if the cluster has them, and the registry.

use std::path::Path;
use std::sync::Arc;

use moesaic_proto::WorkerId;
use moesaic_proto::ids::InvalidWorkerId;
use moesaic_proto::v1::Role;

use crate::tls::{self, Tls, TlsError};
use crate::{Connector, Registry, RegistryError, handshake, registry};

/// Where they are.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    pub cluster: &'a str,
    pub role: Role,
    /// The certificate's if unset.
    pub id: Option<&'a str>,
    /// As `registry::open_over` takes it.
    pub registry: &'a str,
    /// A folder with the node's certificate (see `tls`). None: no TLS anywhere.
    pub tls: Option<&'a Path>,
    /// The authorities of etcd's certificate, if they are not the cluster's.
    pub registry_ca: Option<&'a Path>,
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

impl Settings<'_> {
    pub async fn open(&self) -> Result<Membership, MembershipError> {
        let open = |dir| Tls::open(dir, self.cluster, self.role, self.id);
        let tls = self.tls.map(open).transpose()?;
        let authorities = self.registry_ca.map(tls::authorities).transpose()?;
        let registry = registry::open_over(self.registry, self.cluster, tls.clone(), authorities).await?;
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
