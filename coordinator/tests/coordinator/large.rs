//! A coordinator of a cluster as large as they come: DeepSeek-V3 on 16 attention workers and 128 expert workers.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use moesaic_coordinator::Config;
use moesaic_node::MemberSettings;
use moesaic_proto::v1::{EdgeState, EdgeStatus, Role};
use serde_json::Value;

use crate::cluster::{Cluster, FINGERPRINT, Script, config, model_dir};

const ATTENTION_WORKERS: usize = 16;
const EXPERT_WORKERS: usize = 128;
const LAYERS: usize = 58;
const EXPERTS: usize = 256;
/// The bars for a scrape.
const BYTES_MAX: usize = 2_000_000;
const TIME_MAX: Duration = Duration::from_millis(200);

/// The small model's text with the large one's layers and experts: a coordinator reads no weights.
fn large_model(dir: &Path) {
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(model_dir().join(name), dir.join(name)).unwrap();
    }
    let text = std::fs::read_to_string(model_dir().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in [
        ("num_hidden_layers", LAYERS + 3),
        ("first_k_dense_replace", 3),
        ("n_routed_experts", EXPERTS),
        ("num_experts_per_tok", 8),
        ("n_group", 8),
    ] {
        config[field] = value.into();
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrape_is_small_and_quick() {
    let dir = tempfile::tempdir().unwrap();
    large_model(dir.path());
    let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = Config {
        model: Some(dir.path().to_owned()),
        member: MemberSettings { metrics_listen: Some(metrics), ..config().member },
        expert_workers: EXPERT_WORKERS,
        replicas: 2,
        ..config()
    };
    let mut cluster = Cluster::start(config).await;
    let worker = |e: usize| format!("expert-worker-{e}");
    for e in 0..EXPERT_WORKERS {
        cluster.register(Role::ExpertWorker, &worker(e), FINGERPRINT, "127.0.0.1:1").await;
    }
    let edge = |e| EdgeStatus { worker: worker(e), state: EdgeState::Live.into(), ..EdgeStatus::default() };
    for a in 0..ATTENTION_WORKERS {
        cluster.add_worker(&format!("attention-worker-{a}"), FINGERPRINT, Script::default()).await;
        *cluster.workers[a].edges.lock().unwrap() = (0..EXPERT_WORKERS).map(edge).collect();
    }
    let start = Instant::now();
    while cluster.registry.view().borrow().placement.is_none() {
        assert!(start.elapsed() < Duration::from_secs(20), "the experts are not placed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.until_health(200).await;

    for path in ["/metrics", "/metrics?experts=all"] {
        let (mut best, mut bytes) = (Duration::MAX, 0);
        // What else the machine does is no part of it.
        for _ in 0..5 {
            let start = Instant::now();
            let answer = cluster.client.get(format!("http://{metrics}{path}")).send().await.unwrap();
            let text = answer.text().await.unwrap();
            (best, bytes) = (best.min(start.elapsed()), text.len());
            let members = format!("moesaic_members{{role=\"expert-worker\"}} {EXPERT_WORKERS}");
            assert!(text.contains(&members), "{text}");
            let experts = text.matches("\nmoesaic_expert_holders{").count();
            assert_eq!(experts, if path.ends_with("all") { LAYERS * EXPERTS } else { 0 });
        }
        println!("{path}: {bytes} bytes in {best:?}");
        assert!(bytes <= BYTES_MAX && best <= TIME_MAX, "{path}: {bytes} bytes in {best:?}");
    }
    cluster.stop.cancel();
    cluster.serving.await.unwrap().unwrap();
}
