//! What an OpenAI client sees when all goes well.

use crate::cluster::{Cluster, EOS, Script, ids, user};
use moesaic_proto::v1::SamplingParams;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn joined(chunks: &[Value], index: u64, field: &str) -> String {
    let of_choice = chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == index);
    of_choice.filter_map(|c| c["delta"][field].as_str().or(c[field].as_str())).collect()
}

#[tokio::test]
async fn chat_answers_with_reasoning_and_usage() {
    let cluster = Cluster::new(Script::says("<think>\n1+1=2\n</think>\n2")).await;
    let (status, answer) = cluster.post(CHAT, json!({"model": "tiny-r1", "messages": user("1+1=")})).await;
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    let message = json!({"role": "assistant", "content": "2", "reasoning_content": "1+1=2"});
    assert_eq!(choice["message"], message);
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("stop"), &Value::Null));
    // A token for each byte and mark, and the end of sentence.
    assert_eq!(answer["usage"], json!({"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["system_fingerprint"], "fp_0123456789ab_f32");

    let run = cluster.last_run();
    assert_eq!(run.prompt, ids("<｜begin▁of▁sentence｜><｜User｜>1+1=<｜Assistant｜>"));
    assert_eq!((run.stop_token_ids, run.max_tokens), (vec![EOS], 64 * crate::cluster::PAGES - 7));
    let hello = run.hello.unwrap();
    assert_eq!((hello.fingerprint.as_str(), hello.numerics.as_str()), (crate::cluster::FINGERPRINT, ""));
}

#[tokio::test]
async fn chat_streams_what_it_would_answer() {
    let cluster = Cluster::new(Script::says("<think>\n1é\n</think>\n🦀!")).await;
    let body = json!({"messages": user("x"), "stream_options": {"include_usage": true}});
    let (chunks, done) = cluster.stream(CHAT, body).await;
    assert!(done);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(joined(&chunks, 0, "reasoning_content"), "1é");
    assert_eq!(joined(&chunks, 0, "content"), "🦀!");
    let (usage, rest) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], json!({"prompt_tokens": 4, "completion_tokens": 14, "total_tokens": 18}));
    assert!(rest.iter().all(|chunk| chunk["usage"].is_null() && chunk["object"] == "chat.completion.chunk"));
    assert_eq!(rest.last().unwrap()["choices"][0]["finish_reason"], "stop");
    let finishes = rest.iter().filter(|chunk| !chunk["choices"][0]["finish_reason"].is_null());
    assert_eq!(finishes.count(), 1);

    let (chunks, _) = cluster.stream(CHAT, json!({"messages": user("x")})).await;
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
}

#[tokio::test]
async fn chat_logprobs_have_exact_bytes() {
    let cluster = Cluster::new(Script::says("aé")).await;
    let body = json!({"messages": user("x"), "logprobs": true, "top_logprobs": 2});
    let (_, answer) = cluster.post(CHAT, body.clone()).await;
    let content = &answer["choices"][0]["logprobs"]["content"];
    let top = json!([{"token": "a", "logprob": -0.25, "bytes": [97]}, {"token": "b", "logprob": -1.25, "bytes": [98]}]);
    assert_eq!(content[0], json!({"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": top}));
    assert_eq!((&content[1]["token"], &content[1]["bytes"]), (&json!("\u{FFFD}"), &json!([0xC3])));
    assert_eq!(content.as_array().unwrap().len(), 3, "without the end of sentence");

    let (chunks, _) = cluster.stream(CHAT, body).await;
    let streamed = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(streamed.collect::<Vec<_>>(), content.as_array().unwrap().iter().collect::<Vec<_>>());
}

