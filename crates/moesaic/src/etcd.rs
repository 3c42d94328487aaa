//! An etcd of our own for `up --processes`: found on the machine, run on free loopback ports and a temporary folder.
//!
//! It runs under `moesaic etcd`, a guard that ends it and removes its folder when standard input closes, so that
//! neither outlives `up`, however that ends.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use moesaic_node::MemberSettings;
use moesaic_node::{Membership, stop};
use moesaic_proto::v1::Role;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::certs;
use crate::cli::BadArguments;
use crate::roles::stop_when_stdin_closes;

/// Names the etcd to run.
const PROGRAM_VARIABLE: &str = "MOESAIC_ETCD";
/// A fresh etcd answers within a second on a healthy machine.
const START_MAX: Duration = Duration::from_secs(20);
const START_POLL: Duration = Duration::from_millis(25);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(long)]
    program: PathBuf,
    #[arg(long)]
    client: SocketAddr,
    #[arg(long)]
    peer: SocketAddr,
    /// A folder that `moesaic certs` has made
    #[arg(long)]
    tls: Option<PathBuf>,
}

/// The etcd of this machine.
pub fn find() -> Result<PathBuf, BadArguments> {
    if let Some(program) = std::env::var_os(PROGRAM_VARIABLE) {
        let program = PathBuf::from(program);
        return match program.is_file() {
            true => Ok(program),
            false => Err(BadArguments(format!("{PROGRAM_VARIABLE}={} is no file", program.display()))),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join("etcd")).find(|program| program.is_file()).ok_or_else(|| {
        BadArguments(format!(
            "--processes needs etcd, and there is none on this machine. Install it (Debian, Ubuntu: apt-get install \
             etcd-server; macOS: brew install etcd), name one with {PROGRAM_VARIABLE}=FILE, or use a running one with \
             --registry etcd://HOST:PORT"
        ))
    })
}

/// A loopback port that nobody uses at the moment.
pub fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free loopback port")?;
    Ok(listener.local_addr()?)
}

/// The guard's command line, without the program.
pub fn guard_arguments(program: PathBuf, client: SocketAddr, peer: SocketAddr, tls: Option<&Path>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = ["etcd", "--program"].map(OsString::from).into();
    arguments.push(program.into());
    arguments.extend(["--client".to_owned(), client.to_string(), "--peer".into(), peer.to_string()].map(Into::into));
    if let Some(dir) = tls {
        arguments.extend(["--tls".into(), dir.into()]);
    }
    arguments
}

/// The guard: runs etcd until standard input closes.
pub async fn run(args: Args) -> Result<()> {
    let stop = stop::on_signals()?;
    stop_when_stdin_closes(stop.clone());
    let data = tempfile::Builder::new().prefix("moesaic-etcd-").tempdir()?;
    let scheme = if args.tls.is_some() { "https" } else { "http" };
    let (client, peer) = (format!("{scheme}://{}", args.client), format!("http://{}", args.peer));
    let mut command = Command::new(&args.program);
    if let Some(dir) = &args.tls {
        let own = certs::etcd_folder(dir);
        command.arg("--cert-file").arg(own.join("tls.crt")).arg("--key-file").arg(own.join("tls.key"));
        command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(own.join("ca.crt"));
    }
    let mut child = command
        .arg("--data-dir")
        .arg(data.path().join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--logger", "zap", "--log-level", "error"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", args.program.display()))?;
    tokio::select! {
        status = child.wait() => bail!("{}: {}", args.program.display(), status?),
        () = stop.cancelled() => {}
    }
    child.kill().await.context("cannot end etcd")
}

/// Opens the registry of an etcd that is about to answer.
pub async fn wait(settings: &MemberSettings) -> Result<Membership> {
    let deadline = Instant::now() + START_MAX;
    loop {
        match settings.open(Role::Operator).await {
            Ok(membership) => return Ok(membership),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => sleep(START_POLL).await,
        }
    }
}
