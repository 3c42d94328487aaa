//! The inputs that fuzzing starts from, made with the project's own encoders and fixtures. `tests/tests/corpus.rs` writes
//! them; the rest of the corpus was found.

use std::fs;

use bytes::Bytes;
use moesaic_dispatch::frame::{Activations, Content, Header, Output, Term};
use moesaic_dispatch::nccl::core::{Head, Kind as SlotKind, Load};
use moesaic_dispatch::{AnswerFrame, Refusal, RequestFrame};
use moesaic_kernels::cuda::Split;
use moesaic_node::Member;
use moesaic_node::registry::records::{cordon_key, member_key};
use moesaic_proto::v1::exchange_message::Kind;
use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::lane::What;
use moesaic_proto::v1::tokenize_request::Input;
use moesaic_proto::v1::{
    self, ChatMessage, Conversation, ExchangeMessage, FinishReason, GenerateRequest, Hello, Ping, RefusalReason, Role,
    RunEvent, RunRequest, SamplingParams, TokenIds, TokenInfo, TokenizeRequest, TopLogprob,
};
use moesaic_proto::{Epoch, ExpertId, LayerId, WorkerId};
use prost::Message;
use serde_json::{Value, json};

use super::checkpoint;
use super::frames::{SHAPE, own_hello};
use crate::fixtures;

/// (target, name, input)
pub fn all() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    [frames(), records(), requests(), http(), checkpoint::seeds(), files(), templates(), text()].concat()
}

fn header(flags: u16) -> Header {
    let (epoch, layer) = (Epoch(1), LayerId(1));
    Header { epoch, layer, micro_batch: 1, flags, source: 0, slot: 0, sequence: 5 }
}

fn frames() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let term = |expert, weight| Term::new(ExpertId(expert), weight);
    let content = || Content {
        rows: vec![0, 1],
        outputs: vec![Output::sum(0, 2), Output::single(1), Output::sum(1, 1)],
        terms: vec![term(1, 0.5), term(4, 0.25), term(2, 1.0), term(6, 2.0)],
    };
    let values = [0.5, -1.0, 2.0, 0.0, 1.5, 3.0, -2.0, 1.0];
    let bf16 = values.map(moesaic_kernels::bf16::from_f32).to_vec();
    let request = |x: Activations| RequestFrame::new(header(0), x, SHAPE.hidden, content()).encode(SHAPE.hidden);
    let (f32_frame, bf16_frame) = (request(values.to_vec().into()), request(bf16.into()));
    // Its terms are the choices of both rows, of which experts 1 and 4 are asked.
    let choices = v1::Choices { experts: vec![0b1_0010], top_k: 2, group_size: 4, room: 3 };
    let choices_frame = v1::Frame { outputs: Bytes::new(), choices: Some(choices), ..bf16_frame.clone() };
    let answer = |result| AnswerFrame::new(header(0), result).encode();
    let (rows, refusal) =
        (answer(Ok(values.to_vec().into())), answer(Err(Refusal::new(RefusalReason::Busy, "the inbox is full"))));
    let message = |kind| ExchangeMessage { kind: Some(kind) }.encode_to_vec();
    let hello = Hello { role: Role::AttentionWorker.into(), id: "a0".into(), source: 3, incarnation: 9, ..own_hello() };
    let lane = |what| v1::Lane { generation: 1, what: Some(what) };
    let (requests, answers) = (vec![1; 128], vec![2; 128]);
    let offer = v1::LaneOffer { requests, answers, request_slot_bytes: 8192, answer_slot_bytes: 12_288 };
    let slot = |kind, message: &v1::Frame, rows, back: &[u8]| {
        let message = message.encode_to_vec();
        let load = Load::new(message.len(), rows);
        let head = Head { generation: 1, sequence: 0, kind, load, next: 12_288 }.encode();
        let front = [&head[..], &message].concat();
        [&(front.len() as u16).to_le_bytes(), &front[..], back].concat()
    };
    let (table, room) = (Split::table_bytes(3, 2), 3 * SHAPE.hidden * 2);
    let mut back = vec![0; table];
    back[0] = 2;
    back[Split::CHOICES..][..choices_frame.terms.len()].copy_from_slice(&choices_frame.terms);
    let ahead = v1::Frame { rows: Bytes::new(), terms: Bytes::new(), ..choices_frame.clone() };
    let without_rows = v1::Frame { rows: Bytes::new(), ..bf16_frame.clone() };
    vec![
        ("slot", "frame", slot(SlotKind::Frame, &without_rows, bf16_frame.rows.len(), &[])),
        ("slot", "ahead", slot(SlotKind::Ahead, &ahead, room, &back)),
        ("slot", "warm", [&[28, 0][..], &slot(SlotKind::Warm, &v1::Frame::default(), 0, &[])[2..]].concat()),
        ("exchange", "accepted", message(Kind::Lane(lane(What::Accepted(true))))),
        ("request_frame", "f32", f32_frame.encode_to_vec()),
        ("request_frame", "bf16", bf16_frame.encode_to_vec()),
        ("request_frame", "choices", choices_frame.encode_to_vec()),
        ("experts", "f32", f32_frame.encode_to_vec()),
        ("experts", "bf16", bf16_frame.encode_to_vec()),
        ("experts", "choices", choices_frame.encode_to_vec()),
        ("answer_frame", "rows", rows.encode_to_vec()),
        ("answer_frame", "refusal", refusal.encode_to_vec()),
        ("exchange", "hello", message(Kind::Hello(hello))),
        ("exchange", "ping", message(Kind::Ping(Ping { number: 7 }))),
        ("exchange", "lane", message(Kind::Lane(lane(What::Offer(offer))))),
        ("exchange", "wake", message(Kind::Lane(lane(What::Wake(3))))),
        ("exchange", "request", message(Kind::Frame(bf16_frame))),
        ("exchange", "answer", message(Kind::Frame(rows))),
        ("exchange", "empty-header", message(Kind::Frame(v1::Frame { header: Bytes::new(), ..refusal }))),
    ]
}

