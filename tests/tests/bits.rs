//! Rule 1: a request's answer has the same bits however the work is cut and whoever does it.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use moesaic_dispatch::nccl::fake::FakeFabric;
use moesaic_tests::cluster::{Cluster, Options, PATIENCE, Transport, until};
use moesaic_tests::processes::Up;
use moesaic_tests::requests::{Answer, forty, reasons};

/// Every way of serving that must not matter.
fn ways(base: &Options) -> Vec<Options> {
    let mut ways = Vec::new();
    for chunk in [1, 7, 64] {
        ways.push(Options { chunk, ..base.clone() });
    }
    for expert_workers in 1..=5 {
        for transport in [Transport::Local, Transport::Grpc] {
            ways.push(Options { expert_workers, transport, ..base.clone() });
        }
    }
    for micro_batches in 1..=3 {
        ways.push(Options { micro_batches, transport: Transport::Grpc, ..base.clone() });
        let fabric = Some(FakeFabric::default());
        ways.push(Options { micro_batches, fabric, transport: Transport::Grpc, ..base.clone() });
    }
    ways.push(Options { token_budget: 5, ..base.clone() });
    ways.push(Options { attention_workers: 3, ..base.clone() });
    ways.push(Options { threads: 1, ..base.clone() });
    // Little more than one sequence needs: most of them give up their pages at some time.
    ways.push(Options { cache_tokens: 256, ..base.clone() });
    ways
}

async fn check(model: &str, dtype: &'static str, vocabulary: usize) {
    let base = Options::new(model, dtype);
    let requests = forty(vocabulary);
    let cluster = Cluster::start(&base).await;
    let expected = cluster.alone(&requests).await;
    assert_eq!(reasons(&expected).len(), 2, "the requests end in more than one way");
    assert_eq!(cluster.at_once(&requests).await, expected, "{model} {dtype}: all at once");
    cluster.stop().await;
    for way in ways(&base) {
        let cluster = Cluster::start(&way).await;
        assert_eq!(cluster.at_once(&requests).await, expected, "{way:?}");
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_r1_in_bf16() {
    check("tiny-r1", "bf16", 259).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_r1_fp8_in_bf16() {
    check("tiny-r1-fp8", "bf16", 259).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_r1_in_int8() {
    check("tiny-r1", "int8", 259).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn v2_lite_in_f32() {
    check("v2-lite", "f32", 512).await;
}

/// Rows go from GPU to GPU, as far as this machine has any, and over streams whenever that fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lanes_that_fail_change_no_token() {
    let fabric = FakeFabric::default();
    let base = Options::new("tiny-r1", "bf16");
    let requests = forty(259);
    let cluster = Cluster::start(&base).await;
    let expected = cluster.alone(&requests).await;
    cluster.stop().await;
    let cluster = Cluster::start(&Options { fabric: Some(fabric.clone()), transport: Transport::Grpc, ..base }).await;
    let edges = async || cluster.loads().await.into_iter().flat_map(|load| load.edges).collect::<Vec<_>>();
    for _ in 0..3 {
        until(PATIENCE, async || edges().await.iter().all(|edge| edge.transport == "nccl")).await;
        let before = fabric.message_count();
        let break_off = async {
            while fabric.message_count() < before + 100 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            fabric.fail_all("a cable is pulled");
        };
        let (answers, ()) = tokio::join!(cluster.at_once(&requests), break_off);
        assert!(answers == expected);
    }
    let edges = edges().await;
    assert!(edges.len() == 2 && edges.iter().all(|edge| edge.lane_failures == 3), "{edges:?}");
    assert!(edges.iter().all(|edge| edge.resent == 0), "no lane is a worker's loss: {edges:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_process_and_many_answer_the_same() {
    let requests = forty(259);
    let mut answers = Vec::new();
    for arguments in [
        vec!["--expert-workers", "1"],
        vec!["--processes", "--attention-workers", "2", "--expert-workers", "3", "--threads", "1"],
    ] {
        let up = Up::start(&arguments);
        let client = up.client().await;
        let run = |request| {
            let mut client = client.clone();
            async move { Answer::read(client.generate(request).await.unwrap().into_inner()).await.unwrap() }
        };
        answers.push(futures::future::join_all(requests.iter().cloned().map(run)).await);
        up.stop();
    }
    assert!(answers[0] == answers[1]);
}
