//! What clients say and what they are known by stays out of every node's log.

use std::fs::{self, File};

use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::{GenerateRequest, TokenizeRequest, tokenize_request::Input};
use moesaic_tests::processes::Up;
use moesaic_tests::secured::{INFER_KEY, OPERATE_KEY, STRANGERS_KEY, keys_file};
use serde_json::{Value, json};
use tonic::Request;

const PROMPT: &str = "canary-prompt-3fe1";
const SYSTEM: &str = "canary-system-88d0";
const STOP: &str = "canary-stop-19ab";
/// What the nodes themselves log, in all detail.
const LEVEL: &str = "info,moesaic_coordinator=debug,moesaic_attention_worker=debug,moesaic_expert_worker=debug,\
                     moesaic_node=debug,moesaic_dispatch=debug,moesaic=debug";

/// Requests that are served, refused and wrong.
fn bodies() -> Vec<(&'static str, Value)> {
    let chat = json!([{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]);
    vec![
        ("/v1/chat/completions", json!({"messages": chat, "max_tokens": 4, "stop": STOP})),
        ("/v1/chat/completions", json!({"messages": chat, "max_tokens": 4, "stream": true})),
        ("/v1/chat/completions", json!({"messages": chat, "temperature": PROMPT})),
        ("/v1/chat/completions", json!({"messages": [{"role": PROMPT, "content": SYSTEM}]})),
        ("/v1/completions", json!({"prompt": PROMPT, "max_tokens": 4, "user": SYSTEM})),
        ("/v1/completions", json!({"prompt": PROMPT.repeat(4000)})),
        ("/v1/completions", json!({"prompt": PROMPT, "model": SYSTEM})),
        ("/tokenize", json!({"prompt": PROMPT})),
    ]
}

#[tokio::test]
async fn neither_prompts_nor_keys_are_in_any_log() {
    let dir = tempfile::tempdir().unwrap();
    let (keys, log) = (keys_file(dir.path()), dir.path().join("log"));
    let arguments = ["--processes", "--threads", "1", "--keys", keys.to_str().unwrap()];
    let up = Up::start_logged(&arguments, LEVEL, File::create(&log).unwrap());
    let client = reqwest::Client::new();
    let mut seen = Vec::new();
    for key in [INFER_KEY, OPERATE_KEY, STRANGERS_KEY] {
        for (path, body) in bodies() {
            let request = client.post(format!("{}{path}", up.url())).bearer_auth(key).json(&body);
            let answer = request.send().await.unwrap();
            seen.push(answer.status().as_u16());
            answer.bytes().await.unwrap();
        }
        let mut grpc = up.client().await;
        let keyed = |prompt: Prompt| {
            let generate = GenerateRequest { prompt: Some(prompt), max_tokens: Some(4), ..Default::default() };
            let mut request = Request::new(generate);
            request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
            request
        };
        if let Ok(answer) = grpc.generate(keyed(Prompt::Text(PROMPT.into()))).await {
            let mut stream = answer.into_inner();
            while stream.message().await.unwrap().is_some() {}
        }
        let unkeyed = TokenizeRequest { input: Some(Input::Text(PROMPT.into())), ..Default::default() };
        assert!(grpc.tokenize(unkeyed).await.is_err(), "without a key");
    }
    up.stop();
    for status in [200, 400, 401, 403, 404] {
        assert!(seen.contains(&status), "{status} was among the answers: {seen:?}");
    }

    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().count() > 20 && text.contains("refused"), "the nodes have logged: {text}");
    for canary in [PROMPT, SYSTEM, STOP, INFER_KEY, OPERATE_KEY, STRANGERS_KEY] {
        let line = text.lines().find(|line| line.contains(canary));
        assert_eq!(line, None, "{canary} is in a log");
    }
}
