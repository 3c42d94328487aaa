//! TLS 1.3 between nodes: both sides show a certificate of the cluster's own authority, and say by it who they are.
//!
//! A folder holds what a node needs, under the names that Kubernetes' secrets and cert-manager give: `tls.crt` (the
//! node's certificate and what is between it and the authority), `tls.key`, `ca.crt` (the authorities) and, if
//! certificates were revoked, `ca.crl`. All are PEM. They are read again while the node runs: connections that are made
//! from then on use the new ones, those that are open go on while the other side's certificate is believed.

mod held;
mod trust;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use moesaic_proto::v1::Role;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::connect::Peer;
use crate::identity::{Identity, InvalidIdentity, role_name};
use crate::reload;
use held::Held;
use trust::{AnyClient, KnownServer, Side, Trust};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const AUTHORITIES: &str = "ca.crt";
const REVOKED: &str = "ca.crl";
/// Of a file in the folder: bundles of authorities are smaller.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{}: cannot be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{}", path.display())]
    Identity { path: PathBuf, source: InvalidIdentity },
    #[error("{}: {field} is {given:?} in the certificate; expected {expected:?}", path.display())]
    Mismatch { path: PathBuf, field: &'static str, given: String, expected: String },
}

/// Whether a client must show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificate {
    Required,
    /// It may say who it is in another way.
    Optional,
}

/// A node's own certificate and whom it trusts, as the folder has them now. Clones share it.
#[derive(Clone)]
pub struct Tls {
    dir: PathBuf,
    own: Identity,
    provider: Arc<CryptoProvider>,
    current: watch::Sender<Arc<Material>>,
}

/// What was read from the folder at one time.
struct Material {
    files: Files,
    own: Identity,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    trust: Arc<Trust>,
    /// For clients that must show a certificate, and for those that may.
    requires: Arc<ServerConfig>,
    permits: Arc<ServerConfig>,
}

/// Whose certificate it should be; None: anybody's.
#[derive(Clone, Copy)]
struct Expected<'a> {
    cluster: Option<&'a str>,
    role: Role,
    id: Option<&'a str>,
}

#[derive(PartialEq)]
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
    authorities: Vec<u8>,
    revoked: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the folder. The certificate must be of this cluster and role, and, if one is given, of this id.
    pub fn open(dir: &Path, cluster: &str, role: Role, id: Option<&str>) -> Result<Self, TlsError> {
        Self::open_expecting(dir, Expected { cluster: Some(cluster), role, id })
    }

    /// For whoever belongs to the cluster that the certificate names.
    pub fn open_as(dir: &Path, role: Role) -> Result<Self, TlsError> {
        Self::open_expecting(dir, Expected { cluster: None, role, id: None })
    }

    fn open_expecting(dir: &Path, expected: Expected<'_>) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let material = Material::parse(dir, Files::read(dir)?, &provider, expected)?;
        let own = material.own.clone();
        Ok(Self { dir: dir.to_owned(), own, provider, current: watch::Sender::new(Arc::new(material)) })
    }

    /// Who this node is.
    pub fn own(&self) -> &Identity {
        &self.own
    }

    /// Reads the folder again and again, for as long as it is polled.
    pub async fn follow(&self) -> Infallible {
        reload::follow("certificates", || self.reload()).await
    }

    /// Reads the folder again. Whether anything has changed.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let files = Files::read(&self.dir)?;
        if files == self.current.borrow().files {
            return Ok(false);
        }
        let Identity { cluster, role, id } = &self.own;
        let expected = Expected { cluster: Some(cluster), role: *role, id: Some(id.as_str()) };
        let material = Material::parse(&self.dir, files, &self.provider, expected)?;
        self.current.send_replace(Arc::new(material));
        Ok(true)
    }

    /// The server's side of a connection, and who the client is.
    pub async fn accept<S>(
        &self,
        stream: S,
        client: ClientCertificate,
    ) -> io::Result<(Held<server::TlsStream<S>>, Option<Identity>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut changes = self.current.subscribe();
        let material = changes.borrow_and_update().clone();
        let config = match client {
            ClientCertificate::Required => &material.requires,
            ClientCertificate::Optional => &material.permits,
        };
        let stream = TlsAcceptor::from(config.clone()).accept(stream).await?;
        let chain = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec);
        let shown = chain.as_ref().and_then(|chain| chain.first());
        let identity = shown.map(Identity::of_certificate).transpose().map_err(io::Error::other)?;
        Ok((Held::new(stream, chain, Side::Client, changes), identity))
    }

    /// The client's side of a connection to a node, which must be the one that is meant.
    pub async fn connect<S>(&self, stream: S, peer: &Peer) -> io::Result<Held<client::TlsStream<S>>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut changes = self.current.subscribe();
        let trust = changes.borrow_and_update().trust.clone();
        let verifier = Arc::new(KnownServer { trust, peer: peer.clone() });
        let builder = self.client_builder().dangerous().with_custom_certificate_verifier(verifier);
        // Identities are no host names: the verifier looks at nothing but the certificate.
        let name = ServerName::try_from("moesaic.invalid").map_err(io::Error::other)?;
        let stream = self.connect_with(builder, name, stream).await?;
        let chain = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec);
        Ok(Held::new(stream, chain, Side::Server, changes))
    }

    /// The client's side of a connection to a server that is no node, such as etcd: known by its host's name, and by
    /// `authorities` or, if none are given, the cluster's own.
    pub async fn connect_by_name<S>(
        &self,
        stream: S,
        host: &str,
        authorities: Option<&RootCertStore>,
    ) -> io::Result<client::TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let own = self.current.borrow().trust.clone();
        let roots = authorities.unwrap_or(own.authorities()).clone();
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        self.connect_with(self.client_builder().with_root_certificates(roots), name, stream).await
    }

    fn client_builder(&self) -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
        let builder = ClientConfig::builder_with_provider(self.provider.clone());
        builder.with_protocol_versions(&[&TLS13]).expect("the provider has TLS 1.3")
    }

    async fn connect_with<S>(
        &self,
        builder: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
        name: ServerName<'static>,
        stream: S,
    ) -> io::Result<client::TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let material = self.current.borrow().clone();
        let config = builder.with_client_auth_cert(material.chain.clone(), material.key.clone_key());
        let mut config = config.map_err(io::Error::other)?;
        config.alpn_protocols = vec![HTTP2.into()];
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }
}

