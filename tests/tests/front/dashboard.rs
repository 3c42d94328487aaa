//! What the dashboard's page reads and does, over HTTP, of a real cluster in this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use moesaic_tests::cluster::{Cluster, Options};
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);

/// Events of the stream, as they come.
struct Events {
    stream: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    text: String,
}

impl Events {
    async fn open(url: &str) -> Self {
        let answer = reqwest::get(format!("{url}/dashboard/events")).await.unwrap();
        assert_eq!(answer.headers()[CONTENT_TYPE], "text/event-stream");
        Self { stream: answer.bytes_stream().boxed(), text: String::new() }
    }

    /// None at the end of the stream.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
                let parsed = (name.to_owned(), serde_json::from_str(data).unwrap());
                self.text = rest.to_owned();
                return Some(parsed);
            }
            let bytes = timeout(PATIENCE, self.stream.next()).await.expect("news")?.unwrap();
            self.text.push_str(std::str::from_utf8(&bytes).unwrap());
        }
    }

    /// The next update of which this is true.
    async fn until(&mut self, mut is_it: impl FnMut(&Value) -> bool) -> Value {
        let search = async {
            loop {
                let (name, data) = self.next().await.expect("the stream goes on");
                if name == "update" && is_it(&data) {
                    return data;
                }
            }
        };
        timeout(PATIENCE, search).await.expect("it is told")
    }
}

fn has_event(update: &Value, kind: &str, subject: &str) -> bool {
    let events = update["events"].as_array().into_iter().flatten();
    events.into_iter().any(|event| event["kind"] == kind && event["subject"] == subject)
}

async fn act(url: &str, action: &str, body: Value) -> (u16, Value) {
    let request = reqwest::Client::new().post(format!("{url}/dashboard/actions/{action}")).json(&body);
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_is_told_all_and_then_what_changes() {
    let options = Options { attention_workers: 2, expert_workers: 3, replicas: 2, ..Options::new("tiny-r1", "f32") };
    let cluster = Cluster::start(&options).await;
    // Who joins before the first look has nothing to look at.
    sleep(Duration::from_millis(2500)).await;
    let mut events = Events::open(&cluster.url).await;
    let mut first = Vec::new();
    while first.len() < 4 {
        first.push(events.next().await.unwrap());
    }
    let names: Vec<&str> = first.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["access", "snapshot", "placement", "heat"]);
    assert_eq!(first[0].1, json!({"protocol": 1, "keys": false, "key": null, "infer": true, "operate": true}));
    let snapshot = &first[1].1;
    assert_eq!(snapshot["model"]["name"], "tiny-r1");
    let ids = |list: &str| {
        let rows = snapshot[list].as_array().unwrap().iter();
        let mut ids: Vec<_> = rows.map(|row| row["id"].as_str().unwrap()).collect();
        ids.sort_unstable();
        ids.join(" ")
    };
    assert_eq!([ids("attention"), ids("experts")], ["a0 a1", "e0 e1 e2"]);
    assert_eq!(snapshot["edges"].as_array().unwrap().len(), 6);
    assert_eq!(first[2].1["epoch"], snapshot["status"]["epoch"]);

    // A request is seen while it runs, and what came of it.
    let body = json!({"prompt": "1 + 1 =", "max_tokens": 2000, "ignore_eos": true, "temperature": 0});
    let running = reqwest::Client::new().post(format!("{}/v1/completions", cluster.url)).json(&body).send();
    let running = tokio::spawn(running);
    let seen = events.until(|update| update["requests"].is_array()).await;
    let request = &seen["requests"][0];
    assert!(request["id"].as_str().unwrap().starts_with("cmpl-") && request["prompt"].as_u64() > Some(0), "{request}");
    assert_eq!(running.await.unwrap().unwrap().status(), 200);
    events.until(|update| update["ended"] == json!([request["n"]])).await;
    events.until(|update| update["point"][1].as_f64() > Some(0.0)).await;

    // An operator's wish.
    let (status, answer) = act(&cluster.url, "cordon", json!({"worker": "e1", "cordoned": true, "drain": true})).await;
    assert_eq!((status, answer), (200, json!({})));
    // Both may come in the same second.
    let mut is_cordoned = false;
    let is_placed = |update: &Value| {
        is_cordoned |= has_event(update, "cordoned", "e1");
        update["status"]["epoch"].as_u64() > snapshot["status"]["epoch"].as_u64()
    };
    let update = events.until(is_placed).await;
    assert!(is_cordoned);
    let epoch = update["status"]["epoch"].as_u64().unwrap();
    assert!(has_event(&update, "placed", &format!("epoch {epoch}")), "{update}");
    assert_eq!(act(&cluster.url, "cordon", json!({"worker": "e1", "cordoned": false})).await.0, 200);
    events.until(|update| has_event(update, "uncordoned", "e1")).await;

    let (status, answer) = act(&cluster.url, "rebalance", json!({"dry_run": true})).await;
    assert!(status == 200 && answer["moved"].is_u64() && answer["imbalance_before"].is_f64(), "{answer}");
    for (action, body, expected) in [
        ("cordon", json!({}), "worker: is not set"),
        ("cordon", json!({"worker": "e9"}), "e9"),
        ("cordon", json!({"worker": 5}), "worker"),
        ("rebalance", json!({"dry_run": "yes"}), "dry_run"),
        ("rebalance", json!([]), "body"),
    ] {
        let (status, answer) = act(&cluster.url, action, body).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(expected), "{status} {message}");
    }
    // A form of another page cannot send JSON.
    let form = reqwest::Client::new().post(format!("{}/dashboard/actions/rebalance", cluster.url));
    let answer = form.header(CONTENT_TYPE, "text/plain").body("{\"dry_run\": false}").send().await.unwrap();
    assert_eq!(answer.status(), 400);

    let stopped = tokio::spawn(cluster.stop());
    while let Some((name, data)) = events.next().await {
        if name == "bye" {
            assert_eq!(data["reason"], "the coordinator is stopping");
            assert!(events.next().await.is_none());
            stopped.await.unwrap();
            return;
        }
    }
    panic!("the stream has ended without a word");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_comes_with_its_policy_and_asks_for_nothing_elsewhere() {
    let cluster = Cluster::start(&Options::new("tiny-r1", "f32")).await;
    for (path, kind, part) in [
        ("/", "text/html", "<script"),
        ("/dashboard/app.js", "text/javascript", "/dashboard/events"),
        ("/dashboard/app.css", "text/css", "light-dark("),
        ("/dashboard/icon.svg", "image/svg+xml", "<svg"),
        ("/dashboard/NOTICES.txt", "text/plain", "MIT"),
    ] {
        let answer = reqwest::get(format!("{}{path}", cluster.url)).await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        let headers = answer.headers();
        assert!(headers[CONTENT_TYPE].to_str().unwrap().starts_with(kind), "{path}");
        assert!(headers["content-security-policy"].to_str().unwrap().starts_with("default-src 'self';"));
        assert_eq!(headers["x-content-type-options"], "nosniff");
        let text = answer.text().await.unwrap();
        assert!(text.contains(part), "{path}");
    }
    let answer = reqwest::get(format!("{}/dashboard/../Cargo.toml", cluster.url)).await.unwrap();
    assert_eq!(answer.status(), 404);
    assert_eq!(reqwest::get(format!("{}/dashboard/other.js", cluster.url)).await.unwrap().status(), 404);
    cluster.stop().await;
}

