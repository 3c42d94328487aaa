//! Requests that are refused, each with its field.

use std::path::Path;

use moesaic_model::Checkpoint;

use super::*;

/// A model with 512 tokens and a context of 256.
fn config() -> Config {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/v3");
    Checkpoint::open(&dir).unwrap().config().clone()
}

fn sampled() -> SamplingParams {
    SamplingParams {
        temperature: Some(1.0),
        top_p: Some(1.0),
        repetition_penalty: Some(1.0),
        seed: Some(1),
        ..Default::default()
    }
}

fn valid() -> RunRequest {
    RunRequest {
        request_id: "r-1".into(),
        prompt: vec![0, 511],
        sampling: Some(sampled()),
        max_tokens: 254,
        ..Default::default()
    }
}

fn s(run: &mut RunRequest) -> &mut SamplingParams {
    run.sampling.as_mut().unwrap()
}

#[test]
fn a_valid_request_passes_as_it_is() {
    let mut run = valid();
    s(&mut run).logit_bias = [(9, 1.0), (3, -1.0)].into();
    run.logprobs = Some(20);
    let submit = check(run, &config()).unwrap();
    assert_eq!((submit.request.prompt, submit.request.max_tokens), (vec![0, 511], 254));
    assert_eq!(submit.sampling.logit_bias, [(3, -1.0), (9, 1.0)]);
    assert_eq!((submit.logprobs, submit.prompt_logprobs), (Some(20), None));
}

#[test]
fn every_field_is_checked_and_named_with_limit_and_value() {
    type Change = fn(&mut RunRequest);
    let table: [(Change, &str); 24] = [
        (|r| r.request_id = String::new(), "request_id: \"\"; expected 1 to"),
        (|r| r.request_id = "a b".into(), "request_id: \"a b\""),
        (|r| r.request_id = "a".repeat(145), "expected 1 to 144"),
        (|r| r.prompt.clear(), "prompt: is empty"),
        (|r| r.prompt = vec![1, 512], "prompt[1]: 512; expected a token below 512"),
        (|r| r.max_tokens = 0, "max_tokens: 0; expected at least 1"),
        (|r| r.max_tokens = 255, "max_tokens: 255 after a prompt of 2; expected together at most the context of 256"),
        (|r| r.max_tokens = u32::MAX, "max_tokens: 4294967295"),
        (|r| r.stop_token_ids = vec![1; 81], "stop_token_ids: 81; expected at most 80"),
        (|r| r.stop_token_ids = vec![9999], "stop_token_ids[0]: 9999"),
        (|r| r.logprobs = Some(21), "logprobs: 21; expected at most 20"),
        (|r| r.prompt_logprobs = Some(u32::MAX), "prompt_logprobs: 4294967295"),
        (|r| r.sampling = None, "sampling.temperature: is not set"),
        (|r| s(r).temperature = Some(f32::NAN), "sampling.temperature: NaN; expected 0 to 2"),
        (|r| s(r).temperature = Some(-0.1), "sampling.temperature: -0.1"),
        (|r| s(r).temperature = Some(f32::INFINITY), "sampling.temperature: inf"),
        (|r| s(r).top_p = Some(0.0), "sampling.top_p: 0; expected above 0, at most 1"),
        (|r| s(r).min_p = 1.5, "sampling.min_p: 1.5; expected 0 to 1"),
        (|r| s(r).repetition_penalty = Some(f32::NAN), "sampling.repetition_penalty: NaN"),
        (|r| s(r).presence_penalty = 2.5, "sampling.presence_penalty: 2.5; expected -2 to 2"),
        (|r| s(r).frequency_penalty = f32::NEG_INFINITY, "sampling.frequency_penalty: -inf"),
        (|r| s(r).logit_bias = [(1, f32::NAN)].into(), "sampling.logit_bias[1]: NaN; expected -100 to 100"),
        (|r| s(r).logit_bias = [(600, 1.0)].into(), "600; expected a token below 512"),
        (|r| s(r).seed = None, "sampling.seed: is not set"),
    ];
    let config = config();
    for (change, expected) in table {
        let mut run = valid();
        change(&mut run);
        let error = check(run, &config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}
