//! The public gRPC service, on the same port as HTTP.

use std::time::{Duration, Instant};

use crate::cluster::{Cluster, EOS, FINGERPRINT, Script, until};
use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::inference_client::InferenceClient;
use moesaic_proto::v1::{
    AbortRequest, ChatMessage, Conversation, FinishReason, GenerateRequest, GenerateResponse, ListModelsRequest,
    SamplingParams, TokenIds, TokenizeRequest, tokenize_request,
};
use tonic::transport::Channel;
use tonic::{Code, Status};

async fn client(cluster: &Cluster) -> InferenceClient<Channel> {
    InferenceClient::connect(cluster.url.clone()).await.unwrap()
}

fn text(prompt: &str) -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::Text(prompt.into())), ..GenerateRequest::default() }
}

async fn generate(cluster: &Cluster, request: GenerateRequest) -> Result<Vec<GenerateResponse>, Status> {
    let mut stream = client(cluster).await.generate(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

#[tokio::test]
async fn generates_with_positions_seed_and_finish() {
    let cluster = Cluster::new(Script::says("aé!")).await;
    let request =
        GenerateRequest { logprobs: Some(1), prompt_logprobs: Some(0), stop: vec!["zz".into()], ..text("xy") };
    let all = generate(&cluster, request).await.unwrap();
    let mut position = 0;
    for message in &all {
        assert_eq!(message.position, position);
        position += message.tokens.len() as u32;
        assert_eq!(message.request_id, all[0].request_id);
    }
    assert_eq!(all.iter().map(|m| m.text.as_str()).collect::<String>(), "aé!");
    assert!(all[0].seed.is_some() && all[1..].iter().all(|m| m.seed.is_none() && m.prompt.is_empty()));
    assert_eq!(all[0].prompt.len(), 1);
    assert_eq!(all[0].tokens[0].top.len(), 1);
    let last = all.last().unwrap();
    let finish = last.finish.as_ref().unwrap();
    assert_eq!((finish.reason(), finish.prompt_tokens, finish.completion_tokens), (FinishReason::Stop, 2, 5));
    assert_eq!((last.tokens[0].token, finish.matched_stop.as_str()), (EOS, ""));

    let conversation = Conversation { messages: vec![ChatMessage { role: "user".into(), content: "1".into() }] };
    let chat = GenerateRequest { prompt: Some(Prompt::Chat(conversation)), ..GenerateRequest::default() };
    generate(&cluster, chat).await.unwrap();
    assert_eq!(cluster.last_run().prompt, crate::cluster::ids("<｜begin▁of▁sentence｜><｜User｜>1<｜Assistant｜>"));
}

#[tokio::test]
async fn stop_strings_and_stop_tokens_are_named() {
    let cluster = Cluster::new(Script::says("one two")).await;
    let by_string = generate(&cluster, GenerateRequest { stop: vec!["tw".into()], ..text("x") }).await.unwrap();
    let stop_token_ids = vec![crate::cluster::ids("w")[0]];
    let by_token = generate(&cluster, GenerateRequest { stop_token_ids: stop_token_ids.clone(), ..text("x") });
    let by_token = by_token.await.unwrap();
    let matched = |all: &[GenerateResponse]| all.last().unwrap().finish.clone().unwrap().matched_stop;
    let text = |all: &[GenerateResponse]| all.iter().map(|m| m.text.clone()).collect::<String>();
    assert_eq!((matched(&by_string), text(&by_string)), ("tw".into(), "one ".into()));
    assert_eq!((matched(&by_token), text(&by_token)), (stop_token_ids[0].to_string(), "one t".into()));
}

#[tokio::test]
async fn abort_ends_the_stream_and_frees_the_worker() {
    let cluster = Cluster::new(Script::endless()).await;
    let mut client = client(&cluster).await;
    let request = || GenerateRequest { request_id: "job:1".into(), ..text("x") };
    let mut stream = client.generate(request()).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();

    let again = client.generate(request()).await.unwrap_err();
    assert_eq!((again.code(), again.message()), (Code::AlreadyExists, "request_id \"job:1\" is in use."));

    let start = Instant::now();
    let abort = AbortRequest { request_id: "job:1".into() };
    assert!(client.abort(abort.clone()).await.unwrap().into_inner().aborted);
    let mut last = None;
    while let Some(message) = stream.message().await.unwrap() {
        last = message.finish;
    }
    assert_eq!(last.unwrap().reason(), FinishReason::Aborted);
    until("the worker's run ends", Duration::from_secs(1), || cluster.running() == 0).await;
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(!client.abort(abort).await.unwrap().into_inner().aborted);
    client.generate(request()).await.expect("the id is free again");
}

#[tokio::test]
async fn dropping_the_call_frees_the_worker() {
    let cluster = Cluster::new(Script::endless()).await;
    let mut client = client(&cluster).await;
    let mut streams = Vec::new();
    for _ in 0..16 {
        streams.push(client.generate(text("x")).await.unwrap());
    }
    until("all run", Duration::from_secs(2), || cluster.running() == 16).await;
    drop(streams);
    until("all end", Duration::from_secs(1), || cluster.running() == 0).await;
}

#[tokio::test]
async fn errors_have_the_codes_that_the_service_promises() {
    let cluster = Cluster::new(Script::says("!")).await;
    let tokens = |ids: Vec<u32>| Some(Prompt::Tokens(TokenIds { ids }));
    let sampling = |s: SamplingParams| GenerateRequest { sampling: Some(s), ..text("x") };
    let table = [
        (GenerateRequest::default(), Code::InvalidArgument, "prompt: is not set"),
        (GenerateRequest { prompt: tokens(vec![]), ..text("") }, Code::InvalidArgument, "prompt: is empty"),
        (GenerateRequest { prompt: tokens(vec![999]), ..text("") }, Code::InvalidArgument, "token id 999"),
        (GenerateRequest { model: "gpt".into(), ..text("x") }, Code::NotFound, "\"gpt\" does not exist"),
        (GenerateRequest { request_id: "a b".into(), ..text("x") }, Code::InvalidArgument, "request_id: expected"),
        (GenerateRequest { max_tokens: Some(0), ..text("x") }, Code::InvalidArgument, "max_tokens: is 0"),
        (GenerateRequest { max_tokens: Some(4096), ..text("x") }, Code::InvalidArgument, "at most 4096 tokens"),
        (
            sampling(SamplingParams { temperature: Some(f32::NAN), ..Default::default() }),
            Code::InvalidArgument,
            "temperature: is NaN; expected 0 to 2",
        ),
        (
            sampling(SamplingParams { min_p: f32::NEG_INFINITY, ..Default::default() }),
            Code::InvalidArgument,
            "min_p: is -inf; expected 0 to 1",
        ),
        (text(&"x".repeat(5 << 20)), Code::OutOfRange, "too large"),
    ];
    for (request, code, words) in table {
        let status = generate(&cluster, request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(words), "{:?} does not contain {words:?}", status.message());
    }
    cluster.set_script(Script { refusal: Some(Status::resource_exhausted("full")), ..Script::default() });
    let full = generate(&cluster, text("x")).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    assert_eq!(full.metadata().get("retry-after").unwrap(), "1");
}

#[tokio::test]
async fn lists_models_and_tokenizes() {
    let cluster = Cluster::new(Script::says("!")).await;
    let mut client = client(&cluster).await;
    let models = client.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!((models[0].name.as_str(), models[0].family.as_str()), ("tiny-r1", "deepseek_v3"));
    assert_eq!((models[0].fingerprint.as_str(), models[0].numerics.as_str()), (FINGERPRINT, "f32"));
    let input = Some(tokenize_request::Input::Text("ab".into()));
    let answer = client.tokenize(TokenizeRequest { model: String::new(), input }).await.unwrap();
    assert_eq!(answer.into_inner().ids, [113, 114]);
}

#[tokio::test]
async fn health_and_reflection_are_on_the_same_port() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};

    let cluster = Cluster::new(Script::says("!")).await;
    let channel = Channel::from_shared(cluster.url.clone()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    let request = HealthCheckRequest { service: "moesaic.v1.Inference".into() };
    let mut news = health.watch(request).await.unwrap().into_inner();
    let serving = async { while news.message().await.unwrap().unwrap().status() != ServingStatus::Serving {} };
    tokio::time::timeout(Duration::from_secs(1), serving).await.expect("serving, as /health says");

    let mut reflection = ServerReflectionClient::new(channel);
    let message_request = Some(MessageRequest::ListServices(String::new()));
    let request = ServerReflectionRequest { message_request, ..Default::default() };
    let mut answers = reflection.server_reflection_info(futures::stream::iter([request])).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services")
    };
    assert!(list.service.iter().any(|service| service.name == "moesaic.v1.Inference"), "{list:?}");
}