/// Streams answers for ever, and counts their chunks.
async fn stream_for_ever(url: String, chunks: Arc<AtomicUsize>) {
    let client = reqwest::Client::new();
    let body = json!({"prompt": "1 + 1 =", "max_tokens": 200, "ignore_eos": true, "temperature": 0, "stream": true});
    loop {
        let answer = client.post(format!("{url}/v1/completions")).json(&body).send().await.unwrap();
        let mut stream = answer.bytes_stream();
        while let Some(bytes) = stream.next().await {
            chunks.fetch_add(bytes.unwrap().windows(6).filter(|bytes| *bytes == b"data: ").count(), Ordering::Relaxed);
        }
    }
}

/// Those who watch read in the same process, which is a part of what is measured.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "two minutes on an idle machine: cargo test --release -p moesaic-tests --test front -- --ignored --nocapture"]
async fn who_watches_costs_less_than_two_percent_of_the_tokens() {
    const CLIENTS: usize = 8;
    const WATCHERS: usize = 2;
    const WINDOW: Duration = Duration::from_secs(3);
    const PAIRS: usize = 20;
    let options = Options { attention_workers: 2, expert_workers: 3, replicas: 2, ..Options::new("tiny-r1", "f32") };
    let cluster = Cluster::start(&options).await;
    let chunks = Arc::<AtomicUsize>::default();
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(stream_for_ever(cluster.url.clone(), chunks.clone()));
    }
    sleep(WINDOW).await;
    let rate = async |is_watched: bool| {
        let mut watchers = JoinSet::new();
        for _ in 0..if is_watched { WATCHERS } else { 0 } {
            let mut events = Events::open(&cluster.url).await;
            watchers.spawn(async move { while events.next().await.is_some() {} });
        }
        let (before, start) = (chunks.load(Ordering::Relaxed), Instant::now());
        sleep(WINDOW).await;
        (chunks.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64()
    };
    let mut shares = Vec::new();
    for pair in 0..PAIRS {
        // In turn, so that a machine's own drift is neither's.
        let first = rate(pair % 2 == 0).await;
        let second = rate(pair % 2 == 1).await;
        shares.push(if pair % 2 == 0 { first / second } else { second / first });
    }
    shares.sort_unstable_by(f64::total_cmp);
    let (low, median, high) = (shares[PAIRS / 4], shares[PAIRS / 2], shares[PAIRS * 3 / 4]);
    println!("watched by {WATCHERS}: {median:.3} of the tokens a second, half of the pairs {low:.3} to {high:.3}");
    assert!(median >= 0.98, "{shares:?}");
    clients.abort_all();
    cluster.stop().await;
}
