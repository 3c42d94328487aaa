//! /v1/completions as a stream of server-sent events, with the last event's id to go on from.

use serde::Deserialize;

use super::client::{Break, Stream, chain, silent};
use super::judge::Piece;

/// One event: its fields, as far as they matter.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    pub data: String,
}

/// Bytes to events.
#[derive(Debug, Default)]
pub struct Events {
    bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    error: Option<ErrorDetail>,
}

#[derive(Deserialize)]
struct Choice {
    text: String,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct ErrorDetail {
    message: String,
    code: Option<String>,
}

impl Events {
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole one. Comments alone, which keep a connection alive, are none.
    pub fn pop(&mut self) -> Option<Event> {
        loop {
            let end = self.bytes.windows(2).position(|two| two == b"\n\n")?;
            let block: Vec<u8> = self.bytes.drain(..end + 2).collect();
            let mut event = Event::default();
            for line in String::from_utf8_lossy(&block).lines() {
                match line.split_once(':').map(|(field, value)| (field, value.trim_start())) {
                    Some(("id", value)) => event.id = value.to_owned(),
                    Some(("data", value)) => event.data.push_str(value),
                    _ => {}
                }
            }
            if !event.data.is_empty() {
                return Some(event);
            }
        }
    }
}

pub async fn read(stream: &mut Stream<'_>, door: usize) -> Result<(), Break> {
    let doors = stream.doors;
    let url = format!("{}/v1/completions", doors.urls[door % doors.urls.len()]);
    let mut call = doors.http.post(url).json(&stream.request.http());
    match stream.history.arrivals.last().map(|arrival| &arrival.piece) {
        Some(Piece::Text { event, .. }) if !event.is_empty() => call = call.header("last-event-id", event),
        _ => {}
    }
    let mut answer = call.send().await.map_err(|error| gone(&error))?;
    if answer.status() != 200 {
        let (status, retry_after) = (answer.status().as_u16(), answer.headers().contains_key("retry-after"));
        let body = answer.bytes().await.unwrap_or_default();
        return Err(refused(status, retry_after, &body));
    }
    stream.begun = true;
    let mut events = Events::default();
    let mut finished = false;
    while let Some(bytes) = answer.chunk().await.map_err(|error| gone(&error))? {
        events.push(&bytes);
        while let Some(event) = events.pop() {
            match event.data.as_str() {
                "[DONE]" if finished => return Ok(()),
                "[DONE]" => return Err(Break::Failed("the stream ended without a finish".into())),
                data => finished |= take(stream, data, event.id)?,
            }
        }
    }
    Err(Break::Gone("the stream broke off".into()))
}

/// True if it has the answer's end.
fn take(stream: &mut Stream<'_>, data: &str, event: String) -> Result<bool, Break> {
    let chunk: Chunk = serde_json::from_str(data).map_err(|error| Break::Failed(format!("{error}: {data}")))?;
    if let Some(error) = chunk.error {
        return Err(match error.code.as_deref() {
            Some("unavailable") => Break::Unavailable(error.message),
            _ => Break::Failed(error.message),
        });
    }
    let Some(choice) = chunk.choices.into_iter().next() else { return Ok(false) };
    stream.arrive(Piece::Text { event, text: choice.text });
    match choice.finish_reason.as_deref() {
        None => Ok(false),
        Some("length") => Ok(true),
        Some(other) => Err(Break::Failed(format!("it ended with {other}"))),
    }
}

fn refused(status: u16, has_retry_after: bool, body: &[u8]) -> Break {
    let error = serde_json::from_slice::<Chunk>(body).ok().and_then(|chunk| chunk.error);
    let text = error.map_or_else(|| String::from_utf8_lossy(body).into_owned(), |error| error.message);
    match status {
        429 => Break::Full(has_retry_after),
        503 => Break::Unavailable(text),
        _ => Break::Failed(format!("{status}: {text}")),
    }
}

fn gone(error: &reqwest::Error) -> Break {
    if error.is_timeout() && !error.is_connect() { silent() } else { Break::Gone(chain(error)) }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::faults::client::{Doors, Policy};
    use crate::faults::judge::{Answer, End};
    use crate::faults::requests::request;

    /// Reads one call up to the end of its body, and says it.
    async fn call(listener: &TcpListener) -> (TcpStream, String) {
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut text = String::new();
        while !text.ends_with('}') {
            let mut bytes = [0; 4096];
            let read = connection.read(&mut bytes).await.unwrap();
            text.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
        (connection, text.to_lowercase())
    }

    fn event(id: &str, text: &str, finish: &str) -> String {
        format!("id: {id}\ndata: {{\"choices\": [{{\"text\": \"{text}\", \"finish_reason\": {finish}}}]}}\n\n")
    }

    #[tokio::test]
    async fn it_goes_on_after_the_last_event() {
        let listeners =
            [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap()];
        let urls = listeners.iter().map(|listener| format!("http://{}", listener.local_addr().unwrap())).collect();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9999\r\n\r\n";
        let serve = async {
            let (mut connection, text) = call(&listeners[0]).await;
            assert!(!text.contains("last-event-id"), "{text}");
            let events = event("x-0", "one", "null") + &event("x-1", " two", "null");
            connection.write_all(format!("{head}{events}").as_bytes()).await.unwrap();
            drop(connection);
            let (mut connection, text) = call(&listeners[1]).await;
            assert!(text.contains("last-event-id: x-1\r\n"), "{text}");
            let events = event("x-2", " three", "\"length\"") + "data: [DONE]\n\n";
            connection.write_all(format!("{head}{events}").as_bytes()).await.unwrap();
            connection
        };
        let (doors, request) = (Doors::new(urls).unwrap(), request(7, 4, 3));
        let (history, _connection) = tokio::join!(doors.ask(&request, 0, Policy::Firm), serve);
        assert_eq!(history.end, End::Finished);
        assert_eq!((history.answer(), history.resumed), ((Answer::Text("one two three".into()), 0), 1));
    }

    #[test]
    fn events_come_in_any_pieces() {
        let text = ": hello\n\nid: a-1\ndata: {\"x\": 1}\n\ndata: [DONE]\n\n";
        let event = |id: &str, data: &str| Event { id: id.into(), data: data.into() };
        for size in 1..text.len() {
            let mut events = Events::default();
            let mut seen = Vec::new();
            for bytes in text.as_bytes().chunks(size) {
                events.push(bytes);
                seen.extend(std::iter::from_fn(|| events.pop()));
            }
            assert_eq!(seen, [event("a-1", "{\"x\": 1}"), event("", "[DONE]")]);
        }
    }
}
