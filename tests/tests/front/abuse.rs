//! Clients that mean harm: connections that say nothing, that never end what they say, floods of streams, of headers and
//! of bodies. Each meets a limit, and honest clients are served as before meanwhile.

use std::io;
use std::time::{Duration, Instant};

use futures::StreamExt;
use moesaic_tests::cluster::{Cluster, Options};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// More than the open files that a shell allows by default have room for, with the server's ends.
const CONNECTIONS: usize = 300;
/// Whoever says nothing, or a little, is gone by then.
const GONE_MAX: Duration = Duration::from_secs(16);
const HONEST_REQUESTS: usize = 40;
/// What machines that do other things too add to a wait.
const NOISE: Duration = Duration::from_millis(250);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
/// GET / on http, by HPACK's static table.
const REQUEST: &[u8] = &[0x82, 0x86, 0x84, 0x41, 0x01, b'x'];

/// From a request to its first token: the wait that 99 of 100 do not exceed.
async fn first_token_p99(url: &str) -> Duration {
    let client = reqwest::Client::new();
    let mut waits = Vec::new();
    for i in 0..HONEST_REQUESTS {
        let body = json!({"prompt": format!("{i} + 1 ="), "max_tokens": 4, "temperature": 0, "stream": true});
        let start = Instant::now();
        let answer = client.post(format!("{url}/v1/completions")).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut stream = answer.bytes_stream();
        stream.next().await.unwrap().unwrap();
        waits.push(start.elapsed());
        while let Some(bytes) = stream.next().await {
            bytes.unwrap();
        }
    }
    waits.sort_unstable();
    waits[HONEST_REQUESTS - 1]
}

async fn connect(url: &str) -> TcpStream {
    TcpStream::connect(url.strip_prefix("http://").unwrap()).await.unwrap()
}

/// Until the server has closed the connection.
async fn closed(stream: &mut TcpStream) {
    let mut bytes = [0; 1024];
    while stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {}
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Reads frames until one of a kind, and gives its payload; None if the connection closes before.
async fn until_frame(stream: &mut TcpStream, wanted: u8) -> Option<Vec<u8>> {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.ok()?;
        if head[3] == wanted {
            return Some(payload);
        }
    }
}

/// What each of them says once a second, after its beginning.
#[derive(Clone, Copy, Debug)]
enum Silent {
    Http1,
    Http2,
    Nothing,
}

