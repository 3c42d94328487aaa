//! `moesaic-expert-worker`: one expert worker as a process of its own.

use moesaic_expert_worker::start;
use moesaic_node::program;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    program::run("moesaic-expert-worker", "Owns a shard of the routed experts of a Moesaic cluster", start).await
}
