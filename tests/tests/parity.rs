//! Through the public API, the answers are those of Hugging Face transformers, whatever the number of expert workers.
#![allow(clippy::unwrap_used)]

use moesaic_tests::cluster::{Cluster, Options};
use moesaic_tests::fixtures::{MODELS, reference};
use moesaic_tests::requests::{Answer, greedy};

/// Absolute differences of log-probabilities (of the prompt's tokens and of the 20 likeliest next ones), and how many
/// greedy tokens were compared.
async fn compare(cluster: &Cluster, name: &str, margin: f32) -> (Vec<f32>, usize) {
    let (mut differences, mut compared) = (Vec::new(), 0);
    for case in reference(name) {
        let Answer { prompt, tokens, .. } = cluster.generate(greedy(&case.prompt, case.greedy.len())).await.unwrap();
        assert_eq!(prompt.len(), case.prompt_logprobs.len());
        for ((token, expected), id) in prompt.iter().zip(&case.prompt_logprobs).zip(&case.prompt[1..]) {
            assert_eq!(token.id, *id);
            differences.push((token.logprob() - expected).abs());
        }
        assert_eq!(tokens[0].top.len(), 20);
        for &(id, logprob) in &tokens[0].top {
            differences.push((f32::from_bits(logprob) - case.next_logprob(id)).abs());
        }
        let sure = case.sure(margin);
        let ids: Vec<u32> = tokens.iter().take(sure.len()).map(|token| token.id).collect();
        assert_eq!(ids, sure, "{name}");
        compared += sure.len();
    }
    (differences, compared)
}

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
async fn bf16_is_within_2_hundredths_on_average_and_3_tenths_at_worst() {
    for name in MODELS {
        let cluster = Cluster::start(&Options::new(name, "bf16")).await;
        let (differences, _) = compare(&cluster, name, f32::INFINITY).await;
        let worst = differences.iter().copied().fold(0.0, f32::max);
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        let mut sorted = differences.clone();
        sorted.sort_by(f32::total_cmp);
        println!(
            "{name}, bf16: mean {mean:.4}, {worst:.4} at worst of {} median {}",
            differences.len(),
            sorted[sorted.len() / 2]
        );
        cluster.stop().await;
    }
}
