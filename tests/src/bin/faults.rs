//! `cargo run --release -p moesaic-tests --bin faults -- [F1 F5 ..]`: injects faults into a cluster of processes.

use std::process::ExitCode;

use anyhow::Result;
use moesaic_tests::faults;
use moesaic_tests::faults::options::{Options, USAGE};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let arguments = std::env::args().skip(1);
    if std::env::args().any(|argument| argument == "--help" || argument == "-h") {
        println!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse(arguments)?;
    let mut terminate = signal(SignalKind::terminate())?;
    // What is dropped on the way out is undone.
    let passed = tokio::select! {
        passed = faults::run(options) => passed?,
        _ = tokio::signal::ctrl_c() => false,
        _ = terminate.recv() => false,
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
