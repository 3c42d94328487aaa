//! Clusters whose workers compute on a GPU: on the emulator, or on the GPU that MOESAIC_TEST_DEVICE names.
#![allow(clippy::unwrap_used)]

use moesaic::bench::rank::{attention, experts};
use std::process::Command;
use std::time::Duration;

use moesaic_dispatch::nccl::SLOT_ROWS;
use moesaic_dispatch::nccl::fake::FakeFabric;
use moesaic_emulator::NAMED;
use moesaic_kernels::cuda::{Device, GpuRoof};
use moesaic_proto::v1::{DispatchCounts, GenerateRequest};
use moesaic_tests::cluster::{Cluster, Options, PATIENCE, Transport, until};
use moesaic_tests::fixtures::{MODELS, folder};
use moesaic_tests::parity::bf16_is_near;
use moesaic_tests::processes::Up;
use moesaic_tests::requests::{Answer, forty, greedy};

/// More than any fixture takes.
const ARENA_BYTES: usize = 1 << 30;
fn device(seed: u64) -> Device {
    moesaic_emulator::test_device(ARENA_BYTES, seed)
}

/// Small buffers: the emulator's steps take time, not memory.
fn options(model: &str) -> Options {
    Options { token_budget: 64, chunk: 64, cache_tokens: 4096, ..Options::new(model, "bf16") }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_workers_on_a_gpu_answer_as_the_reference() {
    let gpu = device(1);
    let on_gpu =
        |model: &str| Options { attention_gpu: Some(gpu.clone()), experts_gpu: Some(gpu.clone()), ..options(model) };
    // The emulator takes a minute for two; their gates, which others have otherwise, are the processor's.
    let models = if std::env::var_os(NAMED).is_some() { &MODELS[..] } else { &["v3-fp8", "v2-lite"] };
    bf16_is_near(models, on_gpu).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gpu_serves_a_processor_and_the_reverse() {
    let gpu = device(2);
    for (attention_gpu, experts_gpu) in [(None, Some(gpu.clone())), (Some(gpu), None)] {
        let on_both = |model: &str| Options {
            attention_gpu: attention_gpu.clone(),
            experts_gpu: experts_gpu.clone(),
            transport: Transport::Grpc,
            ..options(model)
        };
        bf16_is_near(&["v2-lite"], on_both).await;
    }
}

/// `moesaic bench --rank`, of a small model.
#[test]
fn a_rank_of_random_weights_is_measured() {
    let device = device(4);
    let config = moesaic_model::Config::read(&folder("v3-fp8")).unwrap();
    // What is part of what shows on a GPU alone: the emulator runs once, beside other tests.
    let is_gpu = std::env::var_os(NAMED).is_some();
    let rounds = if is_gpu { 50 } else { 1 };
    let takes_longer = |whole: Duration, part: Duration| !part.is_zero() && (whole > part || !is_gpu);
    let experts = experts::Rank::of(&config, 4).unwrap().measure(&device, &[3, 20], rounds).unwrap();
    assert_eq!(experts.rows().iter().map(|row| row.rows).collect::<Vec<_>>(), [3, 20]);
    assert!(experts.rows().iter().all(|row| takes_longer(row.step, row.layer)), "{experts:?}");
    let attention = attention::measure(&device, &config, &[1, 5], 70, rounds).unwrap();
    for row in attention.rows() {
        assert!(takes_longer(row.step, row.attention) && takes_longer(row.attention, row.head), "{row:?}");
    }
    let roof = GpuRoof { copy: 1e9, fma: Some(1e9) };
    let tables = [experts.table(&roof), attention.table(&roof)];
    assert!(tables.iter().all(|table| table.lines().count() == 5), "{tables:?}");
    assert!(attention::measure(&device, &config, &[1], 1 << 30, 1).is_err());
}

/// Slow is as good as live: workers share the GPU.
fn edges_up(status: &str, transport: &str) -> usize {
    ["live", "slow"].iter().map(|state| status.matches(&format!(" by {transport}: {state}")).count()).sum()
}

/// Workers as processes that share a GPU: by NCCL and over streams they answer alike, also while an expert worker is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_on_one_gpu_answer_alike_over_lanes_and_streams() {
    let Ok(device) = std::env::var(NAMED) else {
        println!("SKIPPED: {NAMED} names no GPU");
        return;
    };
    let requests = forty(259);
    let mut all = Vec::new();
    for transport in ["grpc", "nccl"] {
        let memory = ["--device-memory", "2GiB", "--replicas", "2"];
        let up = Up::start(&[&["--processes", "--device", &device, "--transport", transport], &memory[..]].concat());
        let lanes = if transport == "nccl" { 2 } else { 0 };
        until(2 * PATIENCE, async || edges_up(&up.status(), transport) == 2).await;
        assert_eq!(up.status().matches("lane up").count(), lanes, "{}", up.status());
        let ask = async || {
            let (client, requests) = (up.client().await, requests.iter().cloned());
            let one = |request| {
                let mut client = client.clone();
                async move { Answer::read(client.generate(request).await.unwrap().into_inner()).await.unwrap() }
            };
            futures::future::join_all(requests.map(one)).await
        };
        all.push(ask().await);
        let killed = up.node("expert-worker", "e0").unwrap();
        let kill = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert!(Command::new("kill").args(["-KILL", &killed.to_string()]).status().unwrap().success());
        };
        all.push(tokio::join!(ask(), kill).0);
        // It is started again, and so is its lane.
        until(2 * PATIENCE, async || edges_up(&up.status(), transport) == 2).await;
        all.push(ask().await);
        up.stop();
    }
    assert!(all.iter().all(|answers| *answers == all[0]));
}

