//! Through the public API, the answers are those of Hugging Face transformers, whatever the number of expert workers.
#![allow(clippy::unwrap_used)]

use moesaic_tests::cluster::Options;
use moesaic_tests::fixtures::MODELS;
use moesaic_tests::parity::{bf16_is_near, int8_is_near, is_within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f32_is_within_5_thousandths_and_says_the_same() {
    for name in MODELS {
        for expert_workers in [1, 2, 3, 5] {
            is_within(name, &Options { expert_workers, ..Options::new(name, "f32") }, 0.005, 0.005).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bf16_fma_is_within_2_hundredths_on_average_and_3_tenths_at_worst() {
    for name in MODELS {
        is_within(name, &Options::new(name, "bf16-fma"), 0.02, 0.3).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn int8_is_within_5_hundredths_at_the_middle_and_says_the_same_where_it_is_sure() {
    int8_is_near().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bf16_dp_is_within_2_hundredths_at_the_middle_and_much_nearer_than_transformers_bf16() {
    bf16_is_near(&MODELS, |name| Options::new(name, "bf16-dp")).await;
}
