//! A client of `/v1/completions` that streams: the same load over HTTP/1.0, whose answers end with their connection. It goes
//! on after the last event's id. What an undisturbed cluster has answered first is what it must always answer.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};
use turmoil::net::TcpStream;

use super::clients::{Break, Load, SILENCE_MAX};
use super::net::HTTP_PORT;
use super::site::Site;
use crate::faults::sse::{Event, Events};

/// The server sends a comment every 15 s.
const QUIET_MAX: Duration = Duration::from_secs(20);
const CONNECT_MAX: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(50);
const TOKENS: u32 = 60;
const CALM_REQUESTS: u64 = 2;

/// What has come.
#[derive(Default)]
struct Answer {
    text: String,
    /// The id of the last event.
    last: String,
}

/// Asks until an answer comes that nothing has disturbed.
pub async fn first(site: &Site, load: &Load) -> String {
    loop {
        let mut answer = Answer::default();
        match attempt(site, load, 0, &mut answer).await {
            Ok(()) => return answer.text,
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Asks the same until all is calm, and then some more.
pub async fn run(site: Site, load: Load, expected: String) {
    let mut left = CALM_REQUESTS;
    for number in load.seed as usize.. {
        if site.is_calm.get() {
            if left == 0 {
                return;
            }
            left -= 1;
        }
        match ask(&site, &load, number).await {
            Ok(text) if text == expected => site.journal.count("texts", 1),
            Ok(text) => return site.journal.fail(format!("over HTTP {text:?}; expected {expected:?}")),
            Err(error) => return site.journal.fail(format!("over HTTP: {error}")),
        }
    }
}

async fn ask(site: &Site, load: &Load, first: usize) -> Result<String, String> {
    let mut answer = Answer::default();
    let mut stuck: Option<Instant> = None;
    for door in first.. {
        let before = answer.last.clone();
        let ended = attempt(site, load, door, &mut answer).await;
        if answer.last != before {
            stuck = None;
        }
        let reason = match ended {
            Ok(()) => break,
            Err(Break::Gone(reason)) => reason,
            Err(Break::Unavailable(reason)) if load.is_patient => reason,
            Err(Break::Unavailable(reason) | Break::Failed(reason)) => return Err(reason),
        };
        if stuck.get_or_insert_with(Instant::now).elapsed() > SILENCE_MAX {
            return Err(format!("nobody went on with it: {reason}"));
        }
        site.journal.count("resumed", u64::from(!answer.last.is_empty()));
        sleep(PAUSE).await;
    }
    Ok(answer.text)
}

async fn attempt(site: &Site, load: &Load, door: usize, answer: &mut Answer) -> Result<(), Break> {
    let gone = |error: std::io::Error| Break::Gone(error.to_string());
    let silent = |_| Break::Gone("it says nothing".into());
    let door = load.doors[door % load.doors.len()].as_str();
    let mut stream =
        timeout(CONNECT_MAX, TcpStream::connect((door, HTTP_PORT))).await.map_err(silent)?.map_err(gone)?;
    stream.write_all(call(load.seed, &answer.last).as_bytes()).await.map_err(gone)?;
    let (mut head, mut events) = (Vec::new(), Events::default());
    let mut is_body = false;
    loop {
        let mut bytes = [0; 4096];
        let read = timeout(QUIET_MAX, stream.read(&mut bytes)).await.map_err(silent)?.map_err(gone)?;
        if read == 0 {
            return Err(if is_body { Break::Gone("the stream broke off".into()) } else { refused(&head) });
        }
        match is_body {
            true => events.push(&bytes[..read]),
            false => head.extend_from_slice(&bytes[..read]),
        }
        let end = head.windows(4).position(|four| four == b"\r\n\r\n");
        if let Some(end) = end.filter(|_| !is_body && head.starts_with(b"HTTP/1.0 200")) {
            is_body = true;
            events.push(&head[end + 4..]);
        }
        while let Some(event) = events.pop() {
            if event.data == "[DONE]" {
                return Ok(());
            }
            take(site, event, answer)?;
        }
    }
}

fn call(seed: u64, last: &str) -> String {
    let prompt: Vec<u64> = (0..5).map(|i| 3 + (seed + i * 31) % 280).collect();
    let body = json!({"prompt": prompt, "seed": seed, "max_tokens": TOKENS, "ignore_eos": true, "stream": true});
    let (body, resumes) = (body.to_string(), if last.is_empty() { "" } else { "last-event-id: " });
    let end = if last.is_empty() { "" } else { "\r\n" };
    let head = format!("content-type: application/json\r\ncontent-length: {}\r\n{resumes}{last}{end}", body.len());
    format!("POST /v1/completions HTTP/1.0\r\n{head}\r\n{body}")
}

fn take(site: &Site, event: Event, answer: &mut Answer) -> Result<(), Break> {
    let failed = |error: String| Break::Failed(format!("{error}: {}", event.data));
    let chunk: Value = serde_json::from_str(&event.data).map_err(|error| failed(error.to_string()))?;
    if let Some(error) = chunk.get("error") {
        return Err(match error["code"].as_str() {
            Some("unavailable") => Break::Unavailable(error.to_string()),
            _ => Break::Failed(error.to_string()),
        });
    }
    let text = chunk["choices"][0]["text"].as_str().ok_or_else(|| failed("no text".into()))?;
    answer.text.push_str(text);
    answer.last = event.id;
    site.journal.say(format!("over HTTP {text:?}"));
    match chunk["choices"][0]["finish_reason"].as_str() {
        None | Some("length") => Ok(()),
        Some(other) => Err(Break::Failed(format!("it ended with {other}"))),
    }
}

/// A whole answer that is no stream: an error.
fn refused(answer: &[u8]) -> Break {
    let text = String::from_utf8_lossy(answer).into_owned();
    match text.split(' ').nth(1) {
        None => Break::Gone("no answer".into()),
        Some("503") => Break::Unavailable(text),
        Some(_) => Break::Failed(text),
    }
}
