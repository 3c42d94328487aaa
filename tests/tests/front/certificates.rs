//! Certificates that change while nodes run: new ones come into use without a restart, revoked ones are refused, and what
//! is wrong with a folder changes nothing.

use std::fs;
use std::path::{Path, PathBuf};

use moesaic::certs::{Authority, Validity};
use moesaic_node::server::{bind, with_health_and_reflection};
use moesaic_node::{Connector, Peer, Tls};
use moesaic_proto::v1::Role;
use moesaic_tests::secured::{CLUSTER, identity};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// One server and one client, each with a folder.
struct Pair {
    dir: TempDir,
    server: Tls,
    client: Tls,
    peer: Peer,
    _stop: tokio_util::sync::DropGuard,
}

fn write(authority: &Authority, role: Role, dir: &Path) -> rcgen::SerialNumber {
    let leaf = authority.leaf(Some(&identity(CLUSTER, role, "x")), &[], Validity::days(1)).unwrap();
    leaf.write(dir).unwrap();
    leaf.serial
}

impl Pair {
    async fn new(authority: &Authority) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let open = |role, name| {
            let folder = dir.path().join(name);
            write(authority, role, &folder);
            Tls::open(&folder, CLUSTER, role, None).unwrap()
        };
        let (server, client) = (open(Role::ExpertWorker, "server"), open(Role::AttentionWorker, "client"));
        let bound = bind(([127, 0, 0, 1], 0).into()).unwrap();
        let peer = Peer { role: Role::ExpertWorker, id: None, address: bound.address().to_string() };
        let (routes, _) = with_health_and_reflection(Routes::default(), "x").await;
        let stop = CancellationToken::new();
        tokio::spawn(bound.serve(routes, Some(server.clone()), stop.clone(), std::time::Duration::ZERO));
        Self { dir, server, client, peer, _stop: stop.drop_guard() }
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn open(&self) -> Option<HealthClient<Channel>> {
        let connector = Connector::over(Some(self.client.clone()));
        let channel = connector.connect(&self.peer, &self.peer.endpoint().unwrap()).await.ok()?;
        Some(HealthClient::new(channel))
    }

    /// Over a new connection.
    async fn talks(&self) -> bool {
        match self.open().await {
            Some(mut client) => answers(&mut client).await,
            None => false,
        }
    }
}

async fn answers(client: &mut HealthClient<Channel>) -> bool {
    client.check(HealthCheckRequest::default()).await.is_ok()
}

#[tokio::test]
async fn new_certificates_and_a_new_authority_come_into_use_without_a_restart() {
    let (old, new) = (Authority::new(CLUSTER).unwrap(), Authority::new(CLUSTER).unwrap());
    let pair = Pair::new(&old).await;
    assert!(pair.talks().await);
    write(&old, Role::ExpertWorker, &pair.folder("server"));
    assert!(pair.server.reload().unwrap() && !pair.server.reload().unwrap(), "once");
    assert!(pair.talks().await);

    // Both authorities are trusted while the certificates are exchanged, one side after the other.
    let bundle = |of: &str| fs::read_to_string(pair.folder(of).join("ca.crt")).unwrap();
    let both = {
        let scratch = pair.folder("scratch");
        write(&new, Role::Operator, &scratch);
        bundle("server") + &bundle("scratch")
    };
    for side in ["server", "client"] {
        fs::write(pair.folder(side).join("ca.crt"), &both).unwrap();
    }
    assert!(pair.server.reload().unwrap() && pair.client.reload().unwrap());
    assert!(pair.talks().await);
    write(&new, Role::ExpertWorker, &pair.folder("server"));
    fs::write(pair.folder("server").join("ca.crt"), &both).unwrap();
    assert!(pair.server.reload().unwrap());
    assert!(pair.talks().await);
    // The old authority is trusted no more: the client still has its certificate from it.
    fs::write(pair.folder("server").join("ca.crt"), bundle("scratch")).unwrap();
    assert!(pair.server.reload().unwrap());
    assert!(!pair.talks().await);
    write(&new, Role::AttentionWorker, &pair.folder("client"));
    assert!(pair.client.reload().unwrap());
    assert!(pair.talks().await);
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_on_both_sides() {
    let authority = Authority::new(CLUSTER).unwrap();
    for (revoked, who_knows) in [("client", "server"), ("server", "client")] {
        let pair = Pair::new(&authority).await;
        let role = if revoked == "client" { Role::AttentionWorker } else { Role::ExpertWorker };
        let serial = write(&authority, role, &pair.folder(revoked));
        let (tls, other) =
            if revoked == "client" { (&pair.client, &pair.server) } else { (&pair.server, &pair.client) };
        assert!(tls.reload().unwrap());
        let mut open = pair.open().await.unwrap();
        assert!(answers(&mut open).await);
        // What is new and revokes nobody is none of its business.
        fs::write(pair.folder(who_knows).join("ca.crl"), authority.revoked(&[]).unwrap()).unwrap();
        assert!(other.reload().unwrap() && answers(&mut open).await);
        fs::write(pair.folder(who_knows).join("ca.crl"), authority.revoked(&[serial]).unwrap()).unwrap();
        assert!(other.reload().unwrap());
        assert!(!answers(&mut open).await, "over a connection that was open");
        assert!(!pair.talks().await, "the {who_knows} knows that the {revoked}'s certificate is revoked");
        write(&authority, role, &pair.folder(revoked));
        assert!(tls.reload().unwrap());
        assert!(pair.talks().await, "with another certificate it is let in again");
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_folder_is_named_and_changes_nothing() {
    let authority = Authority::new(CLUSTER).unwrap();
    let pair = Pair::new(&authority).await;
    let folder = pair.folder("server");
    let good = |name: &str| fs::read(folder.join(name)).unwrap();
    let (certificate, key, ca) = (good("tls.crt"), good("tls.key"), good("ca.crt"));
    let other = pair.folder("other");
    write(&authority, Role::ExpertWorker, &other);
    let of_other = |name: &str| fs::read(other.join(name)).unwrap();
    let changes: [(&str, Vec<u8>, &str); 6] = [
        ("tls.crt", b"nothing".to_vec(), "tls.crt"),
        ("tls.crt", [&certificate[..60], b"\n-----END CERTIFICATE-----\n"].concat(), "tls.crt"),
        ("tls.key", of_other("tls.key"), "tls.key"),
        ("tls.key", vec![], "tls.key"),
        ("ca.crt", vec![0; 2 << 20], "ca.crt: has 2097152 bytes"),
        ("ca.crl", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".to_vec(), "ca.crl"),
    ];
    for (name, bytes, expected) in changes {
        fs::write(folder.join(name), bytes).unwrap();
        let error = pair.server.reload().unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        assert!(pair.talks().await, "after {error}");
        let _ = fs::remove_file(folder.join("ca.crl"));
        for (name, bytes) in [("tls.crt", &certificate), ("tls.key", &key), ("ca.crt", &ca)] {
            fs::write(folder.join(name), bytes).unwrap();
        }
    }
    // Another node's certificate is not taken for one's own.
    let leaf = authority.leaf(Some(&identity(CLUSTER, Role::Operator, "x")), &[], Validity::days(1)).unwrap();
    leaf.write(&folder).unwrap();
    assert!(pair.server.reload().unwrap_err().to_string().contains("role"));
    assert!(pair.talks().await);
}
