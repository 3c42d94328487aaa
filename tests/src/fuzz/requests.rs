//! Requests in protobuf: the public API, what the coordinator makes of it for an attention worker, and what comes back.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use moesaic_attention_worker::engine::handle::Submit;
use moesaic_attention_worker::shell::request;
use moesaic_coordinator::core::journal::{Journal, Place};
use moesaic_coordinator::core::{Output, Params, Request};
use moesaic_coordinator::model::Model;
use moesaic_coordinator::shell::grpc as public;
use moesaic_coordinator::text::Tokenizer;
use moesaic_proto::limits::{LOGIT_BIAS_MAX, LOGPROBS_MAX};
use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::{GenerateRequest, RunEvent, RunRequest, TokenizeRequest};
use prost::Message;
use tonic::body::Body;
use tonic::codegen::Service;

use super::checks::check_error;
use super::http::{RUNTIME, service};
use crate::fixtures;

/// The demo model, as both roles read it.
const MODEL: &str = "tiny-r1";

thread_local! {
    static SIDES: (Model, moesaic_model::Config) = {
        let folder = fixtures::folder(MODEL);
        (Model::open(&folder, None).unwrap(), moesaic_model::Config::read(&folder).unwrap())
    };
    static TOKENIZER: Arc<Tokenizer> = Arc::new(Tokenizer::open(&fixtures::folder(MODEL)).unwrap());
}

/// What a coordinator takes, a worker takes.
pub fn generate_request(data: &[u8]) {
    let Ok(mut message) = GenerateRequest::decode(data) else { return };
    let prompt = match message.prompt.take() {
        Some(Prompt::Tokens(tokens)) => tokens.ids,
        Some(Prompt::Text(text)) => match TOKENIZER.with(|tokenizer| tokenizer.encode(&text, false)) {
            Ok(ids) => ids,
            Err(error) => return check_error(error),
        },
        _ => return,
    };
    let params = public::params(message);
    SIDES.with(|(model, config)| check_params(&params, prompt, model, config));
}

pub(super) fn check_params(params: &Params, prompt: Vec<u32>, model: &Model, config: &moesaic_model::Config) {
    let checked = params.check(model);
    match params.request(prompt, model, None) {
        Err(error) => check_error(error),
        Ok(request) => {
            checked.expect("a request's parameters were valid");
            let submit = request::check(run_of(request.clone()), config);
            let submit = submit.unwrap_or_else(|error| panic!("the worker refuses {request:?}: {error}"));
            check_submit(&submit, config);
        }
    }
}

fn run_of(request: Request) -> RunRequest {
    let seed = request.sampling.seed.unwrap_or(7);
    request.into_run("r".into(), seed)
}

pub fn run_request(data: &[u8]) {
    let Ok(run) = RunRequest::decode(data) else { return };
    SIDES.with(|(_, config)| match request::check(run.clone(), config) {
        Err(error) => check_error(error),
        Ok(submit) => {
            check_submit(&submit, config);
            assert_eq!((submit.request.prompt, submit.request.max_tokens), (run.prompt, run.max_tokens as usize));
        }
    });
}

/// What the engine relies on.
fn check_submit(submit: &Submit, config: &moesaic_model::Config) {
    let Submit { request, sampling: s, emitted, logprobs, prompt_logprobs, .. } = submit;
    let known = |token: &u32| (*token as usize) < config.vocab_size;
    assert!(!request.prompt.is_empty() && request.prompt.iter().all(known) && request.stop_tokens.iter().all(known));
    assert!(request.prompt.len() + request.max_tokens <= config.max_position_embeddings);
    assert!(request.emitted.len() < request.max_tokens && request.emitted.iter().all(known));
    assert!(emitted.iter().map(|token| token.token).eq(request.emitted.iter().copied()));
    assert!([logprobs, prompt_logprobs].iter().all(|n| n.is_none_or(|n| n <= LOGPROBS_MAX as usize)));
    assert!((0.0..=2.0).contains(&s.temperature) && s.top_p > 0.0 && s.top_p <= 1.0 && (0.0..=1.0).contains(&s.min_p));
    assert!(s.repetition_penalty > 0.0 && s.repetition_penalty <= 10.0);
    assert!([s.presence_penalty, s.frequency_penalty].iter().all(|p| (-2.0..=2.0).contains(p)));
    assert!(s.logit_bias.len() <= LOGIT_BIAS_MAX && s.logit_bias.is_sorted_by(|a, b| a.0 < b.0));
    assert!(s.logit_bias.iter().all(|(token, bias)| known(token) && bias.abs() <= 100.0));
}

