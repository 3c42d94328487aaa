//! `moesaic coordinator`, `attention-worker` and `expert-worker`: one node as a process of its own.

use std::io::Read;

use anyhow::Result;
use moesaic_node::config::Layered;
use moesaic_node::stop;
use tokio_util::sync::CancellationToken;

/// As a flag on a role's command line.
pub const STOP_WITH_STDIN: &str = "--stop-with-stdin";

/// A role's own flags, and what all roles have.
#[derive(Debug, clap::Args)]
pub struct RoleArgs<C: clap::Args> {
    #[command(flatten)]
    config: Layered<C>,
    /// Stop gracefully when standard input closes: how `up --processes` stops its children, and they outlive it never
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
}

impl<C: clap::Args> RoleArgs<C> {
    /// Runs the role until it is stopped.
    pub async fn run<R>(self, start: impl FnOnce(C, CancellationToken) -> R) -> Result<()>
    where
        R: Future<Output = Result<()>>,
    {
        let stop = stop::on_signals()?;
        if self.stop_with_stdin {
            stop_when_stdin_closes(stop.clone());
        }
        start(self.config.0, stop).await
    }
}

/// On a thread of its own: a read of standard input cannot be cancelled, and must not hold up the runtime's end.
pub fn stop_when_stdin_closes(stop: CancellationToken) {
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        while stdin.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
        stop.cancel();
    });
}