fn records() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let holders = |workers: &[u32]| v1::Holders { workers: workers.to_vec() };
    let layer = |layer| v1::LayerPlacement { layer, experts: vec![holders(&[0]), holders(&[0, 1]), holders(&[2, 1])] };
    let placement = v1::Placement {
        epoch: 3,
        workers: vec!["e0".into(), "e1".into(), "e2".into()],
        layers: vec![layer(1), layer(2)],
        term: 4,
        urgent: true,
    };
    let (id, role) = (WorkerId::new("e0").unwrap(), Role::ExpertWorker);
    let member = Member::new(own_hello(), id.clone(), "127.0.0.1:7000".into(), Some("host-1"));
    let entry = |key: &str, value: Vec<u8>| [key.as_bytes(), &[0], &value].concat();
    vec![
        ("placement", "two-layers", placement.encode_to_vec()),
        ("registry", "placement", entry("placement", placement.encode_to_vec())),
        ("registry", "member", entry(&member_key(role, &id), member.to_record().encode_to_vec())),
        ("registry", "leader", entry("leader", v1::LeaderRecord { id: "c0".into() }.encode_to_vec())),
        ("registry", "cordon", entry(&cordon_key(role, &id), v1::Cordon { drain: true }.encode_to_vec())),
    ]
}