#[tokio::test]
async fn choices_have_their_own_seeds_and_indices() {
    let cluster = Cluster::new(Script::says("hi")).await;
    let body = json!({"messages": user("x"), "n": 3, "seed": 7});
    let (_, answer) = cluster.post(CHAT, body.clone()).await;
    let indices: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|c| c["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_eq!(answer["usage"]["completion_tokens"], 9);
    let seeds = || {
        let mut runs = std::mem::take(&mut *cluster.workers[0].requests.lock().unwrap());
        runs.sort_by(|a, b| a.request_id.cmp(&b.request_id));
        runs.into_iter().map(|run| run.sampling.unwrap().seed.unwrap()).collect::<Vec<_>>()
    };
    let first = seeds();
    assert!(first[0] == 7 && first[1] != first[2] && first[1] != 7);
    let (chunks, done) = cluster.stream(CHAT, body).await;
    assert!(done && (0..3).all(|index| joined(&chunks, index, "content") == "hi"));
    assert_eq!(seeds(), first, "the same request has the same seeds");
}

#[tokio::test]
async fn parameters_arrive_and_nulls_are_not_given() {
    let cluster = Cluster::new(Script::says("x")).await;
    let body = json!({
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": 1,
        "frequency_penalty": -1, "logit_bias": {"65": -100}, "seed": -1, "max_completion_tokens": 9, "max_tokens": 3,
        "ignore_eos": true, "stop": null, "n": null, "stream": null, "tools": null, "user": "u", "metadata": {"a": 1},
        "response_format": {"type": "text"}, "unheard_of": 1,
    });
    let (status, answer) = cluster.post(CHAT, body).await;
    assert_eq!(status, 500, "the script ends before the ninth token, and ignores no end: {answer}");
    let run = cluster.last_run();
    let expected = SamplingParams {
        temperature: Some(0.5),
        top_k: 5,
        top_p: Some(0.5),
        min_p: 0.25,
        repetition_penalty: Some(1.5),
        presence_penalty: 1.0,
        frequency_penalty: -1.0,
        logit_bias: [(65, -100.0)].into(),
        seed: Some(u64::MAX),
    };
    assert_eq!((run.sampling, run.max_tokens, run.stop_token_ids), (Some(expected), 9, vec![]));
    assert_eq!(run.prompt, ids("<｜begin▁of▁sentence｜>a\nb<｜Assistant｜>"));
}

#[tokio::test]
async fn a_stop_string_ends_text_and_worker() {
    let cluster = Cluster::new(Script { pause: std::time::Duration::ZERO, ..Script::endless() }).await;
    cluster.set_script(Script { tokens: ids("one two three"), endless: true, ..Script::default() });
    let (_, answer) = cluster.post(TEXT, json!({"prompt": "x", "stop": [" thr", "zz"], "max_tokens": 900})).await;
    assert_eq!(answer["choices"][0]["text"], "one two");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 11);
    crate::cluster::until("the worker's run ends", std::time::Duration::from_secs(1), || cluster.running() == 0).await;
}

#[tokio::test]
async fn completions_take_all_kinds_of_prompts() {
    let cluster = Cluster::new(Script::says("!")).await;
    let table = [(json!("ab"), 1), (json!(["ab", "c"]), 2), (json!([81, 82]), 1), (json!([[81], [82, 83]]), 2)];
    for (prompt, count) in table {
        let (status, answer) = cluster.post(TEXT, json!({"prompt": prompt, "n": 2})).await;
        assert_eq!(status, 200, "{answer}");
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * count, "{prompt}");
        assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i && c["text"] == "!"));
    }
    assert_eq!(cluster.post("/tokenize", json!({"prompt": "ab"})).await.1["tokens"], json!([113, 114]));
}

#[tokio::test]
async fn echo_gives_the_prompt_and_its_logprobs() {
    let cluster = Cluster::new(Script::says("cd")).await;
    let body = json!({"prompt": "aé", "echo": true, "logprobs": 1, "max_tokens": 2});
    let (_, answer) = cluster.post(TEXT, body.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("aécd"), &json!("length")));
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "bytes:\\xc3", "bytes:\\xa9", "c", "d"]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.25, -0.25, -0.25, -0.25]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][3], json!({"c": -0.25}));

    let (chunks, _) = cluster.stream(TEXT, body).await;
    assert_eq!(joined(&chunks, 0, "text"), "aécd");
    let tokens = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["tokens"].as_array()).flatten();
    assert_eq!(tokens.count(), 5);

    let (_, answer) = cluster.post(TEXT, json!({"prompt": "ab", "echo": true, "logprobs": 0, "max_tokens": 0})).await;
    assert_eq!(answer["choices"][0]["text"], "ab");
    assert_eq!(answer["choices"][0]["logprobs"]["token_logprobs"], json!([null, -0.25]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn prompt_logprobs_by_token_id() {
    let cluster = Cluster::new(Script::says("!")).await;
    let (_, answer) = cluster.post(TEXT, json!({"prompt": "ab", "prompt_logprobs": 1})).await;
    let expected = json!([null, {"114": {"logprob": -0.25, "decoded_token": "b"}}]);
    assert_eq!(answer["choices"][0]["prompt_logprobs"], expected);
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn models_and_tokens() {
    let cluster = Cluster::new(Script::says("!")).await;
    let card = json!({"id": "tiny-r1", "object": "model", "created": 0, "owned_by": "moesaic", "max_model_len": 4096});
    assert_eq!(cluster.get("/v1/models").await, (200, json!({"object": "list", "data": [card]})));
    assert_eq!(cluster.get("/v1/models/tiny-r1").await, (200, card));
    let (_, chat) = cluster.post("/tokenize", json!({"messages": user("é")})).await;
    assert_eq!(chat, json!({"count": 5, "max_model_len": 4096, "tokens": [0, 3, 16 + 0xC3, 16 + 0xA9, 4]}));
    let (_, text) = cluster.post("/detokenize", json!({"tokens": chat["tokens"]})).await;
    assert_eq!(text, json!({"prompt": "é"}));
}
