//! `moesaic-coordinator`: one coordinator as a process of its own.

use moesaic_coordinator::start;
use moesaic_node::program;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    program::run(
        "moesaic-coordinator",
        "The front door of a Moesaic cluster: gRPC and OpenAI-compatible HTTP on one port",
        start,
    )
    .await
}
