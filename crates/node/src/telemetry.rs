//! Logs, on standard error. Prompts, generated text and keys are never logged, at any level.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;

/// Names the level, or levels by module ("info,moesaic_dispatch=debug").
pub const FILTER_VARIABLE: &str = "MOESAIC_LOG";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("log format {given:?} is unknown; expected text or json")]
    Format { given: String },
    #[error("{FILTER_VARIABLE}={given:?} is no filter; expected a level such as info, or module=level pairs")]
    Filter { given: String },
    #[error("logs are set up already")]
    Twice,
}

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(given: &str) -> Result<Self, TelemetryError> {
        match given {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(TelemetryError::Format { given: given.to_owned() }),
        }
    }
}

/// Sets up logging for the process; `default_filter` counts where the environment names none.
pub fn init(format: LogFormat, default_filter: &str) -> Result<(), TelemetryError> {
    let given = std::env::var(FILTER_VARIABLE).unwrap_or_else(|_| default_filter.to_owned());
    let filter = EnvFilter::try_new(&given).map_err(|_| TelemetryError::Filter { given })?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match format {
        LogFormat::Text => logs.with_target(false).try_init(),
        LogFormat::Json => logs.json().try_init(),
    };
    done.map_err(|_| TelemetryError::Twice)
}
