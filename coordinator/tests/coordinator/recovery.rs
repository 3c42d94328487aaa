//! Workers that are lost, and clients that come back: each position once, in order, and the same text.

use std::time::Duration;

use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::inference_client::InferenceClient;
use moesaic_proto::v1::{GenerateRequest, GenerateResponse, SamplingParams};
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::cluster::{Cluster, FINGERPRINT, Script, ids, until};

const TEXT: &str = "/v1/completions";
const SAYS: &str = "0123456789";

fn slowly() -> Script {
    Script { pause: Duration::from_millis(10), ..Script::says(SAYS) }
}

/// A cluster of two, of which the first one takes the first sequence.
async fn pair(first: Script) -> Cluster {
    let mut cluster = Cluster::new(first).await;
    cluster.add_worker("a-1", FINGERPRINT, Script::says(SAYS)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster
}

fn text(chunks: &[Value]) -> String {
    chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_sequence_that_loses_its_worker_goes_on_on_another_one() {
    for status in [Status::unavailable("the engine has stopped"), Status::unavailable("")] {
        let cluster = pair(Script { failure: Some((4, status)), ..Script::says(SAYS) }).await;
        let body = json!({"prompt": "x", "seed": 7, "temperature": 0.5, "max_tokens": 20});
        let (chunks, done) = cluster.stream(TEXT, body.clone()).await;
        assert!(done);
        assert_eq!(text(&chunks), SAYS);
        let run = cluster.workers[1].requests.lock().unwrap().pop().unwrap();
        let emitted: Vec<u32> = run.emitted.iter().map(|info| info.token).collect();
        assert_eq!((emitted, run.max_tokens), (ids("0123"), 20));
        assert_eq!(run.sampling.unwrap().seed, Some(7));
        assert_eq!(cluster.get("/health").await.1["sequences"], 0);
    }
}

#[tokio::test]
async fn a_sequence_waits_for_a_worker_where_there_is_none() {
    let gone = Status::unavailable("gone");
    let mut cluster = Cluster::new(Script { failure: Some((4, gone.clone())), ..slowly() }).await;
    let (client, url) = (cluster.client.clone(), format!("{}{TEXT}", cluster.url));
    let body = json!({"prompt": "x", "stream": true}).to_string();
    let answer = tokio::spawn(async move { client.post(url).body(body).send().await.unwrap().text().await.unwrap() });
    until("it runs", Duration::from_secs(2), || cluster.running() == 1).await;
    cluster.set_script(Script { refusal: Some(gone), ..Script::default() });
    until("it is lost", Duration::from_secs(2), || cluster.workers[0].requests.lock().unwrap().len() > 2).await;
    cluster.add_worker("a-1", FINGERPRINT, Script::says(SAYS)).await;
    let answer = tokio::time::timeout(Duration::from_secs(5), answer).await.expect("it goes on").unwrap();
    let chunks = events(&answer).into_iter().filter_map(|(_, data)| serde_json::from_str(&data).ok());
    assert_eq!(text(&chunks.collect::<Vec<_>>()), SAYS);
}

#[tokio::test]
async fn a_worker_that_stutters_or_leaves_a_token_out_is_not_believed() {
    let stutters = pair(Script { stutters: true, ..Script::says(SAYS) }).await;
    let (chunks, done) = stutters.stream(TEXT, json!({"prompt": "x"})).await;
    assert_eq!((text(&chunks).as_str(), done), (SAYS, true));
    assert!(stutters.workers[1].requests.lock().unwrap().is_empty(), "what is known is no reason to leave");

    let skips = pair(Script { skips: Some(3), ..Script::says(SAYS) }).await;
    let (chunks, done) = skips.stream(TEXT, json!({"prompt": "x"})).await;
    assert_eq!((text(&chunks).as_str(), done), (SAYS, true));
    assert_eq!(skips.workers[1].requests.lock().unwrap()[0].emitted.len(), 3);
}

#[tokio::test]
async fn what_cannot_be_helped_elsewhere_ends_the_request() {
    for (status, expected) in [
        (Status::deadline_exceeded("layer 3, expert 5: no holder"), 503),
        (Status::aborted("the sequence was resumed by another call"), 503),
        (Status::internal("broken"), 500),
        (Status::invalid_argument("no"), 500),
    ] {
        let cluster = pair(Script { failure: Some((4, status)), ..Script::says(SAYS) }).await;
        let (status, answer) = cluster.post(TEXT, json!({"prompt": "x"})).await;
        assert_eq!(status, expected, "{answer}");
        assert!(cluster.workers[1].requests.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_worker_is_told_what_nobody_waits_for() {
    let cluster = Cluster::new(Script::endless()).await;
    let stream = cluster.send(TEXT, json!({"prompt": "x", "stream": true, "max_tokens": 1000})).await;
    until("it runs", Duration::from_secs(2), || cluster.running() == 1).await;
    drop(stream);
    until("it is forgotten", Duration::from_secs(1), || {
        let (aborted, id) = (cluster.workers[0].aborted.lock().unwrap().clone(), cluster.last_run().request_id);
        aborted == [id] && cluster.running() == 0
    })
    .await;
    // One that has ended needs no word.
    cluster.set_script(Script::says("!"));
    cluster.post(TEXT, json!({"prompt": "x"})).await;
    assert_eq!(cluster.workers[0].aborted.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_coordinator_that_stops_leaves_what_it_could_not_finish_to_another_one() {
    let cluster = Cluster::new(Script::endless()).await;
    let cut = cluster.send(TEXT, json!({"prompt": "x", "stream": true, "max_tokens": 2000})).await;
    until("it runs", Duration::from_secs(2), || cluster.running() == 1).await;
    cluster.stop.cancel();
    // drain_seconds is 2; the request would take 10 s.
    tokio::time::timeout(Duration::from_secs(4), cluster.serving).await.expect("it ends").unwrap().unwrap();
    drop(cut);
    assert!(cluster.workers[0].aborted.lock().unwrap().is_empty());
}

async fn generate(cluster: &Cluster, request: GenerateRequest) -> Result<Vec<GenerateResponse>, Status> {
    let mut client = InferenceClient::connect(cluster.url.clone()).await.unwrap();
    let mut stream = client.generate(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(part) = stream.message().await? {
        all.push(part);
    }
    Ok(all)
}

fn tokens(parts: &[GenerateResponse]) -> Vec<u32> {
    parts.iter().flat_map(|part| &part.tokens).map(|info| info.token).collect()
}

#[tokio::test]
async fn a_request_is_resumed_over_grpc_from_any_position_whether_it_still_runs_or_not() {
    for resumes in [false, true] {
        let cluster = Cluster::new(Script { resumes, ..Script::says(SAYS) }).await;
        let prompt = Some(Prompt::Text("x".into()));
        let request = GenerateRequest { request_id: "r".into(), prompt, ..Default::default() };
        let whole = generate(&cluster, request.clone()).await.unwrap();
        let seed = whole[0].seed;
        assert!(seed.is_some());
        for position in 0..10 {
            let sampling = Some(moesaic_proto::v1::SamplingParams { seed, ..Default::default() });
            let resumed = GenerateRequest { resume_position: Some(position), sampling, ..request.clone() };
            let rest = generate(&cluster, resumed).await.unwrap();
            assert_eq!(rest[0].position, position);
            assert_eq!(tokens(&rest), tokens(&whole)[position as usize..]);
            assert_eq!(rest.last().unwrap().finish, whole.last().unwrap().finish);
            assert_eq!(cluster.last_run().sampling.unwrap().seed, seed);
            assert_eq!(cluster.last_run().resume, resumes, "it is taken over where it runs");
        }
    }
}

#[tokio::test]
async fn a_resumed_request_takes_the_place_of_its_old_stream() {
    let cluster = Cluster::new(Script { resumes: true, ..slowly() }).await;
    let prompt = Some(Prompt::Text("x".into()));
    let request = GenerateRequest { request_id: "r".into(), prompt, ..Default::default() };
    let mut client = InferenceClient::connect(cluster.url.clone()).await.unwrap();
    let mut old = client.generate(request.clone()).await.unwrap().into_inner();
    let first = old.message().await.unwrap().unwrap();
    let again = generate(&cluster, request.clone()).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let resumed = generate(&cluster, GenerateRequest { resume_position: Some(1), ..request }).await.unwrap();
    assert_eq!([tokens(&[first]), tokens(&resumed)].concat(), [ids(SAYS), vec![1]].concat());
    assert!(cluster.workers[0].aborted.lock().unwrap().is_empty(), "what goes on is not aborted");
    until("nothing runs", Duration::from_secs(1), || cluster.running() == 0).await;
}

#[tokio::test]
async fn what_cannot_be_resumed_is_refused_with_the_field() {
    let cluster = Cluster::new(Script::says(SAYS)).await;
    let request = GenerateRequest { prompt: Some(Prompt::Text("x".into())), ..Default::default() };
    let status = generate(&cluster, GenerateRequest { resume_position: Some(1), ..request }).await.unwrap_err();
    assert_eq!((status.code(), status.message().starts_with("request_id: is empty")), (Code::InvalidArgument, true));
    for (last, stream, words) in [
        ("nonsense", true, "Last-Event-ID: is not the id of an event"),
        ("r/1/4294967295.", true, "Last-Event-ID: has a choice of 4294967295 tokens; the model's context has 4096"),
        ("r/1/0", false, "Last-Event-ID: is set; only a stream"),
        ("r/1/0,0", true, "is of a request with 2 choices; this one has 1"),
    ] {
        let body = json!({"prompt": "x", "stream": stream});
        let (status, answer) = resume(&cluster, body, last).await;
        assert_eq!(status, 400);
        assert!(answer.contains(words), "{answer}");
    }
}

async fn resume(cluster: &Cluster, body: Value, last: &str) -> (u16, String) {
    let request = cluster.client.post(format!("{}{TEXT}", cluster.url)).header("last-event-id", last);
    let response = request.header("content-type", "application/json").body(body.to_string()).send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

/// The ids and the data of a stream's events.
fn events(text: &str) -> Vec<(String, String)> {
    let field = |event: &str, name: &str| {
        let found = event.lines().find_map(|line| line.strip_prefix(name).map(|value| value.trim().to_owned()));
        found.unwrap_or_default()
    };
    text.split("\n\n").filter(|event| !event.is_empty()).map(|e| (field(e, "id:"), field(e, "data:"))).collect()
}

/// From the id of any event on, on a coordinator that has never heard of the request, come just the events after it.
#[tokio::test]
async fn a_stream_of_two_choices_is_resumed_over_http_after_any_event() {
    let cluster = Cluster::new(Script::says(SAYS)).await;
    let body = json!({"prompt": "x", "stream": true, "n": 2, "stop": ["6"], "stream_options": {"include_usage": true}});
    let whole = events(&cluster.send(TEXT, body.clone()).await.text().await.unwrap());
    let elsewhere = Cluster::new(Script::says(SAYS)).await;
    for (after, (id, _)) in whole.iter().enumerate().filter(|(_, (id, _))| !id.is_empty()) {
        let (status, rest) = resume(&elsewhere, body.clone(), id).await;
        assert_eq!(status, 200, "{rest}");
        let rest = events(&rest);
        let by_choice = |events: &[(String, String)], choice: u64| {
            let chunks = events.iter().filter_map(|(_, data)| serde_json::from_str::<Value>(data).ok());
            let own = chunks.filter(move |chunk| chunk["choices"][0]["index"] == choice);
            let of = |chunk: Value| (chunk["choices"][0]["text"].clone(), chunk["choices"][0]["finish_reason"].clone());
            own.map(of).collect::<Vec<_>>()
        };
        for choice in 0..2 {
            assert_eq!(by_choice(&rest, choice), by_choice(&whole[after + 1..], choice), "choice {choice} after {id}");
        }
        let usage =
            |events: &[(String, String)]| events[events.len() - 2].1.split("\"usage\"").last().unwrap().to_owned();
        assert_eq!((usage(&rest), &rest.last().unwrap().1), (usage(&whole), &"[DONE]".to_owned()));
    }
}

#[tokio::test]
async fn a_request_that_waits_for_a_worker_gives_way_to_its_client() {
    let cluster = Cluster::new(Script { hangs: true, ..Script::default() }).await;
    let mut client = InferenceClient::connect(cluster.url.clone()).await.unwrap();
    let sampling = Some(SamplingParams { seed: Some(7), ..Default::default() });
    let prompt = Some(Prompt::Text("x".into()));
    let request = GenerateRequest { request_id: "r".into(), prompt, sampling, ..Default::default() };
    let (mut left, first) = (client.clone(), request.clone());
    let left = tokio::spawn(async move { left.generate(first).await });
    until("it is asked", Duration::from_secs(2), || !cluster.workers[0].requests.lock().unwrap().is_empty()).await;
    cluster.set_script(Script::says(SAYS));
    let again = GenerateRequest { resume_position: Some(0), ..request };
    let mut answer = client.generate(again).await.unwrap().into_inner();
    let mut text = String::new();
    while let Some(part) = answer.message().await.unwrap() {
        text.push_str(&part.text);
    }
    assert_eq!(text, SAYS);
    assert_eq!(left.await.unwrap().unwrap_err().code(), Code::Unavailable);
}

/// A worker that was out of reach when it was asked for the sequence still has it when it is asked to start it.
#[tokio::test]
async fn a_client_that_comes_back_is_not_refused_because_its_sequence_runs() {
    let cluster = Cluster::new(Script { is_running_it: true, resumes: true, ..Script::says(SAYS) }).await;
    let mut client = InferenceClient::connect(cluster.url.clone()).await.unwrap();
    let sampling = Some(SamplingParams { seed: Some(7), ..Default::default() });
    let (prompt, resume_position) = (Some(Prompt::Text("x".into())), Some(0));
    let request = GenerateRequest { request_id: "r".into(), prompt, sampling, resume_position, ..Default::default() };
    let mut answer = client.generate(request).await.unwrap().into_inner();
    let mut text = String::new();
    while let Some(part) = answer.message().await.unwrap() {
        text.push_str(&part.text);
    }
    assert_eq!(text, SAYS);
    let asked: Vec<bool> = cluster.workers[0].requests.lock().unwrap().iter().map(|run| run.resume).collect();
    assert_eq!(asked, [true, false, true]);
}
