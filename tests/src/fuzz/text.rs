//! The coordinator's files, and what it does to text: tokenizer, chat template, defaults of sampling, and the stream of
//! pieces that stop strings and reasoning marks are looked for in.

use std::sync::Arc;
use std::thread;

use moesaic_coordinator::core::Params;
use moesaic_coordinator::model::Model;
use moesaic_coordinator::text::template::Message;
use moesaic_coordinator::text::{ChatTemplate, Detokenizer, ReasoningSplitter, Split, StopMatcher, Tokenizer};

use super::checks::{Folder, check_error};
use super::requests::check_params;
use crate::fixtures;

const MODEL: &str = "tiny-r1";
const PROMPT_BYTES_MAX: usize = 8 << 20;
/// What a thread of the coordinator has.
const STACK_BYTES: usize = 2 << 20;

thread_local! {
    static TOKENIZERS: Folder = Folder::new(&[]);
    static CONFIGS: Folder = Folder::new(&[]);
    static TEMPLATES: Folder = Folder::new(&[]);
    static DEFAULTS: Folder = Folder::of_fixture(MODEL, &["config.json"]);
    static TOKENIZER: Arc<Tokenizer> = Arc::new(Tokenizer::open(&fixtures::folder(MODEL)).unwrap());
}

/// `tokenizer.json`, and text through it both ways.
pub fn tokenizer(data: &[u8]) {
    let opened = TOKENIZERS.with(|folder| {
        folder.put("tokenizer.json", data);
        Tokenizer::open(folder.dir())
    });
    let tokenizer = match opened {
        Ok(tokenizer) => Arc::new(tokenizer),
        Err(error) => return check_error(error),
    };
    let text = "Hello <think>7 + 2 = 9</think> Ünï 日本 🦀\n\u{0}";
    for add_special in [false, true] {
        match tokenizer.encode(text, add_special) {
            Err(error) => check_error(error),
            Ok(ids) => {
                assert_eq!(
                    tokenizer.encode(text, add_special).ok().as_ref(),
                    Some(&ids),
                    "the same text, other tokens"
                );
                let mut detokenizer = Detokenizer::new(tokenizer.clone());
                let pieces: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
                drop((pieces + &detokenizer.finish(), tokenizer.decode(&ids), tokenizer.find_special(text)));
                ids.iter().for_each(|id| drop(tokenizer.bytes_of(*id)));
            }
        }
    }
    assert!(tokenizer.tokens_min(text.len()) <= text.len());
    assert!(tokenizer.encode("", false).unwrap_or_default().is_empty(), "something is added to a text");
}

/// `tokenizer_config.json`, which has a chat template in it.
pub fn tokenizer_config(data: &[u8]) {
    CONFIGS.with(|folder| {
        folder.put("tokenizer_config.json", data);
        check_template(folder);
    });
}

/// `chat_template.jinja`.
pub fn chat_template(data: &[u8]) {
    TEMPLATES.with(|folder| {
        folder.put("chat_template.jinja", data);
        check_template(folder);
    });
}

fn check_template(folder: &Folder) {
    let dir = folder.dir().to_owned();
    let check = move || match ChatTemplate::open(&dir) {
        Err(error) => check_error(error),
        Ok(None) => {}
        Ok(Some(template)) => {
            let message = |role: &str, content: &str| Message {
                role: role.into(),
                content: content.into(),
                name: None,
                reasoning_content: (role == "assistant").then(|| "well".into()),
            };
            let messages = [
                message("system", "Be brief."),
                message("user", "7 + 2 <é>"),
                message("assistant", "9"),
                message("user", "Thanks"),
            ];
            let variables = serde_json::json!({"enable_thinking": true, "messages": "theirs"});
            match template.render(&messages, variables.as_object().unwrap()) {
                Err(error) => check_error(error),
                Ok(prompt) => assert!(prompt.len() <= PROMPT_BYTES_MAX),
            }
        }
    };
    // On a stack of the size that it has in the product.
    thread::Builder::new().stack_size(STACK_BYTES).spawn(check).unwrap().join().unwrap();
}

