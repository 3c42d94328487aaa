//! Arguments, logs and exit codes: 0 done, 1 failed, 2 arguments or config that cannot work.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use moesaic_dispatch::nccl;
use moesaic_node::config::ConfigError;
use moesaic_node::telemetry::{self, FILTER_VARIABLE, LogFormat};

use crate::{bench, certs, chat, checkpoint, etcd, key, operate, reference, roles, up};

const EXIT_BAD_ARGUMENTS: u8 = 2;
/// What may still run when a command is done (a read of standard input) is not waited for longer than this.
const RUNTIME_END: Duration = Duration::from_millis(200);

/// Serves DeepSeek-V3-class models from a cluster of attention workers and expert workers.
///
/// Logs go to standard error; MOESAIC_LOG sets their level (error, warn, info, debug, or module=level pairs).
#[derive(Parser)]
#[command(name = "moesaic", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// text or json
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text", value_parser = str::parse::<LogFormat>)]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cluster on this machine and serve a model
    Up(up::Args),
    /// Talk to a model that is served
    Chat(chat::Args),
    /// Tell what a checkpoint's folder holds and what is wrong with it
    Inspect(checkpoint::InspectArgs),
    /// Lay a checkpoint's experts out as the kernels read them, so that workers start by mapping them
    Pack(checkpoint::PackArgs),
    /// Make an FP8 copy of a checkpoint
    Quantize(checkpoint::QuantizeArgs),
    /// Measure how fast this machine serves a model
    Bench(bench::Args),
    /// Write a random checkpoint of a config, to measure with
    Synth(checkpoint::SynthArgs),
    /// Tell how a cluster is: its workers, who reaches whom, which experts have too few copies
    Status(operate::StatusArgs),
    /// The same, again and again
    Top(operate::TopArgs),
    /// Give a worker nothing new
    Cordon(operate::WorkerArgs),
    /// Take a cordon or a drain back
    Uncordon(operate::WorkerArgs),
    /// Give a worker nothing new, and move what it has elsewhere
    Drain(operate::WorkerArgs),
    /// Place the experts anew by the load that was measured
    Rebalance(operate::RebalanceArgs),
    /// Make an authority, and a certificate for each node of a cluster
    Certs(certs::Args),
    /// Make an API key
    Key(key::Args),
    /// Run a coordinator: the front door, gRPC and HTTP
    Coordinator(roles::RoleArgs<moesaic_coordinator::Config>),
    /// Run an attention worker: owns sequences and their latent cache
    AttentionWorker(roles::RoleArgs<moesaic_attention_worker::Config>),
    /// Run an expert worker: owns a shard of the routed experts
    ExpertWorker(roles::RoleArgs<moesaic_expert_worker::Config>),
    /// Print docs/configuration.md
    #[command(hide = true)]
    Reference,
    /// Run an etcd until standard input closes (used by `up --processes`)
    #[command(hide = true)]
    Etcd(etcd::Args),
}

/// The arguments cannot work; said before anything was started.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadArguments(pub String);

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("moesaic: {error:#}");
            exit_code(&error)
        }
    }
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    let bad_arguments = error.chain().any(|cause| {
        cause.is::<BadArguments>()
            || cause.is::<ConfigError>()
            || cause.is::<telemetry::TelemetryError>()
            || cause.is::<moesaic_coordinator::config::InvalidConfig>()
            || cause.is::<moesaic_worker::InvalidSettings>()
            || cause.is::<moesaic_attention_worker::config::InvalidConfig>()
            || cause.is::<moesaic_expert_worker::config::InvalidConfig>()
    });
    if bad_arguments { ExitCode::from(EXIT_BAD_ARGUMENTS) } else { ExitCode::FAILURE }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    // A person who runs `up` or `chat` reads what these print; the rest of the log is for those who ask.
    let level = match cli.command {
        Command::Up(_) | Command::Chat(_) | Command::Bench(_) | Command::Etcd(_) => "warn",
        _ => "info",
    };
    telemetry::init(cli.log_format, level)?;
    tracing::debug!(variable = FILTER_VARIABLE, default = level, "logging");
    let runtime = tokio::runtime::Runtime::new()?;
    let code = runtime.block_on(execute(cli.command));
    runtime.shutdown_timeout(RUNTIME_END);
    nccl::settle();
    code
}

async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(args) => up::run(args).await?,
        Command::Chat(args) => chat::run(args).await?,
        Command::Inspect(args) => return Ok(checkpoint::inspect(&args)),
        Command::Pack(args) => checkpoint::pack(&args)?,
        Command::Quantize(args) => checkpoint::quantize(&args)?,
        Command::Synth(args) => checkpoint::synth(&args)?,
        Command::Bench(args) => bench::run(args).await?,
        Command::Status(args) => operate::status(args).await?,
        Command::Top(args) => operate::top(args).await?,
        Command::Cordon(args) => operate::cordon(args, true, false).await?,
        Command::Uncordon(args) => operate::cordon(args, false, false).await?,
        Command::Drain(args) => operate::cordon(args, true, true).await?,
        Command::Rebalance(args) => operate::rebalance(args).await?,
        Command::Certs(args) => certs::run(&args)?,
        Command::Key(args) => key::run(&args)?,
        Command::Coordinator(args) => args.run(moesaic_coordinator::start).await?,
        Command::AttentionWorker(args) => args.run(moesaic_attention_worker::start).await?,
        Command::ExpertWorker(args) => args.run(moesaic_expert_worker::start).await?,
        Command::Reference => say(&reference::configuration()),
        Command::Etcd(args) => etcd::run(args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// To standard output. That nobody reads it (any more) is no reason to stop.
pub fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
