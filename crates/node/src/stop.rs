//! Graceful stop: one token for the whole process, cancelled by the first SIGTERM or SIGINT. A second signal ends the
//! process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code after a second signal: what shells report for SIGINT.
const EXIT_FORCED: i32 = 130;

/// Starts to listen for signals; needs a tokio runtime.
pub fn on_signals() -> std::io::Result<CancellationToken> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            let name = tokio::select! {
                _ = term.recv() => "SIGTERM",
                _ = int.recv() => "SIGINT",
            };
            if first {
                tracing::info!(signal = name, "stopping: finishing what runs; a second signal ends it at once");
                token.cancel();
            }
        }
        std::process::exit(EXIT_FORCED);
    });
    Ok(stop)
}
