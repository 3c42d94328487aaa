//! What transformers answered for the fixtures.

use moesaic_kernels::{Dtype, Numerics};
use serde::Deserialize;

use crate::harness::{LIMITS, Model, fixture, greedy, run};

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    last_logits: Vec<f32>,
    prompt_logprobs: Vec<f32>,
    greedy: Vec<u32>,
    greedy_margin: Vec<f32>,
}

fn log_sum(logits: &[f32]) -> f32 {
    logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln() as f32
}

/// Differences of log-probabilities, and how many greedy tokens were compared.
async fn differences(name: &str, dtype: Dtype, margin_min: f32) -> (Vec<f32>, usize) {
    let reference: Reference =
        serde_json::from_slice(&std::fs::read(fixture(name).join("reference.json")).unwrap()).unwrap();
    let engine = Model::open(name, Numerics::detect(dtype), 3).engine(LIMITS);
    let (mut differences, mut compared) = (Vec::new(), 0);
    for case in reference.cases {
        let answer = run(&engine, greedy(&case.prompt, case.greedy.len())).await;
        assert_eq!(answer.prompt.len(), case.prompt_logprobs.len());
        for ((token, expected), position) in answer.prompt.iter().zip(&case.prompt_logprobs).zip(1..) {
            assert_eq!(token.token, case.prompt[position]);
            differences.push((token.logprobs.as_ref().unwrap().logprob - expected).abs());
        }
        let log_sum = log_sum(&case.last_logits);
        for &(token, logprob) in &answer.tokens[0].logprobs.as_ref().unwrap().top {
            differences.push((logprob - (case.last_logits[token as usize] - log_sum)).abs());
        }
        // After a token that may differ, the rest may.
        let sure = case.greedy_margin.iter().take_while(|&&margin| margin > margin_min).count();
        let tokens: Vec<u32> = answer.tokens.iter().map(|t| t.token).take(sure).collect();
        assert_eq!(tokens, case.greedy[..sure], "{name}");
        compared += sure;
    }
    (differences, compared)
}

#[tokio::test]
async fn f32_is_within_5_thousandths_and_says_the_same() {
    for name in ["v3", "v3-fp8", "v2", "v2-lite", "tiny-r1"] {
        let (differences, compared) = differences(name, Dtype::F32, 0.01).await;
        let worst = differences.iter().copied().fold(0.0, f32::max);
        assert!(worst < 0.005, "{name}: {worst} at worst, of {}", differences.len());
        assert!(compared >= 24, "{name}: only {compared} greedy tokens were sure enough to compare");
    }
}

/// Rounding activations and cache to bf16 turns a gate's choice where two experts are nearly equal, and a position
/// where that happens is off by as much as the experts differ. So the bounds are on the middle of all positions and on
/// how many are far off.
#[tokio::test]
async fn bf16_is_within_2_hundredths_but_where_the_gate_is_undecided() {
    for name in ["v3", "v3-fp8", "v2", "v2-lite", "tiny-r1"] {
        let (mut differences, _) = differences(name, Dtype::Bf16, f32::INFINITY).await;
        differences.sort_by(f32::total_cmp);
        let median = differences[differences.len() / 2];
        let far = differences.iter().filter(|&&difference| difference > 0.3).count();
        assert!(median < 0.02 && far * 10 < differences.len(), "{name}: median {median}, {far} far off");
    }
}
