//! What a cluster of `up` is made of: things that run until they are told to stop, in this process or as children.

use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use futures::future::select_all;
use tokio::process::{Child, Command};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::cli::say;

/// A child that was told to stop gets this long before it is killed: a coordinator's drain, with room.
const CHILD_STOP_MAX: Duration = Duration::from_secs(35);
/// And any node this long.
const STOP_MAX: Duration = Duration::from_secs(40);

/// A worker that ends by itself sooner than this cannot work as it was started.
const WORKED: Duration = Duration::from_secs(10);
/// Before it is started again.
const RESTART_MIN: Duration = Duration::from_millis(200);
const RESTART_MAX: Duration = Duration::from_secs(5);

/// One node, for its whole life. Dropping it ends it; a child then stops by itself, as its standard input closes.
pub struct Node {
    name: String,
    stop: CancellationToken,
    task: JoinHandle<Result<()>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Node {
    /// In this process.
    pub fn spawn<F>(name: impl Into<String>, run: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(stop.clone()));
        Self { name: name.into(), stop, task }
    }

    /// As a child of this process, in a process group of its own, so that Ctrl-C reaches it only through us. It stops
    /// when its standard input closes: by our wish, or because we are gone.
    pub fn child(name: impl Into<String>, mut command: Command) -> Result<Self> {
        let name = name.into();
        let child = start(&name, &mut command)?;
        Ok(Self::spawn(name, move |stop| follow(child, stop)))
    }

    /// The same, and started again when it is killed, or ends after it has worked for a while.
    pub fn supervised(name: impl Into<String>, mut command: Command) -> Result<Self> {
        let name = name.into();
        let mut child = start(&name, &mut command)?;
        let called = name.clone();
        Ok(Self::spawn(name, move |stop| async move {
            let mut pause = RESTART_MIN;
            loop {
                let began = Instant::now();
                let Err(ended) = follow(child, stop.clone()).await else { return Ok(()) };
                let was_killed = ended.downcast_ref::<Ended>().is_some_and(|ended| ended.0.code().is_none());
                let worked = began.elapsed() >= WORKED;
                if stop.is_cancelled() || !(was_killed || worked) {
                    return Err(ended);
                }
                pause = if worked { RESTART_MIN } else { (pause * 2).min(RESTART_MAX) };
                say(&format!("{called} has ended ({ended}); it is started again\n"));
                tokio::time::sleep(pause).await;
                child = start(&called, &mut command)?;
            }
        }))
    }
}

/// A child ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Ended(ExitStatus);

fn start(name: &str, command: &mut Command) -> Result<Child> {
    command.stdin(Stdio::piped()).process_group(0).spawn().with_context(|| format!("cannot start {name}"))
}

async fn follow(mut child: Child, stop: CancellationToken) -> Result<()> {
    let stdin = child.stdin.take();
    tokio::select! {
        status = child.wait() => return check(status?),
        () = stop.cancelled() => drop(stdin),
    }
    match tokio::time::timeout(CHILD_STOP_MAX, child.wait()).await {
        Ok(status) => check(status?),
        Err(_) => {
            child.kill().await?;
            Err(anyhow!("killed: still running {} s after it was told to stop", CHILD_STOP_MAX.as_secs()))
        }
    }
}

fn check(status: ExitStatus) -> Result<()> {
    if status.success() { Ok(()) } else { Err(Ended(status).into()) }
}

/// Waits until a node ends by itself, which none should, and says which and how.
pub async fn first_failure(nodes: &mut Vec<Node>) -> anyhow::Error {
    let (ended, index, _) = select_all(nodes.iter_mut().map(|node| &mut node.task)).await;
    let node = nodes.remove(index);
    match flat(ended) {
        Ok(()) => anyhow!("{} ended, and nobody had asked it to", node.name),
        Err(error) => error.context(format!("{} failed", node.name)),
    }
}

/// Stops them one after the other, the last that was started first.
pub async fn stop_all(mut nodes: Vec<Node>) -> Result<()> {
    let mut result = Ok(());
    while let Some(mut node) = nodes.pop() {
        node.stop.cancel();
        let ended = match tokio::time::timeout(STOP_MAX, &mut node.task).await {
            Ok(ended) => flat(ended),
            Err(_) => Err(anyhow!("still running after {} s", STOP_MAX.as_secs())),
        };
        let ended = ended.with_context(|| format!("{} did not stop well", node.name));
        result = result.and(ended);
    }
    result
}

fn flat(ended: Result<Result<()>, JoinError>) -> Result<()> {
    ended.unwrap_or_else(|error| Err(error.into()))
}