fn requests() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let sampling = SamplingParams {
        temperature: Some(0.7),
        top_k: 5,
        top_p: Some(0.9),
        min_p: 0.1,
        repetition_penalty: Some(1.1),
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: [(9, 1.5), (30, -2.0)].into(),
        seed: Some(11),
    };
    let generate = |prompt| GenerateRequest {
        request_id: "r-1".into(),
        model: "tiny-r1".into(),
        prompt: Some(prompt),
        sampling: Some(sampling.clone()),
        max_tokens: Some(9),
        stop: vec!["\n\n".into(), "9".into()],
        stop_token_ids: vec![20],
        logprobs: Some(3),
        prompt_logprobs: Some(0),
        ..Default::default()
    };
    let chat = Conversation { messages: vec![ChatMessage { role: "user".into(), content: "7 + 2".into() }] };
    let prompts = [
        ("tokens", Prompt::Tokens(TokenIds { ids: vec![5, 270, 31] })),
        ("text", Prompt::Text("7 + 2 =".into())),
        ("chat", Prompt::Chat(chat.clone())),
    ];
    let call = |method: u8, message: Vec<u8>| [&[method], &message[..]].concat();
    let mut seeds = Vec::new();
    for (name, prompt) in prompts {
        let message = generate(prompt).encode_to_vec();
        seeds.push(("grpc", name, call(0, message.clone())));
        seeds.push(("generate_request", name, message));
    }
    let tokenize = TokenizeRequest { model: String::new(), input: Some(Input::Chat(chat)) };
    seeds.push(("grpc", "tokenize", call(1, tokenize.encode_to_vec())));
    let info = |token| TokenInfo { token, logprob: Some(-0.5), top: vec![TopLogprob { token, logprob: -0.5 }] };
    let run = RunRequest {
        request_id: "r-1".into(),
        prompt: vec![5, 270, 31],
        sampling: Some(sampling),
        max_tokens: 9,
        stop_token_ids: vec![1, 20],
        logprobs: Some(3),
        emitted: vec![info(40), info(41)],
        ..Default::default()
    };
    seeds.push(("run_request", "emitted", run.encode_to_vec()));
    let event = |position, token, finish: Option<FinishReason>| {
        let finish = finish.map(i32::from);
        RunEvent { position, token: Some(info(token)), finish, ..Default::default() }.encode_length_delimited_to_vec()
    };
    // "ab" is a stop string; tokens 16 and on are bytes.
    let [a, b] = [b'a', b'b'].map(|byte| u32::from(byte) + 16);
    let events = |flags: u8, parts: &[Vec<u8>]| [&[flags][..], &parts.concat()].concat();
    seeds.push((
        "run_events",
        "stop-string",
        events(1, &[event(0, a, None), event(1, a, None), event(2, b, Some(FinishReason::Length))]),
    ));
    seeds.push(("run_events", "stop-token", events(0, &[event(0, a, None), event(1, 20, Some(FinishReason::Stop))])));
    seeds.push(("run_events", "half-a-character", events(6, &[event(0, 0xF0 + 16, None), event(1, 0x9F + 16, None)])));
    seeds
}

