//! `moesaic-expert-worker`: one expert worker as a process of its own.

use std::path::PathBuf;

use clap::Parser;
use moesaic_dispatch::nccl;
use moesaic_expert_worker::{Config, Flags, start};
use moesaic_node::telemetry::LogFormat;
use moesaic_node::{config, stop, telemetry};

/// Owns a shard of the routed experts of a Moesaic cluster.
#[derive(Parser)]
#[command(name = "moesaic-expert-worker", version)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// A TOML file with the same settings; flags and MOESAIC_* variables count more
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// text or json
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = str::parse::<LogFormat>)]
    log_format: LogFormat,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    telemetry::init(arguments.log_format, "info")?;
    let config: Config = config::load(arguments.config.as_deref(), &arguments.flags)?;
    let served = start(config, stop::on_signals()?).await;
    tokio::task::spawn_blocking(nccl::settle).await?;
    served
}
