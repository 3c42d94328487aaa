//! A role as a program of its own.

use clap::{Args, FromArgMatches};
use tokio_util::sync::CancellationToken;

use crate::config::Layered;
use crate::stop;
use crate::telemetry::{self, LogFormat, TelemetryError};

#[derive(Args)]
struct Arguments<C: Args> {
    #[command(flatten)]
    config: Layered<C>,
    /// text or json
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = str::parse::<LogFormat>)]
    log_format: LogFormat,
}

/// Reads the command line, and runs the role until a signal stops it. Ends the process where the command line is wrong.
pub async fn run<C, R, E>(
    name: &'static str,
    about: &'static str,
    start: impl FnOnce(C, CancellationToken) -> R,
) -> Result<(), E>
where
    C: Args,
    R: Future<Output = Result<(), E>>,
    E: From<TelemetryError> + From<std::io::Error>,
{
    let command = clap::Command::new(name).about(about).version(env!("CARGO_PKG_VERSION"));
    let mut command = Arguments::<C>::augment_args(command);
    let read = Arguments::<C>::from_arg_matches(&command.get_matches_mut());
    let Arguments { config, log_format } = read.unwrap_or_else(|error| error.format(&mut command).exit());
    telemetry::init(log_format, "info")?;
    start(config.0, stop::on_signals()?).await
}