fn http() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let post = |path: &str, headers: &str, body: Value| format!("POST {path}\n{headers}\n{body}").into_bytes();
    let chat = json!({
        "model": "tiny-r1", "messages": [{"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "7 + 2"}]}],
        "temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 9, "n": 2, "stop": ["a", "b"], "seed": -1,
        "logprobs": true, "top_logprobs": 2, "stream": true, "stream_options": {"include_usage": true},
        "logit_bias": {"9": 1.5}, "response_format": {"type": "text"}, "chat_template_kwargs": {"enable_thinking": true},
    });
    let resumed = json!({"prompt": ["a", "b"], "stream": true});
    let text = json!({
        "prompt": [[5, 6], [7]], "echo": true, "logprobs": 3, "max_tokens": 0, "top_k": -1, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "stop_token_ids": [20],
        "ignore_eos": true, "prompt_logprobs": 1, "add_special_tokens": true, "tools": [], "best_of": 1, "suffix": null,
    });
    vec![
        ("http", "chat", post("/v1/chat/completions", "", chat.clone())),
        ("http", "completions", post("/v1/completions", "", text)),
        ("http", "resumed", post("/v1/completions", "last-event-id: cmpl-1/ff/3.,4\n", resumed)),
        ("http", "tokenize", post("/tokenize", "", json!({"prompt": "7 + 2", "add_special_tokens": true}))),
        ("http", "tokenize-chat", post("/tokenize", "", json!({"messages": chat["messages"]}))),
        ("http", "detokenize", post("/detokenize", "", json!({"tokens": [270, 31, 0, 288]}))),
        ("http", "models", b"GET /v1/models\n\n".to_vec()),
        ("http", "model", b"GET /v1/models/tiny-r1\n\n".to_vec()),
        ("http", "health", b"GET /health\n\n".to_vec()),
        ("http", "no-path", b"PUT /nowhere\n\n{}".to_vec()),
        ("last_event_id", "two-choices", b"chatcmpl-1:a/ffffffffffffffff/0.,5".to_vec()),
        ("last_event_id", "largest", b"a/0/4294967295".to_vec()),
    ]
}

/// Files of the fixtures, without the white space that people read them by.
fn files() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let small = |model: &str, name: &str| {
        let text = fs::read(fixtures::folder(model).join(name)).unwrap();
        serde_json::to_vec(&serde_json::from_slice::<Value>(&text).unwrap()).unwrap()
    };
    let role = |role: u8, text: &str| [&[role], text.as_bytes()].concat();
    vec![
        ("config_json", "v3", small("v3", "config.json")),
        ("config_json", "v3-fp8", small("v3-fp8", "config.json")),
        ("config_json", "v2", small("v2", "config.json")),
        ("config_json", "v2-lite", small("v2-lite", "config.json")),
        ("tokenizer", "words", json!({
            "version": "1.0", "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
            "model": {"type": "WordLevel", "vocab": {"w0": 0, "Hello": 1, "7": 2}, "unk_token": "w0"},
        }).to_string().into_bytes()),
        ("tokenizer", "byte-level", json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"H": 0, "e": 1, "He": 2, "Ġ": 3, "l": 4}, "merges": [["H", "e"]]},
        }).to_string().into_bytes()),
        ("tokenizer", "pieces", json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["<0x41>", -2.0]],
                "byte_fallback": true},
        }).to_string().into_bytes()),
        ("tokenizer_config", "tiny-r1", small("tiny-r1", "tokenizer_config.json")),
        ("tokenizer_config", "v3", small("v3", "tokenizer_config.json")),
        ("tokenizer_config", "named", json!({
            "bos_token": {"content": "<s>"}, "eos_token": "</s>",
            "chat_template": [{"name": "other", "template": "x"}, {"name": "default", "template": "{{ bos_token }}"}],
        }).to_string().into_bytes()),
        ("generation_config", "tiny-r1", small("tiny-r1", "generation_config.json")),
        ("generation_config", "all", br#"{"eos_token_id":[1,2],"temperature":0.6,"top_p":0.95}"#.to_vec()),
        ("role_config", "coordinator", role(0, "model = 'm'\nlisten = '127.0.0.1:1'\nreplicas = 3\nserved_name = 'x'\n")),
        ("role_config", "attention-worker", role(1, "model = 'm'\ndtype = 'f32'\nmemory = '8GiB'\nthreads = 2\npin = true\n")),
        ("role_config", "expert-worker", role(2, "id = 'e'\nadvertise = 'host:70'\nexpert_slots = 9\nnode = 'n'\n")),
    ]
}

/// What templates in use have, and what would take too long or too much.
fn templates() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let all: [(&str, &str); 12] = [
        (
            "turns",
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m.content | trim }}{% elif m.role == 'assistant' %}<A>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}",
        ),
        (
            "namespace",
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ messages | length }} {{ messages | tojson(indent=2) }}",
        ),
        ("raise", "{{ raise_exception('only ' ~ messages[0].role) }}"),
        (
            "macro",
            "{% macro f(x) %}{% if x > 0 %}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(9) }}{{ strftime_now('%Y') | length }}",
        ),
        ("endless-macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        ("endless-loop", "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"),
        ("repeat", "{{ ('x' * 1000000000) | length }}"),
        ("repeat-overflow", "{{ 'xxxx' * 9223372036854775807 }}"),
        ("repeat-list", "{{ ([1, 2] * 1000000000) | length }}"),
        (
            "doubling",
            "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s | length }}",
        ),
        ("format", "{{ '%999999999d' | format(1) }}{{ 'x'.center(999999999) }}{{ 'x' | indent(999999999) }}"),
        ("nested", "{{ ((((((((((((((((((((((((((((((((((((1)))))))))))))))))))))))))))))))))))) }}"),
    ];
    all.map(|(name, text)| ("chat_template", name, text.as_bytes().to_vec())).into()
}

fn text() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    vec![
        ("stream", "stop", b"\x01\x02\x01\x03\0END\nND\0the EN END".to_vec()),
        ("stream", "reasoning", b"\x09\x05\x09\0\0<think>\n7+2=9\n</think>\n9".to_vec()),
        ("stream", "characters", "\u{1}\u{2}\u{3}\0é\n日本\0a é 日日本".into()),
    ]
}
