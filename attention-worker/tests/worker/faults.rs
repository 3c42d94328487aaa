//! Aborts, clients that go away, experts that cannot be reached: nothing is kept, and nobody else notices.

use moesaic_attention_worker::core::batcher::{Finish, Limits, Refused, Request};
use moesaic_attention_worker::core::sampler::Sampling;
use moesaic_attention_worker::engine::events::Event;
use moesaic_attention_worker::engine::handle::{Submit, SubmitError};
use moesaic_attention_worker::engine::memory::{CacheSize, MemoryPlan};
use moesaic_dispatch::DispatchError;
use moesaic_kernels::{Dtype, DtypeChoice, Numerics};
use moesaic_model::Checkpoint;

use crate::harness::{LIMITS, Model, answer, fixture, greedy, run, wait_until_idle};

fn model() -> Model {
    Model::open("v3", Numerics::detect(Dtype::F32), 2)
}

#[tokio::test]
async fn streams_that_are_dropped_midway_free_their_pages_and_change_no_other() {
    let engine = model().engine(LIMITS);
    let expected = run(&engine, greedy(&[5; 40], 60)).await;
    let (mut kept, mut dropped) = (Vec::new(), Vec::new());
    for i in 0..64 {
        let running = engine.submit(greedy(&[5; 40], 60)).await.unwrap();
        if i % 2 == 0 { kept.push(running) } else { dropped.push(running) }
    }
    for mut running in dropped {
        assert!(matches!(running.events.next().await, Some(Event::Token { index: 0, .. })));
    }
    for running in kept {
        assert_eq!(answer(running).await, expected);
    }
    wait_until_idle(&engine).await;
}

#[tokio::test]
async fn an_abort_ends_the_stream_and_frees_everything() {
    let engine = model().engine(LIMITS);
    let mut running = engine.submit(greedy(&[5; 40], 200)).await.unwrap();
    assert!(matches!(running.events.next().await, Some(Event::Token { index: 0, .. })));
    engine.abort(running.id).await;
    let mut last = None;
    while let Some(event) = running.events.next().await {
        last = Some(event);
    }
    assert_eq!(last, Some(Event::Aborted));
    wait_until_idle(&engine).await;
}

/// Rule 1: a sequence that goes on on another worker, after any of its tokens, goes on with the same bits.
#[tokio::test]
async fn a_sequence_that_goes_on_elsewhere_has_the_same_tokens_and_log_probabilities() {
    for numerics in [Dtype::F32, Dtype::Bf16].map(Numerics::detect) {
        let sampling = Sampling {
            temperature: 0.9,
            repetition_penalty: 1.2,
            presence_penalty: 0.3,
            frequency_penalty: 0.2,
            seed: 11,
            ..Sampling::default()
        };
        let submit = Submit { sampling, ..greedy(&[5, 9, 6, 5, 5, 17], 70) };
        let whole = run(&Model::open("v3", numerics, 2).engine(LIMITS), submit.clone()).await;
        // Another cut of the experts, smaller chunks and other batches.
        let other = Model::open("v3", numerics, 3).engine(Limits { chunk: 5, token_budget: 7, ..LIMITS });
        for position in [1, 2, 30, 58, 59, 69] {
            let emitted = whole.tokens[..position].to_vec();
            let ids = emitted.iter().map(|token| token.token).collect();
            let request = Request { emitted: ids, ..submit.request.clone() };
            let rest = run(&other, Submit { request, emitted, ..submit.clone() }).await;
            assert_eq!((&rest.tokens[..], rest.finish), (&whole.tokens[position..], whole.finish), "{position}");
        }
    }
}

#[tokio::test]
async fn what_can_never_fit_is_refused_with_both_numbers() {
    let engine = model().engine(Limits { pages: 2, ..LIMITS });
    let refused = engine.submit(greedy(&[5; 100], 29)).await.unwrap_err();
    let expected = Refused::TooLarge { prompt: 100, max_tokens: 29, capacity: 128 };
    assert_eq!(refused, SubmitError::Refused(expected));
    assert_eq!(run(&engine, greedy(&[5; 100], 28)).await.finish, Finish::Length);
}

#[tokio::test]
async fn a_full_line_refuses_at_once() {
    let engine = model().engine(Limits { pages: 1, waiting_max: 2, ..LIMITS });
    let mut running = Vec::new();
    let refused = loop {
        match engine.submit(greedy(&[5; 4], 60)).await {
            Ok(one) => running.push(one),
            Err(refused) => break refused,
        }
        assert!(running.len() < 64, "a line of 2 takes 64");
    };
    assert_eq!(refused, SubmitError::Refused(Refused::LineFull { limit: 2 }));
    for one in running {
        assert_eq!(answer(one).await.finish, Finish::Length);
    }
}

#[tokio::test]
async fn unreachable_experts_fail_the_request_with_a_clear_error() {
    let model = model();
    let engine = model.engine_alone(LIMITS);
    let mut running = engine.submit(greedy(&[5; 4], 8)).await.unwrap();
    match running.events.next().await {
        Some(Event::Failed(error @ DispatchError::NoPlacement { .. })) => {
            assert!(error.to_string().contains("layer 1"))
        }
        other => panic!("{other:?}"),
    }
    assert!(running.events.next().await.is_none());
    wait_until_idle(&engine).await;
}

#[tokio::test]
async fn the_memory_plan_is_what_the_weights_take_at_most() {
    for name in ["v3", "v3-fp8", "v2", "v2-lite", "tiny-r1"] {
        let [f32, bf16] = [Dtype::F32, Dtype::Bf16].map(|dtype| (Numerics::portable(dtype), Numerics::detect(dtype)));
        let portable_int8 = Numerics::all().into_iter().find(Numerics::quantises).unwrap();
        for (numerics, fastest) in [f32, bf16, (portable_int8, DtypeChoice::Int8.numerics())] {
            let dtype = numerics.name();
            let taken = |numerics| Model::open(name, numerics, 1).weights.bytes();
            let (plain, fastest) = (taken(numerics), taken(fastest));
            assert!(fastest <= plain, "{name} {dtype}: {fastest} bytes, {plain} as they are stored");
            let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
            let plan = MemoryPlan::new(&checkpoint, numerics, CacheSize::Tokens(1000), 0).unwrap();
            let (planned, taken) = (plan.weights as f64, plain as f64);
            assert!((planned / taken - 1.0).abs() < 0.05, "{name} {dtype}: planned {planned}, taken {taken}");
            assert_eq!((plan.pages, plan.cache), (16, 16 * 64 * plan.per_token));

            let page = 64 * plan.per_token;
            let cache = |bytes| MemoryPlan::new(&checkpoint, numerics, CacheSize::Bytes(bytes), 0);
            assert_eq!(cache(4 * page - 1).unwrap().pages, 3);
            let error = cache(page - 1).unwrap_err().to_string();
            let expected = [page - 1, page].map(|bytes| bytes.to_string());
            assert!(expected.iter().all(|number| error.contains(number)), "{error}");
        }
    }
}
