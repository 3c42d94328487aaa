//! `moesaic coordinator`, `attention-worker` and `expert-worker`: one node as a process of its own.

use std::io::Read;
use std::path::PathBuf;

use anyhow::Result;
use moesaic_node::{config, stop};
use tokio_util::sync::CancellationToken;

/// As a flag on a role's command line.
pub const STOP_WITH_STDIN: &str = "--stop-with-stdin";

/// A role's own flags, and what all roles have.
#[derive(Debug, clap::Args)]
pub struct RoleArgs<F: clap::Args> {
    #[command(flatten)]
    flags: F,
    /// A TOML file with the same settings; flags and MOESAIC_* variables count more
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Stop gracefully when standard input closes: how `up --processes` stops its children, and they outlive it never
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
}

pub async fn coordinator(args: RoleArgs<moesaic_coordinator::Flags>) -> Result<()> {
    let stop = stop_token(args.stop_with_stdin)?;
    moesaic_coordinator::start(config::load(args.config.as_deref(), &args.flags)?, stop).await
}

pub async fn attention_worker(args: RoleArgs<moesaic_attention_worker::Flags>) -> Result<()> {
    let stop = stop_token(args.stop_with_stdin)?;
    moesaic_attention_worker::start(config::load(args.config.as_deref(), &args.flags)?, stop).await
}

pub async fn expert_worker(args: RoleArgs<moesaic_expert_worker::Flags>) -> Result<()> {
    let stop = stop_token(args.stop_with_stdin)?;
    moesaic_expert_worker::start(config::load(args.config.as_deref(), &args.flags)?, stop).await
}

fn stop_token(with_stdin: bool) -> Result<CancellationToken> {
    let stop = stop::on_signals()?;
    if with_stdin {
        stop_when_stdin_closes(stop.clone());
    }
    Ok(stop)
}

/// On a thread of its own: a read of standard input cannot be cancelled, and must not hold up the runtime's end.
pub fn stop_when_stdin_closes(stop: CancellationToken) {
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        while stdin.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
        stop.cancel();
    });
}
