//! Who may call what, tried: every RPC that a server has and every HTTP route, by every kind of caller, over real
//! connections. What is expected comes from the one table of rules; that the table is whole, from the descriptors.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use moesaic_coordinator::shell::{dashboard, http};
use moesaic_node::access::{Rule, Scope, TABLE};
use moesaic_node::connect::dial_tcp;
use moesaic_node::{Connector, Peer};
use moesaic_proto::v1::Role;
use moesaic_tests::secured::{CLUSTER, INFER_KEY, OPERATE_KEY, STRANGERS_KEY, Secured, Shown};
use prost::Message;
use prost_types::FileDescriptorSet;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsConnector;
use tonic::client::Grpc;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};

const ROLES: [Role; 4] = [Role::Coordinator, Role::AttentionWorker, Role::ExpertWorker, Role::Operator];
/// Long enough for a call that is let in to say so, or to wait for more.
const CALL_MAX: Duration = Duration::from_secs(5);

/// How a call went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// There is no connection to call over.
    NoConnection,
    Unauthenticated,
    PermissionDenied,
    /// The method itself has answered, whatever it said.
    LetIn,
}

/// Every RPC that the servers have, by its descriptors: (service, path).
fn rpcs() -> Vec<(String, String)> {
    let sets = [
        moesaic_proto::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let mut rpcs = Vec::new();
    for set in sets {
        for file in FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                let name = format!("{}.{}", file.package(), service.name());
                let methods = service.method.iter().map(|method| format!("/{name}/{}", method.name()));
                rpcs.extend(methods.map(|path| (name.clone(), path)));
            }
        }
    }
    assert!(rpcs.len() > 10, "the descriptors have their RPCs");
    rpcs
}

fn covers(scope: Scope, rule: &Rule) -> bool {
    rule.key.is_some_and(|needed| scope.covers(needed))
}

/// Every HTTP route of a coordinator.
fn routes() -> Vec<&'static str> {
    [http::rows(), dashboard::rows()].concat()
}

fn rule(row: &str) -> &'static Rule {
    &TABLE.iter().find(|(of, _)| *of == row).unwrap_or_else(|| panic!("{row} has no rule")).1
}

#[test]
fn every_rpc_and_every_route_has_one_rule_and_every_rule_is_of_one() {
    let rpcs: BTreeSet<String> = rpcs().into_iter().map(|(_, path)| path).collect();
    let routes: BTreeSet<String> = routes().into_iter().map(str::to_owned).collect();
    let rows: BTreeSet<String> = TABLE.iter().map(|(row, _)| (*row).to_owned()).collect();
    assert_eq!(rows.len(), TABLE.len(), "no row is there twice");
    assert_eq!(rows, rpcs.union(&routes).cloned().collect());
    let open: Vec<&str> = TABLE.iter().filter(|(_, rule)| rule.is_open).map(|(row, _)| *row).collect();
    let health = ["GET /health", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];
    assert_eq!(
        open.into_iter().collect::<BTreeSet<_>>(),
        health.into_iter().chain(["GET /", "GET /dashboard/{file}"]).collect()
    );
    let workers = TABLE.iter().filter(|(row, _)| row.contains("Worker/") || row.contains("Experts/"));
    assert!(
        workers.clone().count() >= 5 && workers.clone().all(|(_, rule)| rule.key.is_none()),
        "keys are for the front door"
    );
}

/// TLS of a client that knows the cluster's authority.
fn client(cluster: &Secured) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    let authority = cluster.folder_of(Shown::Role(Role::Operator)).unwrap().join("ca.crt");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    builder.with_root_certificates(roots)
}

