//! Certificates and keys, from the commands that make them to clusters that ask for them.

use std::net::TcpStream;
use std::path::Path;
use std::time::Instant;

use crate::process::{PATIENCE, Running, finish, moesaic};

const QUESTION: &str = "What is 347 + 586?";

fn certs(dir: &Path, more: &[&str]) -> String {
    let (code, said, errors) = finish(moesaic().arg("certs").arg(dir).args(more));
    assert_eq!(code, Some(0), "{errors}");
    said
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// The whole cluster over TLS, etcd too: an operator is served, and nobody else gets a word.
#[test]
fn a_cluster_with_certificates_serves_its_operator_alone() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |path: &str| dir.path().join(path).to_str().unwrap().to_owned();
    certs(dir.path(), &["--cluster", "locked"]);
    let mut up =
        Running::start(&["up", "--processes", "--listen", "127.0.0.1:0", "--threads", "1", "--tls", &folder("")]);
    let url = up.url();
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    assert!(up.seen().contains("--cacert") && up.seen().contains("operator/admin"), "{}", up.seen());

    let operator = folder("operator/admin");
    let chat = |server: &str, more: &[&str]| finish(moesaic().args(["chat", "--server", server, QUESTION]).args(more));
    let (code, said, errors) = chat(&url, &["--tls", &operator]);
    assert!(code == Some(0) && said.contains("933"), "{said}{errors}");
    let (code, said, errors) = finish(moesaic().args(["status", "--edges", "--server", &url, "--tls", &operator]));
    assert!(code == Some(0) && said.contains("live (connected)"), "{said}{errors}");

    // A worker's certificate, no TLS at all, TLS without a certificate.
    let (code, _, errors) = chat(&url, &["--tls", &folder("attention-worker/a0")]);
    assert!(code == Some(1) && errors.contains("role"), "{errors}");
    assert_eq!(chat(&url.replace("https", "http"), &[]).0, Some(1));
    let (code, _, errors) = chat(&url, &[]);
    assert!(code == Some(2) && errors.contains("--tls"), "{errors}");

    // etcd asks as well.
    let etcd = up.children().into_iter().find(|(_, line)| line.contains("--client")).unwrap().1;
    let address = etcd.split(' ').skip_while(|word| *word != "--client").nth(1).unwrap().to_owned();
    TcpStream::connect(&address).unwrap();
    let registry = format!("etcd://{address}");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-r1");
    let worker = ["expert-worker", "--model", model, "--cluster", "locked", "--registry", &registry];
    let (code, _, errors) = finish(moesaic().args(worker));
    assert!(code == Some(1) && errors.contains("no etcd answers"), "{errors}");

    let asked = Instant::now();
    up.signal("TERM");
    assert_eq!(up.wait().code(), Some(0), "{}", up.errors());
    assert!(asked.elapsed() < PATIENCE);
}

#[test]
fn certificates_are_renewed_under_the_same_authority() {
    let dir = tempfile::tempdir().unwrap();
    let said = certs(dir.path(), &["--expert-workers", "3", "--host", "moesaic.example", "--days", "7"]);
    assert!(said.contains("good for 7 days"), "{said}");
    let leaf = dir.path().join("expert-worker/e2");
    let before = [read(leaf.join("tls.crt")), read(leaf.join("tls.key")), read(leaf.join("ca.crt"))];
    certs(dir.path(), &["--expert-workers", "3"]);
    let after = [read(leaf.join("tls.crt")), read(leaf.join("tls.key")), read(leaf.join("ca.crt"))];
    assert!(before[0] != after[0] && before[1] != after[1] && before[2] == after[2]);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(dir.path().join("ca.key")).unwrap().permissions());
    assert_eq!(mode & 0o077, 0, "nobody else may read the authority's key: {mode:o}");
}

#[test]
fn wrong_folders_and_keys_are_named() {
    let dir = tempfile::tempdir().unwrap();
    certs(dir.path(), &["--cluster", "c"]);
    let folder = |path: &str| dir.path().join(path).to_str().unwrap().to_owned();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-r1");
    let coordinator =
        |more: &[&str]| finish(moesaic().args(["coordinator", "--model", model, "--cluster", "c"]).args(more));
    let broken = dir.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("tls.crt"), "nothing").unwrap();
    let keys = dir.path().join("keys.toml");
    std::fs::write(&keys, "[[keys]]\nname = 'a'\nsha256 = 'short'\n").unwrap();
    let with_etcd = |more: &[&str]| coordinator(&[&["--registry", "etcd://127.0.0.1:1"], more].concat());
    for (answer, expected) in [
        (with_etcd(&["--tls", &folder("expert-worker/e0")]), "role is \"expert-worker\""),
        (with_etcd(&["--tls", &folder("coordinator/c0"), "--id", "c9"]), "id is \"c0\""),
        (with_etcd(&["--tls", &folder("nowhere")]), "nowhere/tls.crt: cannot be read"),
        (with_etcd(&["--tls", broken.to_str().unwrap()]), "broken/tls.key"),
        (coordinator(&["--registry", "etcds://127.0.0.1:1"]), "set tls"),
        (with_etcd(&["--listen", "0.0.0.0:0"]), "set keys"),
    ] {
        let (code, _, errors) = answer;
        assert!(code != Some(0) && errors.contains(expected), "{errors:?} does not contain {expected:?}");
    }
    let (code, _, errors) = finish(moesaic().args(["up", "--listen", "127.0.0.1:0", "--keys", keys.to_str().unwrap()]));
    assert!(code == Some(1) && errors.contains("keys[0].sha256"), "{errors}");
}

#[test]
fn a_key_is_shown_once_and_opens_the_door() {
    let dir = tempfile::tempdir().unwrap();
    let (code, entry, shown) = finish(moesaic().args(["key", "ada", "--scopes", "infer,operate", "--sequences", "3"]));
    assert_eq!(code, Some(0));
    let key = shown.split_whitespace().find(|word| word.starts_with("moe-")).unwrap();
    assert!(!entry.contains(key) && entry.contains("name = \"ada\"") && entry.contains("sequences = 3"), "{entry}");
    let keys = dir.path().join("keys.toml");
    std::fs::write(&keys, &entry).unwrap();

    let mut up =
        Running::start(&["up", "--listen", "127.0.0.1:0", "--cache-tokens", "4096", "--keys", keys.to_str().unwrap()]);
    let url = up.url();
    let chat = |more: &[&str]| finish(moesaic().args(["chat", "--server", &url, QUESTION]).args(more));
    let (code, said, errors) = chat(&["--key", key]);
    assert!(code == Some(0) && said.contains("933"), "{errors}");
    assert_eq!(finish(moesaic().env("MOESAIC_KEY", key).args(["status", "--server", &url])).0, Some(0));
    for more in [&[][..], &["--key", "moe-other"]] {
        let (code, _, errors) = chat(more);
        assert!(code == Some(1) && errors.contains("Unauthenticated"), "{errors}");
    }
    up.signal("TERM");
    assert_eq!(up.wait().code(), Some(0), "{}", up.errors());
}