/// Events of a worker, one after the other with their lengths before them. The first byte: bit 0 is whether there are
/// stop strings, bit 1 whether the end of a sentence is ignored, bit 2 whether the client aborts in the end.
pub fn run_events(data: &[u8]) {
    let Some((flags, mut data)) = data.split_first() else { return };
    let stop = if flags & 1 != 0 { vec!["ab".into(), "b\n".into(), "é".into()] } else { Vec::new() };
    let params = Params { stop, ignore_eos: flags & 2 != 0, stop_token_ids: vec![20], ..Params::default() };
    let request = SIDES.with(|(model, _)| params.request(vec![5], model, None)).unwrap();
    let mut output = TOKENIZER.with(|tokenizer| Output::new(&request, tokenizer.clone()));
    let mut journal = Journal::new(run_of(request));
    let (mut taken, mut given) = (0, 0);
    while let Ok(event) = RunEvent::decode_length_delimited(&mut data) {
        let place = journal.accept(&event);
        assert_eq!(place == Place::Gap, event.token.is_some() && event.position as usize > taken);
        if place != Place::Next {
            continue;
        }
        taken += usize::from(event.token.is_some());
        assert_eq!(journal.position(), taken);
        let is_last = event.finish.is_some();
        let Some(delta) = output.push(event) else {
            assert!(!is_last, "a sequence that has finished says so");
            continue;
        };
        assert_eq!(delta.position as usize, given);
        given += delta.tokens.len();
        if let Some(ending) = delta.ending {
            assert_eq!((given, ending.completion_tokens as usize), (taken, taken));
            assert!(ending.hidden_tokens as usize <= delta.tokens.len().max(given));
            return;
        }
        assert!(!is_last && given <= taken);
    }
    if flags & 4 != 0 {
        let delta = output.abort();
        assert_eq!((delta.position as usize, delta.tokens.len()), (given, taken - given));
        assert!(delta.ending.is_some());
    }
}

/// A call of the public service. The first byte: Generate or Tokenize; the rest is the message.
pub fn grpc(data: &[u8]) {
    let Some((method, message)) = data.split_first() else { return };
    let (method, is_message) = match method % 2 {
        0 => ("Generate", GenerateRequest::decode(message).is_ok()),
        _ => ("Tokenize", TokenizeRequest::decode(message).is_ok()),
    };
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(message);
    let request = ::http::Request::post(format!("/moesaic.v1.Inference/{method}"))
        .header("content-type", "application/grpc")
        .body(Body::new(Full::new(Bytes::from(framed))))
        .unwrap();
    let mut server = public::server(service());
    let (head, trailers) = RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let response = server.call(request).await.unwrap();
            let (head, body) = response.into_parts();
            (head, body.collect().await.unwrap().trailers().cloned().unwrap_or_default())
        })
    });
    let header = |name: &str| head.headers.get(name).or(trailers.get(name)).map(|value| value.to_str().unwrap());
    let code = header("grpc-status").expect("a call has a status");
    if code != "0" {
        // Percent-encoded.
        check_error(header("grpc-message").unwrap_or_default());
        // INTERNAL and UNKNOWN are ours to explain; the first is also what tonic says of a broken message.
        assert!(!is_message || !["2", "13"].contains(&code), "status {code}: {:?}", header("grpc-message"));
    }
}
