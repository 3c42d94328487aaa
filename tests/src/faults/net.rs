//! A network of our own: a namespace for each process, all on one bridge, on which packets can be lost.
//!
//! ```text
//!   this program     c0   a0   e0  ...     namespaces, one veth each
//!        |           |    |    |
//!   ---- br0 -------------------------     in the hub's namespace, which also has the rules
//! ```

use std::net::Ipv4Addr;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::guard::Guard;

pub struct Net {
    prefix: String,
    hosts: Vec<String>,
}

/// All rules stand in one chain that every packet between two namespaces passes once.
const CHAIN: &str = "table bridge faults {
    chain forward { type filter hook forward priority 0; policy accept; }
}";

impl Net {
    /// Why this machine cannot have one, found out by trying.
    pub async fn why_not() -> Option<String> {
        let trial = async {
            let mut guard = Guard::new()?;
            let net = Self::make(&["x"], &mut guard).await?;
            net.lose(1).await
        };
        trial.await.err().map(|error| format!("no network of our own here: {error:#}"))
    }

    pub async fn make(hosts: &[&str], guard: &mut Guard) -> Result<Self> {
        let hosts = hosts.iter().map(|&host| host.to_owned()).collect();
        let net = Self { prefix: format!("faults{}", std::process::id()), hosts };
        let (hub, here) = (net.namespace("hub"), &net.prefix);
        guard.at_end(&format!("ip netns del {hub}"))?;
        for host in &net.hosts {
            guard.at_end(&format!("ip netns del {}", net.namespace(host)))?;
        }
        guard.at_end(&format!("ip link del {here}"))?;

        let mut outside = vec![format!("netns add {hub}")];
        let mut inside = vec!["link add br0 type bridge".to_owned(), "link set br0 up".to_owned()];
        outside.push(format!("link add {here} type veth peer name here netns {hub}"));
        outside.push(format!("addr add {}/24 dev {here}", net.numbered(254)));
        outside.push(format!("link set {here} up"));
        inside.push("link set here master br0 up".into());
        for host in &net.hosts {
            let (namespace, address) = (net.namespace(host), net.address(host)?);
            outside.push(format!("netns add {namespace}"));
            outside.push(format!("-n {namespace} link add eth0 type veth peer name {host} netns {hub}"));
            outside.push(format!("-n {namespace} addr add {address}/24 dev eth0"));
            outside.push(format!("-n {namespace} link set eth0 up"));
            outside.push(format!("-n {namespace} link set lo up"));
            inside.push(format!("link set {host} master br0 up"));
        }
        for line in outside {
            feed("ip", &line.split(' ').collect::<Vec<_>>(), "").await?;
        }
        feed("ip", &["-n", &hub, "-batch", "-"], &inside.join("\n")).await?;
        net.rules(CHAIN).await?;
        Ok(net)
    }

    /// Of the range that is set aside for benchmarks (RFC 2544).
    fn numbered(&self, number: usize) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, (std::process::id() % 256) as u8, number as u8)
    }

    pub fn address(&self, host: &str) -> Result<Ipv4Addr> {
        let index = self.hosts.iter().position(|other| other == host);
        index.map(|index| self.numbered(1 + index)).with_context(|| format!("there is no host {host}"))
    }

    pub fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// No packet of one gets to the other any more; the other way is open.
    pub async fn cut(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.address(from)?, self.address(to)?);
        self.rules(&format!("add rule bridge faults forward ip saddr {from} ip daddr {to} drop")).await
    }

    /// So many of a hundred packets vanish, whoever sends them.
    pub async fn lose(&self, percent: u32) -> Result<()> {
        self.rules(&format!("add rule bridge faults forward ether type ip numgen random mod 100 < {percent} drop"))
            .await
    }

    pub async fn heal(&self) -> Result<()> {
        self.rules("flush chain bridge faults forward").await
    }

    async fn rules(&self, rules: &str) -> Result<()> {
        feed("ip", &["netns", "exec", &self.namespace("hub"), "nft", "-f", "-"], rules).await
    }
}

async fn feed(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let what = || format!("{program} {}", arguments.join(" "));
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().with_context(what)?;
    let mut pipe = child.stdin.take().context("a pipe was asked for")?;
    // A program that does not read its input is no error.
    let _ = pipe.write_all(input.as_bytes()).await;
    drop(pipe);
    let output = child.wait_with_output().await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", what(), errors.trim());
    Ok(())
}
