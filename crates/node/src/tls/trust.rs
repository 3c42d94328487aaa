//! Which certificates are believed: those of the cluster's authorities, in time, not revoked, with an identity of the
//! cluster. The checks of chains are webpki's.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
};
use webpki::{
    CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList, RevocationOptionsBuilder, UnknownStatusPolicy,
};

use crate::connect::Peer;
use crate::identity::Identity;

#[derive(Debug)]
pub struct Trust {
    cluster: String,
    authorities: RootCertStore,
    revoked: Vec<CertRevocationList<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Which end of a connection shows a certificate.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    Client,
    Server,
}

impl Side {
    fn usage(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::client_auth(),
            Self::Server => KeyUsage::server_auth(),
        }
    }
}

/// A certificate is good, and of somebody else.
#[derive(Debug, thiserror::Error)]
enum Stranger {
    #[error(transparent)]
    Unnamed(#[from] crate::identity::InvalidIdentity),
    #[error("the certificate is of {given}; expected cluster {cluster}")]
    Cluster { given: Identity, cluster: String },
    #[error("the certificate is of {given}; expected {expected}")]
    Peer { given: Identity, expected: Identity },
}

impl Trust {
    pub fn new(
        cluster: &str,
        authorities: RootCertStore,
        revoked: &[CertificateRevocationListDer<'_>],
        provider: &CryptoProvider,
    ) -> Result<Self, String> {
        let list = |der: &CertificateRevocationListDer<'_>| OwnedCertRevocationList::from_der(der).map(Into::into);
        let revoked = revoked.iter().map(list).collect::<Result<_, webpki::Error>>().map_err(|e| e.to_string())?;
        let algorithms = provider.signature_verification_algorithms;
        Ok(Self { cluster: cluster.to_owned(), authorities, revoked, algorithms })
    }

    pub fn authorities(&self) -> &RootCertStore {
        &self.authorities
    }

    /// Whether a chain that was believed still is.
    pub fn check(&self, chain: &[CertificateDer<'_>], side: Side) -> Result<(), Error> {
        let (certificate, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        self.identity(certificate, intermediates, UnixTime::now(), side).map(drop)
    }

    fn identity(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        side: Side,
    ) -> Result<Identity, Error> {
        let lists: Vec<&CertRevocationList<'_>> = self.revoked.iter().collect();
        // Authorities that have revoked nothing need no list.
        let revocation = RevocationOptionsBuilder::new(&lists).ok();
        let revocation = revocation.map(|options| options.with_status_policy(UnknownStatusPolicy::Allow).build());
        let parsed = EndEntityCert::try_from(certificate).map_err(refusal)?;
        let (algorithms, roots) = (self.algorithms.all, &self.authorities.roots);
        let path = parsed.verify_for_usage(algorithms, roots, intermediates, now, side.usage(), revocation, None);
        path.map_err(refusal)?;
        let given = Identity::of_certificate(certificate).map_err(|unnamed| stranger(unnamed.into()))?;
        if given.cluster != self.cluster {
            return Err(stranger(Stranger::Cluster { given, cluster: self.cluster.clone() }));
        }
        Ok(given)
    }
}

/// What the other side is told of it: TLS has an alert for each of these.
fn refusal(error: webpki::Error) -> Error {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::CertRevoked => CertificateError::Revoked,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
    .into()
}

fn stranger(stranger: Stranger) -> Error {
    CertificateError::Other(OtherError(Arc::new(stranger))).into()
}

/// Takes one server alone.
#[derive(Debug)]
pub struct KnownServer {
    pub trust: Arc<Trust>,
    pub peer: Peer,
}

impl ServerCertVerifier for KnownServer {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let given = self.trust.identity(certificate, intermediates, now, Side::Server)?;
        let Peer { role, id, .. } = &self.peer;
        let is_meant = given.role == *role && id.as_ref().is_none_or(|id| *id == given.id);
        if !is_meant {
            let id = id.clone().unwrap_or_else(|| given.id.clone());
            let expected = Identity { cluster: self.trust.cluster.clone(), role: *role, id };
            return Err(stranger(Stranger::Peer { given, expected }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

/// Takes any client of the cluster: what it may do is asked for each call.
#[derive(Debug)]
pub struct AnyClient {
    pub trust: Arc<Trust>,
    pub is_required: bool,
}

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        self.is_required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.trust.identity(certificate, intermediates, now, Side::Client)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}