pub const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({})", self.own)
    }
}

impl Files {
    fn read(dir: &Path) -> Result<Self, TlsError> {
        Ok(Self {
            certificate: read(&dir.join(CERTIFICATE))?,
            key: read(&dir.join(KEY))?,
            authorities: read(&dir.join(AUTHORITIES))?,
            revoked: match read(&dir.join(REVOKED)) {
                Err(TlsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
                read => Some(read?),
            },
        })
    }
}

impl Material {
    fn parse(
        dir: &Path,
        files: Files,
        provider: &Arc<CryptoProvider>,
        expected: Expected<'_>,
    ) -> Result<Self, TlsError> {
        let failed = |name, reason: String| TlsError::File { path: dir.join(name), reason };
        let path = dir.join(CERTIFICATE);
        let chain: Vec<CertificateDer<'static>> = items(&path, &files.certificate)?;
        let own = Identity::of_certificate(&chain[0]);
        let own = own.map_err(|source| TlsError::Identity { path: path.clone(), source })?;
        let expected = [
            ("cluster", own.cluster.as_str(), expected.cluster),
            ("role", role_name(own.role), Some(role_name(expected.role))),
            ("id", own.id.as_str(), expected.id),
        ];
        for (field, given, expected) in expected {
            if let Some(expected) = expected.filter(|expected| *expected != given) {
                let (given, expected) = (given.to_owned(), expected.to_owned());
                return Err(TlsError::Mismatch { path, field, given, expected });
            }
        }
        let key = PrivateKeyDer::from_pem_slice(&files.key);
        let key = key.map_err(|error| failed(KEY, format!("no private key in PEM: {error}")))?;
        let authorities = authorities_of(&dir.join(AUTHORITIES), &files.authorities)?;
        let revoked: Vec<CertificateRevocationListDer<'static>> = match &files.revoked {
            None => Vec::new(),
            Some(revoked) => items(&dir.join(REVOKED), revoked)?,
        };
        let trust =
            Trust::new(&own.cluster, authorities, &revoked, provider).map_err(|error| failed(REVOKED, error))?;
        let trust = Arc::new(trust);
        let server = |is_required| {
            let verifier = Arc::new(AnyClient { trust: trust.clone(), is_required });
            let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13]);
            let builder = builder.expect("the provider has TLS 1.3").with_client_cert_verifier(verifier);
            let config = builder.with_single_cert(chain.clone(), key.clone_key());
            // Also where the key is not the certificate's.
            let mut config = config.map_err(|error| failed(KEY, error.to_string()))?;
            // A session that is taken up again would not be asked for its certificate.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            config.alpn_protocols = vec![HTTP2.into(), HTTP1.into()];
            Ok(Arc::new(config))
        };
        let (requires, permits) = (server(true)?, server(false)?);
        Ok(Self { files, own, chain, key, trust, requires, permits })
    }
}

/// Authorities from a PEM file.
pub fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    authorities_of(path, &read(path)?)
}

fn authorities_of(path: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in items(path, pem)? {
        let added = store.add(certificate);
        added.map_err(|error| TlsError::File { path: path.to_owned(), reason: error.to_string() })?;
    }
    Ok(store)
}

/// At least one.
fn items<T: PemObject>(path: &Path, pem: &[u8]) -> Result<Vec<T>, TlsError> {
    let failed = |reason: String| TlsError::File { path: path.to_owned(), reason };
    let items: Result<Vec<T>, _> = T::pem_slice_iter(pem).collect();
    let items = items.map_err(|error| failed(format!("is not PEM: {error}")))?;
    if items.is_empty() { Err(failed("has nothing of what it should hold, in PEM".into())) } else { Ok(items) }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        let reason = format!("has {bytes} bytes; expected at most {FILE_BYTES_MAX}");
        return Err(TlsError::File { path: path.to_owned(), reason });
    }
    std::fs::read(path).map_err(failed)
}