/// Rule 1, on a GPU: the same tokens and log-probabilities, whatever else runs and however it is cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_do_not_depend_on_what_runs_beside_them() {
    let gpu = device(3);
    let requests: Vec<_> =
        [&[5, 9, 300, 2][..], &[7], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
            .iter()
            .map(|prompt| greedy(prompt, 6))
            .collect();
    let mut all: Vec<Vec<Answer>> = Vec::new();
    for (chunk, expert_workers, transport) in [(64, 1, Transport::Local), (3, 2, Transport::Grpc)] {
        let options = Options {
            attention_gpu: Some(gpu.clone()),
            experts_gpu: Some(gpu.clone()),
            chunk,
            expert_workers,
            transport,
            ..options("v3-fp8")
        };
        let cluster = Cluster::start(&options).await;
        all.push(cluster.alone(&requests).await);
        all.push(cluster.at_once(&requests).await);
        cluster.stop().await;
    }
    for answers in &all[1..] {
        for (answer, expected) in answers.iter().zip(&all[0]) {
            assert_eq!((&answer.prompt, &answer.tokens), (&expected.prompt, &expected.tokens));
        }
    }
}

/// Rows go from GPU to GPU and back without the processor's memory, as far as this machine has any; and through it whenever
/// lanes fail. Tokens and log-probabilities are those of streams.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_stay_on_gpus_change_no_token() {
    let (attention_gpu, experts_gpu) = (Some(device(6)), Some(device(8)));
    // Chunks of which some workers get more rows than a slot has room for.
    let (expert_workers, token_budget) = (3, SLOT_ROWS + 4);
    let streams = Options { attention_gpu, experts_gpu, transport: Transport::Grpc, ..options("v3-fp8") };
    let streams = Options { expert_workers, token_budget, chunk: token_budget, ..streams };
    let long: Vec<u32> = (3..).map(|i| i * 37 % 256).take(3 * token_budget).collect();
    let requests: Vec<_> = [&[5, 9, 300, 2][..], &[7], &long].map(|prompt| greedy(prompt, 8)).into();
    let cluster = Cluster::start(&streams).await;
    let expected = cluster.alone(&requests).await;
    cluster.stop().await;

    let fabric = FakeFabric::default();
    let cluster = Cluster::start(&Options { fabric: Some(fabric.clone()), ..streams }).await;
    let edges = async || cluster.loads().await.into_iter().flat_map(|load| load.edges).collect::<Vec<_>>();
    for fails in [false, true] {
        until(PATIENCE, async || edges().await.iter().all(|edge| edge.transport == "nccl")).await;
        let before = fabric.taken_there();
        let break_off = async {
            while fails && fabric.taken_there() < before + 10 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if fails {
                fabric.fail_all("a cable is pulled");
            }
        };
        let ask = async || if fails { cluster.at_once(&requests).await } else { cluster.alone(&requests).await };
        let (answers, ()) = tokio::join!(ask(), break_off);
        assert!(answers == expected, "lanes fail: {fails}");
        assert!(fabric.taken_there() > before, "rows came by the processor");
        if !fails {
            let counts = cluster.loads().await.into_iter().find_map(|load| load.dispatch).unwrap();
            let DispatchCounts { sent, resent, hedged, ahead, .. } = counts;
            let others = sent - resent - hedged - ahead;
            assert!(
                0 < others && others < ahead / 4,
                "most rows leave ahead, and what slots have no room for: {counts:?}"
            );
        }
    }
    cluster.stop().await;
}

/// The GPU draws tokens, and the processor where log-probabilities are wanted, too: both draw the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_change_no_token() {
    let gpu = device(5);
    let options = Options { attention_gpu: Some(gpu.clone()), experts_gpu: Some(gpu), ..options("v3-fp8") };
    let cluster = Cluster::start(&options).await;
    let seen: Vec<_> = forty(259).into_iter().take(8).collect();
    let drawn = seen.iter().cloned();
    let drawn: Vec<_> =
        drawn.map(|request| GenerateRequest { logprobs: None, prompt_logprobs: None, ..request }).collect();
    let (seen, drawn) = (cluster.at_once(&seen).await, cluster.at_once(&drawn).await);
    cluster.stop().await;
    assert!(seen.iter().flat_map(|answer| &answer.tokens).all(|token| token.logprob.is_some()));
    assert!(drawn.iter().flat_map(|answer| &answer.tokens).all(|token| token.logprob.is_none()));
    let ids = |answers: &[Answer]| answers.iter().map(Answer::ids).collect::<Vec<_>>();
    assert_eq!(ids(&drawn), ids(&seen));
}
