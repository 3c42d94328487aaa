//! `moesaic-attention-worker`: one attention worker as a process of its own.

use clap::Parser;
use moesaic_attention_worker::{Config, start};
use moesaic_node::config::Layered;
use moesaic_node::stop;
use moesaic_node::telemetry::{self, LogFormat};

/// Owns sequences of a Moesaic cluster: attention, latent cache, batching and sampling.
#[derive(Parser)]
#[command(name = "moesaic-attention-worker", version)]
struct Arguments {
    #[command(flatten)]
    config: Layered<Config>,
    /// text or json
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = str::parse::<LogFormat>)]
    log_format: LogFormat,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { config: Layered(config), log_format } = Arguments::parse();
    telemetry::init(log_format, "info")?;
    start(config, stop::on_signals()?).await
}
