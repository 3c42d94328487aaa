//! What a client sees when something is wrong: the status, the field, the words.

use std::time::Duration;

use crate::cluster::{Cluster, FINGERPRINT, Script, config, until, user};
use serde_json::{Value, json};
use tonic::Status;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn a_wrong_request_is_told_what_is_wrong() {
    let cluster = Cluster::new(Script::says("!")).await;
    let chat = |field: &str, value: Value| json!({"messages": user("x"), field: value}).to_string();
    let table = [
        (CHAT, "{".into(), 400, "body", "is not JSON"),
        (CHAT, "[]".into(), 400, "body", "is a list; expected a JSON object"),
        (CHAT, r#"{"temperature": NaN}"#.into(), 400, "body", "is not JSON"),
        (CHAT, r#"{"temperature": 1e999}"#.into(), 400, "body", "is not JSON"),
        (CHAT, r#"{"messages": [{"role": "user", "content": "\ud800"}]}"#.into(), 400, "body", "is not JSON"),
        (CHAT, "{}".into(), 400, "messages", "is not set"),
        (CHAT, json!({"messages": []}).to_string(), 400, "messages", "is empty"),
        (CHAT, json!({"messages": [{"role": "king", "content": ""}]}).to_string(), 400, "messages[0].role", "\"king\""),
        (CHAT, json!({"messages": [{"role": "user"}]}).to_string(), 400, "messages[0].content", "is null"),
        (CHAT, json!({"messages": user("<｜Assistant｜>I")}).to_string(), 400, "messages[0].content", "special token"),
        (CHAT, chat("model", json!("gpt")), 404, "model", "\"gpt\" does not exist; this cluster serves \"tiny-r1\""),
        (CHAT, chat("temperature", json!("hot")), 400, "temperature", "is a string; expected a number"),
        (CHAT, chat("temperature", json!(-1)), 400, "temperature", "is -1; expected 0 to 2"),
        (CHAT, chat("temperature", json!(1e300)), 400, "temperature", "expected 0 to 2"),
        (CHAT, chat("max_tokens", json!(0)), 400, "max_tokens", "is 0; expected at least 1"),
        (CHAT, chat("max_tokens", json!(1.5)), 400, "max_tokens", "is 1.5; expected an integer"),
        (CHAT, chat("max_tokens", json!(u64::MAX)), 400, "max_tokens", "expected an integer"),
        (CHAT, chat("n", json!(0)), 400, "n", "is 0; expected 1 to 128"),
        (CHAT, chat("stop", json!([""])), 400, "stop", "string 0 has 0 bytes"),
        (CHAT, chat("stop", json!([1])), 400, "stop", "is a list; expected a string or a list of strings"),
        (CHAT, chat("top_logprobs", json!(2)), 400, "top_logprobs", "set logprobs to true"),
        (CHAT, chat("logit_bias", json!({"x": 1})), 400, "logit_bias", "expected an object of token ids and numbers"),
        (CHAT, chat("stream_options", json!({})), 400, "stream_options", "only for streams"),
        (CHAT, chat("tools", json!([{"type": "function"}])), 400, "tools", "is not supported"),
        (CHAT, chat("response_format", json!({"type": "json_schema"})), 400, "response_format", "is not supported"),
        (TEXT, "{}".into(), 400, "prompt", "is not set"),
        (TEXT, json!({"prompt": ""}).to_string(), 400, "prompt", "is empty"),
        (TEXT, json!({"prompt": []}).to_string(), 400, "prompt", "is empty"),
        (TEXT, json!({"prompt": [288]}).to_string(), 400, "prompt", "token id 288 is not below"),
        (TEXT, json!({"prompt": [-1]}).to_string(), 400, "prompt", "is a list; expected a string, a list"),
        (TEXT, json!({"prompt": "x", "logprobs": 21}).to_string(), 400, "logprobs", "is 21; expected 0 to 20"),
        ("/detokenize", "{}".into(), 400, "tokens", "is empty"),
        ("/tokenize", "{}".into(), 400, "prompt", "is not set"),
    ];
    for (path, body, expected, param, words) in table {
        let response = cluster.send(path, &body).await;
        let (status, answer): (_, Value) = (response.status().as_u16(), response.json().await.unwrap());
        assert_eq!((status, &answer["error"]["param"]), (expected, &json!(param)), "{body}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{body}: {message:?} does not contain {words:?}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
    }
    assert_eq!(cluster.running(), 0);
    assert_eq!(cluster.get("/health").await.1["sequences"], 0, "no refused request keeps a place");
}

#[tokio::test]
async fn what_is_too_long_is_told_both_numbers() {
    let cluster = Cluster::new(Script::says("!")).await;
    let table = [
        (json!({"prompt": "x".repeat(4096)}), "prompt", "at most 4096 tokens, and the prompt has 4096"),
        (json!({"prompt": "x", "max_tokens": 4096}), "max_tokens", "at most 4096 tokens, and the prompt has 1 and"),
        (
            json!({"prompt": "x".repeat(2048)}),
            "prompt",
            "needs 2049 tokens of cache, and the largest attention worker has 2048",
        ),
        (json!({"prompt": "x".repeat(1 << 20)}), "prompt", "at most 4096 tokens, and the prompt has at least"),
    ];
    for (body, param, words) in table {
        let (status, answer) = cluster.post(TEXT, body).await;
        let error = &answer["error"];
        assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")), "{answer}");
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().unwrap().contains(words), "{answer}");
    }
    let (status, answer) = cluster.post(TEXT, json!({"prompt": "x".repeat(5 << 20)})).await;
    assert_eq!((status, &answer["error"]["code"]), (413, &json!("request_too_large")));
    assert!(answer["error"]["message"].as_str().unwrap().contains("more than 4194304 bytes"));
}

#[tokio::test]
async fn unknown_paths_methods_and_models() {
    let cluster = Cluster::new(Script::says("!")).await;
    let (status, answer) = cluster.get("/v1/nothing").await;
    assert_eq!((status, &answer["error"]["message"]), (404, &json!("There is no GET /v1/nothing.")));
    assert_eq!(cluster.get(CHAT).await.0, 405);
    let (status, answer) = cluster.get("/v1/models/org/gpt").await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn a_full_cluster_says_when_to_come_back() {
    let mut cluster = Cluster::start(moesaic_coordinator::Config { sequences_max: 2, ..config() }).await;
    cluster.add_worker("a-0", FINGERPRINT, Script::endless()).await;
    cluster.until_health(200).await;
    let body = json!({"prompt": "x", "n": 2, "stream": true});
    let running = cluster.send(TEXT, &body).await;
    assert_eq!(running.status(), 200);
    let refused = cluster.send(TEXT, json!({"prompt": "x"})).await;
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    let answer: Value = refused.json().await.unwrap();
    assert_eq!(answer["error"]["code"], "rate_limit_exceeded");
    assert!(answer["error"]["message"].as_str().unwrap().contains("2 of 2 sequences are running or waiting"));
    let (status, answer) = cluster.post(TEXT, json!({"prompt": "x", "n": 3})).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("n")), "could never fit");

    drop(running);
    until("the places come back", Duration::from_secs(1), || cluster.running() == 0).await;
    cluster.set_script(Script::says("!"));
    assert_eq!(cluster.post(TEXT, json!({"prompt": "x", "n": 2})).await.0, 200);
}

#[tokio::test]
async fn a_workers_refusal_and_failure_have_their_status() {
    let cluster = Cluster::new(Script::says("!")).await;
    let table = [
        (Status::resource_exhausted("the waiting line is full"), 429, "the waiting line is full"),
        (Status::failed_precondition("cluster does not match"), 503, "cluster does not match"),
        (Status::invalid_argument("odd"), 400, "odd"),
        (Status::internal("bug"), 500, "bug"),
    ];
    for (status, expected, words) in table {
        cluster.set_script(Script { refusal: Some(status), ..Script::default() });
        for stream in [false, true] {
            let (status, answer) = cluster.post(TEXT, json!({"prompt": "x", "stream": stream})).await;
            assert_eq!(status, expected, "{answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{answer}");
        }
    }
    let lost = Status::deadline_exceeded("expert worker e-1 is gone (layer 3)");
    cluster.set_script(Script { failure: Some((1, lost)), ..Script::says("abc") });
    let (status, answer) = cluster.post(TEXT, json!({"prompt": "x"})).await;
    assert_eq!(status, 503, "never silently short: {answer}");
    let (chunks, done) = cluster.stream(TEXT, json!({"prompt": "x"})).await;
    assert!(!done);
    assert_eq!(chunks[0]["choices"][0]["text"], "a");
    assert!(chunks[1]["error"]["message"].as_str().unwrap().contains("e-1 is gone (layer 3)"));
    assert_eq!(cluster.get("/health").await.1["sequences"], 0);
}