/// `generation_config.json`: with its defaults, a request that says nothing runs on a worker.
pub fn generation_config(data: &[u8]) {
    let opened = DEFAULTS.with(|folder| {
        folder.put("generation_config.json", data);
        Model::open(folder.dir(), None)
    });
    match opened {
        Err(error) => check_error(error),
        Ok(model) => {
            let config = moesaic_model::Config::read(&fixtures::folder(MODEL)).unwrap();
            check_params(&Params::default(), vec![5, 6], &model, &config);
        }
    }
}

/// Three parts with a zero byte between: where to cut (a byte: the next piece's length), stop strings (one a line), text.
/// How a text is cut changes nothing.
pub fn stream(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0);
    let (Some(cuts), Some(stops), Some(text)) = (parts.next(), parts.next(), parts.next()) else { return };
    let (stops, text) = (String::from_utf8_lossy(stops), String::from_utf8_lossy(text));
    let stops: Vec<String> = stops.lines().filter(|stop| !stop.is_empty()).take(16).map(str::to_owned).collect();
    let pieces = pieces(&text, cuts);

    let (whole, matched) = stopped(&stops, [&*text]);
    assert_eq!(stopped(&stops, pieces.iter().copied()), (whole.clone(), matched));
    match matched {
        None => {
            assert_eq!(whole, text);
            assert!(stops.iter().all(|stop| !text.contains(stop.as_str())));
        }
        Some(stop) => {
            assert!(text[whole.len()..].starts_with(stops[stop].as_str()) && text.starts_with(&whole));
            assert!(stops.iter().all(|stop| !whole.contains(stop.as_str())));
        }
    }
    for opened in [false, true] {
        let (reasoning, answer) = split(opened, [&*text]);
        assert_eq!(split(opened, pieces.iter().copied()), (reasoning.clone(), answer.clone()));
        assert!(reasoning.len() + answer.len() <= text.len());
        assert!(opened || !reasoning.contains("</think>"));
    }
    TOKENIZER.with(|tokenizer| {
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        // Any bytes are tokens of something.
        let ids: Vec<u32> = cuts.iter().map(|byte| u32::from(*byte) + 16).collect();
        let mut detokenizer = Detokenizer::new(tokenizer.clone());
        let text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        assert_eq!(text + &detokenizer.finish(), tokenizer.decode(&ids));
    });
}

fn pieces<'a>(mut text: &'a str, cuts: &[u8]) -> Vec<&'a str> {
    let mut pieces = Vec::new();
    for cut in cuts {
        let at = text.ceil_char_boundary(usize::from(*cut).min(text.len()));
        let (piece, rest) = text.split_at(at);
        pieces.push(piece);
        text = rest;
    }
    pieces.push(text);
    pieces
}

fn stopped<'a>(stops: &[String], pieces: impl IntoIterator<Item = &'a str>) -> (String, Option<usize>) {
    let mut matcher = StopMatcher::new(stops.to_vec());
    let mut text = String::new();
    for piece in pieces {
        let emitted = matcher.push(piece);
        text.push_str(&emitted.text);
        if emitted.matched.is_some() {
            return (text, emitted.matched);
        }
    }
    (text + &matcher.finish(), None)
}

fn split<'a>(opened: bool, pieces: impl IntoIterator<Item = &'a str>) -> (String, String) {
    let mut splitter = ReasoningSplitter::new(opened);
    let (mut reasoning, mut answer) = (String::new(), String::new());
    let mut add = |split: Split| {
        reasoning.push_str(&split.reasoning);
        answer.push_str(&split.answer);
    };
    pieces.into_iter().for_each(|piece| add(splitter.push(piece)));
    add(splitter.finish());
    (reasoning, answer)
}
