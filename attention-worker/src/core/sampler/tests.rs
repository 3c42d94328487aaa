//! What each parameter does to a row of logits.

use proptest::prelude::*;

use super::*;

fn sample(logits: &[f32], sampling: &Sampling, prompt: &[u32], generated: &[u32]) -> u32 {
    moesaic_kernels::draw(logits, &sampling.draw(prompt, generated))
}

const ON: Sampling = Sampling {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    logit_bias: Vec::new(),
    seed: 0,
};

/// The tokens that can come out, ascending, over many seeds.
fn support(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let mut seen: Vec<u32> =
        (0..2000).map(|seed| sample(logits, &Sampling { seed, ..sampling.clone() }, &[0], &[])).collect();
    seen.sort_unstable();
    seen.dedup();
    seen
}

#[test]
fn greedy_takes_the_best_and_of_equals_the_first() {
    let greedy = Sampling::default();
    let table: [(&[f32], u32); 6] = [
        (&[1.0, 3.0, 2.0], 1),
        (&[1.0, 3.0, 3.0], 1),
        (&[f32::NAN, 0.0, f32::NAN], 1),
        (&[f32::NAN, f32::NAN], 0),
        (&[f32::NEG_INFINITY, -1e30], 1),
        (&[-0.0, 0.0], 0),
    ];
    for (logits, expected) in table {
        assert_eq!(sample(logits, &greedy, &[0], &[]), expected, "{logits:?}");
    }
}

#[test]
fn penalties_and_bias_come_before_the_choice() {
    let greedy = Sampling::default;
    let logits = [2.0, 1.9, -1.0, 0.0];
    let table = [
        (Sampling { logit_bias: vec![(3, 2.5)], ..greedy() }, 3),
        // Prompt and output count: 2.0 / 2, 1.9 / 2.
        (Sampling { repetition_penalty: 2.0, ..greedy() }, 0),
        // The output alone counts: token 1, twice.
        (Sampling { presence_penalty: -0.2, ..greedy() }, 1),
        (Sampling { frequency_penalty: -0.06, ..greedy() }, 1),
        (Sampling { frequency_penalty: -0.04, ..greedy() }, 0),
    ];
    for (sampling, expected) in table {
        assert_eq!(sample(&logits, &sampling, &[0, 0, 0], &[1, 1]), expected, "{sampling:?}");
    }
    let negative = Sampling { repetition_penalty: 2.0, ..greedy() };
    assert_eq!(sample(&[-1.0, -1.5], &negative, &[0], &[]), 1, "a negative logit is multiplied");
}

#[test]
fn filters_keep_what_they_should() {
    // Probabilities 0.4, 0.3, 0.2, 0.1.
    let logits: Vec<f32> = [0.2f32, 0.4, 0.1, 0.3].map(f32::ln).to_vec();
    let table: [(Sampling, &[u32]); 8] = [
        (ON, &[0, 1, 2, 3]),
        (Sampling { top_k: 2, ..ON }, &[1, 3]),
        (Sampling { top_k: 99, ..ON }, &[0, 1, 2, 3]),
        (Sampling { top_p: 0.5, ..ON }, &[1, 3]),
        (Sampling { top_p: 1e-9, ..ON }, &[1]),
        (Sampling { min_p: 0.45, ..ON }, &[0, 1, 3]),
        (Sampling { min_p: 1.0, ..ON }, &[1]),
        // top-p sees what top-k left: 0.4 of 0.7 is 0.57.
        (Sampling { top_k: 2, top_p: 0.55, ..ON }, &[1]),
    ];
    for (sampling, expected) in table {
        assert_eq!(support(&logits, &sampling), expected, "{sampling:?}");
    }
    assert_eq!(support(&[1.0, 1.0, 1.0], &Sampling { top_k: 2, ..ON }), [0, 1], "of equals the lower ids");
    assert_eq!(support(&logits, &Sampling { temperature: 1e-30, ..ON }), [1]);
}

#[test]
fn draws_follow_the_probabilities() {
    let logits: Vec<f32> = [0.1f32, 0.6, 0.3].map(f32::ln).to_vec();
    let mut counts = [0f64; 3];
    for seed in 0..20_000 {
        counts[sample(&logits, &Sampling { seed, ..ON }, &[0], &[]) as usize] += 1.0 / 20_000.0;
    }
    for (share, expected) in counts.iter().zip([0.1, 0.6, 0.3]) {
        assert!((share - expected).abs() < 0.015, "{counts:?}");
    }
}

/// Fixed for good: a replica of another version must draw the same.
#[test]
fn known_draws() {
    let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 / 3.0).collect();
    let drawn: Vec<u32> =
        (0..8).map(|length| sample(&logits, &Sampling { seed: 42, ..ON }, &[1], &vec![2; length])).collect();
    assert_eq!(drawn, KNOWN_DRAWS);
}
const KNOWN_DRAWS: [u32; 8] = [97, 82, 73, 33, 32, 23, 36, 55];

#[test]
fn what_was_emitted_may_move_into_the_prompt() {
    let logits: Vec<f32> = (0..50).map(|i| (i % 5) as f32).collect();
    let one = sample(&logits, &Sampling { seed: 7, ..ON }, &[1, 2], &[3, 4]);
    assert_eq!(sample(&logits, &Sampling { seed: 7, ..ON }, &[1, 2, 3], &[4]), one);
}

#[test]
fn logprobs_are_the_models_own() {
    let logits: Vec<f32> = [0.2f32, 0.4, 0.1, 0.3].map(|p| p.ln() + 5.0).to_vec();
    let Logprobs { logprob, top } = logprobs(&logits, 2, 2);
    assert!((logprob - 0.1f32.ln()).abs() < 1e-5);
    assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3]);
    assert!((top[0].1 - 0.4f32.ln()).abs() < 1e-5);
    assert_eq!(logprobs(&[1.0, 1.0, 1.0], 0, 2).top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
    assert!(logprobs(&logits, 0, 0).top.is_empty());
}

proptest! {
    #[test]
    fn any_input_gives_a_token_of_the_vocabulary(
        logits in prop::collection::vec(prop_oneof![any::<f32>(), -5f32..5.0], 1..40),
        (temperature, top_p, min_p) in (0f32..2.0, 0.001f32..1.0, 0f32..1.0),
        (top_k, seed, presence) in (0usize..50, any::<u64>(), -2f32..2.0),
    ) {
        let sampling = Sampling { temperature, top_k, top_p, min_p, presence_penalty: presence, seed, ..ON };
        let token = sample(&logits, &sampling, &[0], &[0]);
        prop_assert!((token as usize) < logits.len());
        prop_assert_eq!(sample(&logits, &sampling, &[0], &[0]), token);
    }
}
