//! Through the public API, the answers are those of Hugging Face transformers, whatever the number of expert workers.
#![allow(clippy::unwrap_used)]

use moesaic_tests::cluster::{Cluster, Options};
use moesaic_tests::fixtures::MODELS;
use moesaic_tests::parity::{bf16_fma_is_within, bf16_is_near, compare};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f32_is_within_5_thousandths_and_says_the_same() {
    for name in MODELS {
        for expert_workers in [1, 2, 3, 5] {
            let cluster = Cluster::start(&Options { expert_workers, ..Options::new(name, "f32") }).await;
            let (differences, compared) = compare(&cluster, name, 0.01).await;
            let worst = differences.iter().copied().fold(0.0, f32::max);
            println!("{name}, {expert_workers} expert workers, f32: {worst:.6} at worst of {}", differences.len());
            assert!(worst < 0.005, "{name}, {expert_workers} expert workers: {worst} at worst");
            assert!(compared >= 24, "{name}: only {compared} greedy tokens were sure enough to compare");
            cluster.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bf16_fma_is_within_2_hundredths_on_average_and_3_tenths_at_worst() {
    bf16_fma_is_within(&MODELS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bf16_dp_is_within_2_hundredths_at_the_middle_and_much_nearer_than_transformers_bf16() {
    bf16_is_near(&MODELS, |name| Options::new(name, "bf16-dp")).await;
}