async fn silent(url: String, how: Silent) -> (Duration, Silent) {
    let mut stream = connect(&url).await;
    let start = Instant::now();
    let beginning: &[u8] = match how {
        Silent::Http1 => b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        Silent::Http2 => PREFACE,
        Silent::Nothing => b"",
    };
    stream.write_all(beginning).await.unwrap();
    let (mut read, mut write) = stream.split();
    let talk = async {
        loop {
            sleep(Duration::from_secs(1)).await;
            if matches!(how, Silent::Http1) && write.write_all(b"x").await.is_err() {
                return;
            }
        }
    };
    let end = async {
        let mut bytes = [0; 1024];
        while read.read(&mut bytes).await.is_ok_and(|read| read > 0) {}
    };
    tokio::select! {
        () = end => {}
        () = talk => {}
        () = sleep(GONE_MAX * 2) => {}
    }
    (start.elapsed(), how)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_says_nothing_is_sent_away_and_holds_up_nobody() {
    let cluster = Cluster::start(&Options::new("tiny-r1", "f32")).await;
    let before = first_token_p99(&cluster.url).await;
    let mut attackers = JoinSet::new();
    for i in 0..CONNECTIONS {
        let how = [Silent::Http1, Silent::Http2, Silent::Nothing][i % 3];
        attackers.spawn(silent(cluster.url.clone(), how));
    }
    sleep(Duration::from_secs(1)).await;
    let meanwhile = first_token_p99(&cluster.url).await;
    assert!(meanwhile <= before * 2 + NOISE, "first token after {meanwhile:?}; {before:?} before");
    let (longest, how) = attackers.join_all().await.into_iter().max_by_key(|(stay, _)| *stay).unwrap();
    assert!(longest <= GONE_MAX, "a connection ({how:?}) stayed for {longest:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_streams_end_their_connection_alone() {
    let cluster = Cluster::start(&Options::new("tiny-r1", "f32")).await;
    let before = first_token_p99(&cluster.url).await;
    let url = cluster.url.clone();
    let attack = tokio::spawn(async move {
        let mut ended = 0;
        for _ in 0..8 {
            let mut stream = connect(&url).await;
            stream.write_all(PREFACE).await.unwrap();
            let flood = (0..10_000).flat_map(|i| {
                let id = 2 * i + 1;
                [frame(HEADERS, 0x5, id, REQUEST), frame(RST_STREAM, 0, id, &8_u32.to_be_bytes())].concat()
            });
            // It may be closed long before all is written.
            let flood: Vec<u8> = flood.collect();
            let (mut read, mut write) = stream.into_split();
            let writing = tokio::spawn(async move { write.write_all(&flood).await });
            let mut answer = Vec::new();
            let read = timeout(Duration::from_secs(10), read.read_to_end(&mut answer)).await;
            writing.abort();
            // A reset is an end as well.
            ended += usize::from(read.is_ok());
        }
        ended
    });
    let meanwhile = first_token_p99(&cluster.url).await;
    assert_eq!(attack.await.unwrap(), 8, "each flood ends its connection");
    assert!(meanwhile <= before * 2 + NOISE, "first token after {meanwhile:?}; {before:?} before");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_and_bodies_have_bounds() {
    let cluster = Cluster::start(&Options::new("tiny-r1", "f32")).await;
    // HTTP/1.1: too much, and too many.
    for headers in [format!("x: {}\r\n", "y".repeat(128 << 10)), "x: y\r\n".repeat(1000)] {
        let mut stream = connect(&cluster.url).await;
        let request = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = vec![0; 64];
        let read = timeout(GONE_MAX, stream.read(&mut answer)).await.expect("it is answered or closed");
        let answer = String::from_utf8_lossy(&answer[..read.unwrap_or(0)]).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
        timeout(GONE_MAX, closed(&mut stream)).await.expect("and closed");
    }
    // HTTP/2: one header of 60 KB, in the pieces that frames allow.
    let mut stream = connect(&cluster.url).await;
    let literal = [&[0x00, 0x01, b'a', 0x7f, 0xe1, 0xd3, 0x03][..], &vec![b'b'; 60_000]].concat();
    let block = [REQUEST, &literal].concat();
    let mut frames = PREFACE.to_vec();
    let pieces: Vec<&[u8]> = block.chunks(16_000).collect();
    for (i, piece) in pieces.iter().enumerate() {
        let is_last = i + 1 == pieces.len();
        let flags = u8::from(i == 0) | if is_last { 0x4 } else { 0 };
        frames.extend(frame(if i == 0 { HEADERS } else { 9 }, flags, 1, piece));
    }
    stream.write_all(&frames).await.unwrap();
    let answered = timeout(GONE_MAX, until_frame(&mut stream, HEADERS)).await.expect("it is answered or closed");
    assert!(answered.is_none_or(|block| block[0] != 0x88), "200");

    // A body that is too large is refused before it is all there.
    let client = reqwest::Client::new();
    let body = format!("{{\"prompt\": \"{}\"}}", "x".repeat(8 << 20));
    let start = Instant::now();
    let answer = client.post(format!("{}/v1/completions", cluster.url)).body(body).send().await;
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status() == 413));
    assert!(start.elapsed() < Duration::from_secs(5));
    // All is as before.
    first_token_p99(&cluster.url).await;
    cluster.stop().await;
}

/// More streams at a time than one connection may have: the rest is refused, the connection goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_has_so_many_streams_at_a_time() -> io::Result<()> {
    let cluster = Cluster::start(&Options::new("tiny-r1", "f32")).await;
    let mut stream = connect(&cluster.url).await;
    let mut frames = PREFACE.to_vec();
    // Requests whose bodies never come: they stay open.
    let post = [&[0x83, 0x86, 0x44, 15][..], b"/v1/completions", &[0x41, 0x01, b'x']].concat();
    for i in 0..2000_u32 {
        frames.extend(frame(HEADERS, 0x4, 2 * i + 1, &post));
    }
    stream.write_all(&frames).await?;
    let refused = timeout(GONE_MAX, async {
        let reset = until_frame(&mut stream, RST_STREAM).await;
        match reset {
            Some(code) => Some(code),
            None => until_frame(&mut stream, GOAWAY).await,
        }
    });
    assert!(refused.await.is_ok(), "what is too much is refused");
    first_token_p99(&cluster.url).await;
    cluster.stop().await;
    Ok(())
}
