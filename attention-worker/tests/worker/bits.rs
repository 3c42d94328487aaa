//! Rule 1: a request's answer has the same bits however the work is cut.

use moesaic_attention_worker::core::batcher::Limits;
use moesaic_attention_worker::core::sampler::Sampling;
use moesaic_attention_worker::engine::handle::{EngineHandle, Submit};
use moesaic_kernels::{Dtype, Numerics};

use crate::harness::{Answer, LIMITS, Model, answer, greedy, run, wait_until_idle};

/// Prompts of 1 to 118 tokens; every other request is sampled, with all that sampling has.
fn requests() -> Vec<Submit> {
    let request = |i: usize| {
        let prompt: Vec<u32> = (0..1 + i * 3).map(|p| ((p * 37 + i * 101) % 500) as u32).collect();
        let submit = greedy(&prompt, 10 + i % 7);
        if i.is_multiple_of(2) {
            return submit;
        }
        let sampling = Sampling {
            temperature: 0.9,
            top_k: 50,
            top_p: 0.95,
            min_p: 0.01,
            repetition_penalty: 1.1,
            presence_penalty: 0.1,
            frequency_penalty: 0.1,
            logit_bias: vec![(7, 1.5)],
            seed: i as u64,
        };
        Submit { sampling, ..submit }
    };
    (0..40).map(request).collect()
}

async fn at_once(engine: &EngineHandle) -> Vec<Answer> {
    let mut running = Vec::new();
    for submit in requests() {
        running.push(engine.submit(submit).await.unwrap());
    }
    futures::future::join_all(running.into_iter().map(answer)).await
}

async fn alone(engine: &EngineHandle) -> Vec<Answer> {
    let mut answers = Vec::new();
    for submit in requests() {
        answers.push(run(engine, submit).await);
    }
    answers
}

async fn check(name: &str, dtype: Dtype) {
    let numerics = Numerics::detect(dtype);
    let model = Model::open(name, numerics, 1);
    let expected = alone(&model.engine(LIMITS)).await;
    let mut tries = Vec::new();
    for chunk in [1, 7, 64] {
        for micro_batches in 1..=3 {
            tries.push(Limits { chunk, micro_batches, ..LIMITS });
        }
    }
    tries.push(Limits { token_budget: 5, ..LIMITS });
    for limits in tries {
        assert_eq!(at_once(&model.engine(limits)).await, expected, "{name}, {limits:?}");
    }

    // Little more than one sequence needs: most of them give up their pages at some time.
    let limits = Limits { pages: 4, ..LIMITS };
    let engine = model.engine(limits);
    assert_eq!(at_once(&engine).await, expected, "{name}, {limits:?}");
    assert!(wait_until_idle(&engine).await.preemptions > 0, "{limits:?} forces no preemption");

    for workers in [2, 5] {
        let answers = at_once(&Model::open(name, numerics, workers).engine(LIMITS)).await;
        assert_eq!(answers, expected, "{name}, {workers} expert workers");
    }
}

#[tokio::test]
async fn v3_in_f32() {
    check("v3", Dtype::F32).await;
}

#[tokio::test]
async fn v3_fp8_in_bf16() {
    check("v3-fp8", Dtype::Bf16).await;
}

#[tokio::test]
async fn v2_lite_in_bf16() {
    check("v2-lite", Dtype::Bf16).await;
}
