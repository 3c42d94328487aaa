//! Everything that a request holds comes back, and what cannot fit is told at once.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use moesaic_proto::v1::{AbortRequest, FinishReason};
use moesaic_tests::cluster::{Cluster, Options};
use moesaic_tests::requests::{Answer, greedy};
use tonic::Code;

/// Pages of the workers and permits of the coordinator.
async fn until_all_is_back(cluster: &Cluster) {
    let is_back = async || {
        let loads = cluster.loads().await;
        let idle = |load: &moesaic_proto::v1::LoadResponse| {
            load.pages_free == load.pages_total && load.sequences_running + load.sequences_waiting == 0
        };
        let health: serde_json::Value =
            reqwest::get(format!("{}/health", cluster.url)).await.unwrap().json().await.unwrap();
        loads.iter().all(idle) && health["sequences"] == 0
    };
    let wait = async {
        while !is_back().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), wait).await.expect("all pages and permits come back within a second");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_64_streams_half_are_dropped_midway_and_all_comes_back() {
    let cluster = Cluster::start(&Options { attention_workers: 2, ..Options::new("tiny-r1", "bf16") }).await;
    let request = greedy(&[60; 40], 64);
    let expected = cluster.generate(request.clone()).await.unwrap();
    let run = |i: usize| {
        let (mut client, request) = (cluster.client.clone(), request.clone());
        async move {
            let mut stream = client.generate(request).await.unwrap().into_inner();
            if i.is_multiple_of(2) {
                return Some(Answer::read(stream).await.unwrap());
            }
            for _ in 0..1 + i % 20 {
                stream.message().await.unwrap().unwrap();
            }
            None
        }
    };
    let answers = futures::future::join_all((0..64).map(run)).await;
    let kept: Vec<&Answer> = answers.iter().flatten().collect();
    assert_eq!(kept.len(), 32);
    assert!(kept.iter().all(|answer| **answer == expected), "a dropped stream changes no other");
    until_all_is_back(&cluster).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_ends_a_stream_and_frees_everything() {
    let cluster = Cluster::start(&Options::new("tiny-r1", "bf16")).await;
    let mut request = greedy(&[60; 40], 4000);
    request.request_id = "to-abort".into();
    let mut stream = cluster.client.clone().generate(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let abort = AbortRequest { request_id: "to-abort".into() };
    assert!(cluster.client.clone().abort(abort).await.unwrap().into_inner().aborted);
    let mut last = None;
    while let Some(part) = stream.message().await.unwrap() {
        last = part.finish;
    }
    assert_eq!(last.unwrap().reason(), FinishReason::Aborted);
    until_all_is_back(&cluster).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_larger_than_the_whole_cache_is_refused_with_both_numbers() {
    let cluster = Cluster::start(&Options { cache_tokens: 256, ..Options::new("tiny-r1", "bf16") }).await;
    let refused = cluster.generate(greedy(&[60; 300], 8)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("308") && refused.message().contains("256"), "{refused}");
    assert_eq!(cluster.generate(greedy(&[60; 248], 8)).await.unwrap().tokens.len(), 8);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn past_the_bound_requests_are_refused_at_once_with_the_time_to_wait() {
    let cluster = Cluster::start(&Options { sequences_max: 4, ..Options::new("tiny-r1", "bf16") }).await;
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(cluster.client.clone().generate(greedy(&[60; 8], 4000)).await.unwrap().into_inner());
    }
    let refused = cluster.generate(greedy(&[60; 8], 8)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.metadata().get("retry-after").is_some(), "{refused:?}");
    let http = reqwest::Client::new().post(format!("{}/v1/completions", cluster.url)).body(r#"{"prompt": "1"}"#);
    let answer = http.send().await.unwrap();
    assert_eq!(answer.status(), 429);
    assert!(answer.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    drop(running);
    until_all_is_back(&cluster).await;
    cluster.generate(greedy(&[60; 8], 8)).await.unwrap();
    cluster.stop().await;
}
