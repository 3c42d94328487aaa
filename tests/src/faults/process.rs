//! One process of the cluster: started, killed, stopped, frozen, restarted. It never outlives this program.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

/// Becomes the program, after it has left a watcher behind that kills it when standard input closes; a line says that
/// it has ended already. `$1` is the control group to enter, or empty.
const SCRIPT: &str = r#"exec 3<&0 </dev/null
(trap '' INT TERM HUP; read -r _ <&3 || kill -9 $$) >/dev/null 2>&1 &
exec 3<&-
[ -z "$1" ] || echo $$ >"$1/cgroup.procs"
shift
exec "$@""#;

/// Sends the signals that it reads to process `$0`, which goes on when the pipe closes.
const SIGNALS_SCRIPT: &str = r#"while read -r name; do kill -"$name" "$0"; done; kill -CONT "$0""#;

/// Longer than a killed process takes to be gone.
const GONE_MAX: Duration = Duration::from_secs(10);

/// How to start it, again and again.
#[derive(Clone, Debug)]
pub struct Launch {
    pub name: String,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// Takes standard output and error, one start after the other.
    pub log: PathBuf,
    pub namespace: Option<String>,
    pub cgroup: Option<PathBuf>,
}

pub struct Process {
    name: String,
    child: Child,
    lifeline: Option<ChildStdin>,
    id: u32,
}

impl Launch {
    pub fn start(&self) -> Result<Process> {
        let mut log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        writeln!(log, "== {} {}", self.program.display(), self.arguments.join(" "))?;
        let cgroup = self.cgroup.clone().unwrap_or_default();
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT, "sh"]).arg(cgroup);
        if let Some(namespace) = &self.namespace {
            command.args(["ip", "netns", "exec", namespace]);
        }
        command.arg(&self.program).args(&self.arguments);
        command.env("NO_COLOR", "1").stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.name))?;
        let lifeline = child.stdin.take();
        let id = child.id().context("it has just been started")?;
        Ok(Process { name: self.name.clone(), child, lifeline, id })
    }
}

impl Process {
    /// Bytes, by their name in /proc: "VmRSS", "VmHWM".
    pub fn memory(&self, field: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id))?;
        let kib =
            status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.split_whitespace().next());
        let kib: u64 = kib.with_context(|| format!("{}: no {field}", self.name))?.parse()?;
        Ok(kib << 10)
    }

    /// kill -9.
    pub async fn kill(mut self) -> Result<()> {
        self.child.start_kill()?;
        self.end(GONE_MAX).await.map(drop)
    }

    /// SIGTERM, and waits so long for the end.
    pub async fn terminate(mut self, patience: Duration) -> Result<ExitStatus> {
        let sent = Command::new("sh").args(["-c", "kill -TERM $0", &self.id.to_string()]).status().await?;
        ensure!(sent.success(), "{}: cannot send SIGTERM", self.name);
        self.end(patience).await
    }

    /// Waits for an end that comes by itself.
    pub async fn end(&mut self, patience: Duration) -> Result<ExitStatus> {
        let ended = timeout(patience, self.child.wait()).await;
        let status = ended.with_context(|| format!("{} has not ended after {patience:?}", self.name))??;
        self.release().await;
        Ok(status)
    }

    /// Some once it has ended.
    pub async fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            self.release().await;
        }
        Ok(status)
    }

    /// Its number may soon be another's: the watcher must not act on it.
    async fn release(&mut self) {
        if let Some(mut lifeline) = self.lifeline.take() {
            let _ = lifeline.write_all(b"\n").await;
        }
    }

    /// For SIGSTOP and SIGCONT. It goes on when the result is dropped.
    pub fn signals(&self) -> Result<Signals> {
        let mut command = Command::new("sh");
        command.args(["-c", SIGNALS_SCRIPT, &self.id.to_string()]).stdin(Stdio::piped()).process_group(0);
        let mut shell = command.spawn().context("cannot start a shell")?;
        let pipe = shell.stdin.take().context("a pipe was asked for")?;
        Ok(Signals { _shell: shell, pipe })
    }
}

pub struct Signals {
    _shell: Child,
    pipe: ChildStdin,
}

impl Signals {
    pub async fn send(&mut self, name: &str) -> Result<()> {
        self.pipe.write_all(format!("{name}\n").as_bytes()).await.context("the shell for signals has ended")
    }
}