/// TLS as a client has it that shows this, or nothing.
fn connector(cluster: &Secured, shown: Shown) -> Connector {
    let builder = client(cluster);
    let mut config = match cluster.folder_of(shown) {
        None => builder.with_no_client_auth(),
        Some(folder) => {
            let certificate = CertificateDer::from_pem_file(folder.join("tls.crt")).unwrap();
            let key = PrivateKeyDer::from_pem_file(folder.join("tls.key")).unwrap();
            builder.with_client_auth_cert(vec![certificate], key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".into()];
    let tls = TlsConnector::from(Arc::new(config));
    Connector::new(move |peer: Peer| {
        let tls = tls.clone();
        async move { tls.connect("localhost".try_into().unwrap(), dial_tcp(&peer.address).await?).await }
    })
}

async fn call(connector: &Connector, peer: &Peer, path: &str, key: Option<&str>) -> Outcome {
    let Ok(channel) = connector.connect(peer, &peer.endpoint().unwrap()).await else { return Outcome::NoConnection };
    let mut client = Grpc::new(channel);
    if client.ready().await.is_err() {
        return Outcome::NoConnection;
    }
    let mut request = Request::new(());
    if let Some(key) = key {
        let value = MetadataValue::try_from(format!("Bearer {key}")).unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let answer = client.server_streaming(request, path.parse().unwrap(), codec);
    match tokio::time::timeout(CALL_MAX, answer).await.unwrap_or_else(|_| panic!("{path}: no answer")) {
        Ok(_) => Outcome::LetIn,
        Err(status) => outcome(&status),
    }
}

fn outcome(status: &Status) -> Outcome {
    match status.code() {
        Code::Unauthenticated => Outcome::Unauthenticated,
        Code::PermissionDenied => Outcome::PermissionDenied,
        _ if std::error::Error::source(status).is_some() => Outcome::NoConnection,
        _ => Outcome::LetIn,
    }
}

/// Which of the cluster's servers have a service.
fn servers<'a>(cluster: &'a Secured, service: &str) -> Vec<&'a Peer> {
    let [door, attention, experts] = &cluster.peers;
    match service {
        "moesaic.v1.Inference" | "moesaic.v1.Admin" => vec![door],
        "moesaic.v1.AttentionWorker" => vec![attention],
        "moesaic.v1.Experts" => vec![experts],
        _ => vec![door, attention, experts],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_rpc_is_for_those_that_its_rule_names() {
    let cluster = Secured::start().await;
    let mut shown = vec![
        Shown::NoCertificate,
        Shown::OtherAuthority,
        Shown::OtherCluster,
        Shown::Expired,
        Shown::NotYetValid,
        Shown::Revoked,
        Shown::Nameless,
    ];
    shown.extend(ROLES.map(Shown::Role));
    let plain = Connector::default();
    let mut tried = 0;
    for shown in shown {
        let connector = connector(&cluster, shown);
        for (service, path) in rpcs() {
            let rule = rule(&path);
            for peer in servers(&cluster, &service) {
                let is_door = peer.role == Role::Coordinator;
                let expected = match shown {
                    // The front door takes keys instead, and is open to those who ask for its health.
                    Shown::NoCertificate if is_door && rule.is_open => Outcome::LetIn,
                    Shown::NoCertificate if is_door => Outcome::Unauthenticated,
                    Shown::Role(role) if rule.is_open || rule.roles.contains(&role) => Outcome::LetIn,
                    Shown::Role(_) => Outcome::PermissionDenied,
                    _ => Outcome::NoConnection,
                };
                let got = call(&connector, peer, &path, None).await;
                assert_eq!(got, expected, "{path} at {:?} by {shown:?}", peer.role);
                if shown == Shown::NoCertificate {
                    let got = call(&plain, peer, &path, Some(INFER_KEY)).await;
                    assert_eq!(got, Outcome::NoConnection, "{path} at {:?} without TLS", peer.role);
                }
                tried += 1;
            }
        }
    }
    assert!(tried > 250, "{tried} calls were tried");

    let connector = connector(&cluster, Shown::NoCertificate);
    for (service, path) in rpcs() {
        for peer in servers(&cluster, &service) {
            for (key, scope) in
                [(INFER_KEY, Some(Scope::Infer)), (OPERATE_KEY, Some(Scope::Operate)), (STRANGERS_KEY, None)]
            {
                let rule = rule(&path);
                let expected = match (peer.role, scope) {
                    (Role::Coordinator, _) if rule.is_open => Outcome::LetIn,
                    (Role::Coordinator, Some(scope)) if covers(scope, rule) => Outcome::LetIn,
                    (Role::Coordinator, Some(_)) if rule.key.is_some() => Outcome::PermissionDenied,
                    (Role::Coordinator, _) => Outcome::Unauthenticated,
                    _ => Outcome::NoConnection,
                };
                assert_eq!(call(&connector, peer, &path, Some(key)).await, expected, "{path} with the key {key}");
            }
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_route_is_for_those_that_its_rule_names() {
    let cluster = Secured::start().await;
    let tls = TlsConnector::from(Arc::new(client(&cluster).with_no_client_auth()));
    for row in routes() {
        let (method, path) = row.split_once(' ').unwrap();
        let path = path.replace("{*id}", "tiny-r1").replace("{file}", "app.js");
        let rule = rule(row);
        for (key, scope) in [
            (None, None),
            (Some(STRANGERS_KEY), None),
            (Some(""), None),
            (Some(INFER_KEY), Some(Scope::Infer)),
            (Some(OPERATE_KEY), Some(Scope::Operate)),
        ] {
            let status = ask(&tls, &cluster.peers[0].address, method, &path, key).await.unwrap();
            let is_let_in = rule.is_open || scope.is_some_and(|scope| covers(scope, rule));
            match (is_let_in, scope) {
                (true, _) => assert!(![401, 403].contains(&status), "{row} with {key:?}: {status}"),
                (false, Some(_)) => assert_eq!(status, 403, "{row} with {key:?}"),
                (false, None) => assert_eq!(status, 401, "{row} with {key:?}"),
            }
        }
    }
    cluster.stop().await;
}

/// The status of one HTTP/1.1 request over TLS.
async fn ask(tls: &TlsConnector, address: &str, method: &str, path: &str, key: Option<&str>) -> io::Result<u16> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let stream = dial_tcp(address).await?;
    let mut stream = tls.connect("localhost".try_into().unwrap(), stream).await?;
    let authorization = key.map_or_else(String::new, |key| format!("authorization: Bearer {key}\r\n"));
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\n{authorization}content-length: 0\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    // A stream of events does not end.
    let mut answer = vec![0; 64];
    let read = stream.read(&mut answer).await?;
    answer.truncate(read);
    let text = String::from_utf8_lossy(&answer);
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.ok_or_else(|| io::Error::other(format!("no status in {text:?}")))
}

/// Who has a good certificate of an expert worker cannot stand in for another one, whatever the registry says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_address_leads_nowhere() {
    let cluster = Secured::start().await;
    let coordinator = moesaic_node::Tls::open_as(
        &cluster.folder_of(Shown::Role(Role::AttentionWorker)).unwrap(),
        Role::AttentionWorker,
    );
    let connector = Connector::over(Some(coordinator.unwrap()));
    let [_, attention, experts] = &cluster.peers;
    for (peer, is_right) in [
        (experts.clone(), true),
        (Peer { id: Some(moesaic_proto::WorkerId::new("e1").unwrap()), ..experts.clone() }, false),
        (Peer { address: attention.address.clone(), ..experts.clone() }, false),
    ] {
        let connected = connector.connect(&peer, &peer.endpoint().unwrap()).await;
        assert_eq!(connected.is_ok(), is_right, "{peer:?}");
    }
    assert_eq!(CLUSTER, "test");
    cluster.stop().await;
}
