//! `moesaic-attention-worker`: one attention worker as a process of its own.

use moesaic_attention_worker::start;
use moesaic_node::program;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    program::run(
        "moesaic-attention-worker",
        "Owns sequences of a Moesaic cluster: attention, latent cache, batching and sampling",
        start,
    )
    .await
}
