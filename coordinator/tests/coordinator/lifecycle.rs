//! Joining, readiness, routing, disconnects and the stop.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, FINGERPRINT, Script, config, until, user};
use futures::StreamExt;
use moesaic_proto::LayerId;
use moesaic_proto::v1::Role;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn health_is_200_only_when_a_token_could_be_produced() {
    let mut cluster = Cluster::start(config()).await;
    let reason = |answer: serde_json::Value| answer["error"]["message"].as_str().unwrap().to_owned();
    cluster.register(Role::ExpertWorker, "e-0", FINGERPRINT, "127.0.0.1:1").await;
    let words = "1 of 2 expert workers are registered; no attention worker is registered";
    let start = Instant::now();
    loop {
        let (status, answer) = cluster.get("/health").await;
        assert_eq!(status, 503);
        if reason(answer).contains(words) {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    let (status, answer) = cluster.post(TEXT, json!({"prompt": "x"})).await;
    assert_eq!(status, 503, "{answer}");

    cluster.register(Role::ExpertWorker, "e-1", FINGERPRINT, "127.0.0.1:1").await;
    cluster.add_worker("a-0", FINGERPRINT, Script::says("!")).await;
    cluster.until_health(200).await;
    cluster.workers[0].reachable.store(false, Ordering::SeqCst);
    cluster.until_health(503).await;
    let (_, answer) = cluster.get("/health").await;
    assert!(reason(answer).contains("0 of 2 expert workers have loaded their experts; no attention worker reaches"));
}

#[tokio::test]
async fn the_first_placement_is_made_when_the_expert_workers_are_there() {
    let mut cluster = Cluster::start(config()).await;
    let mut view = cluster.registry.view();
    cluster.register(Role::ExpertWorker, "e-1", FINGERPRINT, "127.0.0.1:1").await;
    cluster.register(Role::ExpertWorker, "e-9", "ffffffffffffffffffffffffffffffff", "127.0.0.1:1").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(view.borrow().placement.is_none(), "a worker with another model does not count");
    cluster.register(Role::ExpertWorker, "e-0", FINGERPRINT, "127.0.0.1:1").await;
    let placed = tokio::time::timeout(Duration::from_secs(2), view.wait_for(|view| view.placement.is_some()));
    let placement = placed.await.unwrap().unwrap().placement.clone().unwrap();
    let workers: Vec<_> = placement.workers().iter().map(|worker| worker.as_str()).collect();
    assert_eq!(workers, ["e-0", "e-1"]);
    assert_eq!(placement.layers().collect::<Vec<_>>(), [1, 2, 3, 4].map(LayerId));
    assert_eq!(placement.shard(&placement.workers()[1])[&LayerId(1)].len(), 16);
}

#[tokio::test]
async fn several_workers_share_the_work_and_a_foreign_one_gets_none() {
    let mut cluster = Cluster::new(Script::endless()).await;
    cluster.add_worker("a-1", FINGERPRINT, Script::endless()).await;
    cluster.add_worker("a-2", "ffffffffffffffffffffffffffffffff", Script::endless()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(cluster.send(TEXT, json!({"prompt": "x", "stream": true, "max_tokens": 1000})).await);
    }
    let running: Vec<_> = cluster.workers.iter().map(|worker| worker.running.load(Ordering::SeqCst)).collect();
    assert_eq!(running, [4, 4, 0]);
}

#[tokio::test]
async fn a_worker_that_is_full_or_gone_is_passed_over() {
    let mut cluster = Cluster::new(Script::says("!")).await;
    cluster.add_worker("a-1", FINGERPRINT, Script::says("?")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    for refusal in [tonic::Status::resource_exhausted("full"), tonic::Status::unavailable("stopping")] {
        cluster.set_script(Script { refusal: Some(refusal), ..Script::default() });
        let (status, answer) = cluster.post(TEXT, json!({"prompt": "x"})).await;
        assert_eq!((status, &answer["choices"][0]["text"]), (200, &json!("?")));
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_everything_within_a_second() {
    let cluster = Cluster::new(Script::endless()).await;
    let body = json!({"messages": user("x"), "n": 2, "max_tokens": 1000});
    for stream in [true, false] {
        let mut body = body.clone();
        body["stream"] = stream.into();
        let body = body.to_string();
        let mut socket = TcpStream::connect(cluster.url.strip_prefix("http://").unwrap()).await.unwrap();
        let head = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        socket.write_all((head + &body).as_bytes()).await.unwrap();
        until("both choices run", Duration::from_secs(2), || cluster.running() == 2).await;
        if stream {
            let mut first = [0; 16];
            socket.read_exact(&mut first).await.unwrap();
            assert!(first.starts_with(b"HTTP/1.1 200 OK"));
        }
        drop(socket);
        until("nothing runs", Duration::from_secs(1), || cluster.running() == 0).await;
        assert_eq!(cluster.get("/health").await.1["sequences"], 0);
    }
}

#[tokio::test]
async fn half_of_many_streams_leave_and_the_rest_finish() {
    let cluster = Cluster::new(Script { pause: Duration::from_millis(2), ..Script::endless() }).await;
    let start = |i: u32| {
        let cluster = &cluster;
        async move {
            let response = cluster.send(TEXT, json!({"prompt": "x", "stream": true, "max_tokens": 100})).await;
            let mut body = response.bytes_stream();
            body.next().await.unwrap().unwrap();
            if i.is_multiple_of(2) {
                return true;
            }
            let mut whole = Vec::new();
            while let Some(bytes) = body.next().await {
                whole.extend(bytes.unwrap());
            }
            String::from_utf8(whole).unwrap().ends_with("data: [DONE]\n\n")
        }
    };
    let done = futures::future::join_all((0..64).map(start)).await;
    assert!(done.into_iter().all(|done| done));
    until("nothing runs", Duration::from_secs(1), || cluster.running() == 0).await;
    assert_eq!(cluster.get("/health").await.1["sequences"], 0);
}

#[tokio::test]
async fn a_stop_lets_running_requests_finish_and_takes_no_new_ones() {
    let cluster = Cluster::new(Script { pause: Duration::from_millis(30), ..Script::says("0123456789") }).await;
    let running = cluster.send(TEXT, json!({"prompt": "x", "stream": true})).await;
    cluster.stop.cancel();
    let text = running.text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let served = tokio::time::timeout(Duration::from_secs(2), cluster.serving).await;
    served.expect("ends by itself").unwrap().unwrap();
    assert!(reqwest::get(format!("{}/health", cluster.url)).await.is_err());
}

#[tokio::test]
async fn a_stop_is_bounded() {
    let cluster = Cluster::new(Script::endless()).await;
    let _running = cluster.send(TEXT, json!({"prompt": "x", "stream": true, "max_tokens": 2000})).await;
    let _silent = TcpStream::connect(cluster.url.strip_prefix("http://").unwrap()).await.unwrap();
    cluster.stop.cancel();
    // drain_seconds is 2; the request would take 10 s.
    let served = tokio::time::timeout(Duration::from_secs(4), cluster.serving).await;
    served.expect("within the bound").unwrap().unwrap();
}
