//! Loading, epochs, refusals and the stop.

use std::time::Duration;

use moesaic_dispatch::{Cause, DispatchError, Route, Rows};
use moesaic_expert_worker::Config;
use moesaic_proto::v1::{RefusalReason, Role};
use moesaic_proto::{ExpertId, LayerId, Placement};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::harness::{Workers, fixture, until, worker_id};

const LAYER: LayerId = LayerId(1);

fn one_row(workers: &Workers, expert: u16) -> (Rows<'static>, [Route; 1]) {
    let rows = Rows::F32(vec![0.5; workers.checkpoint.config().hidden_size]);
    (rows, [Route { expert: ExpertId(expert), weight: 1.0 }])
}

async fn ask(workers: &Workers, placement: &Placement, expert: u16) -> Result<(), DispatchError> {
    let dispatcher = workers.dispatcher(placement, false).await;
    let (rows, routes) = one_row(workers, expert);
    let mut y = vec![0.0; workers.checkpoint.config().hidden_size];
    dispatcher.dispatch(LAYER, 0, rows, 1, &routes)?.combine(&mut y).await
}

fn refusal(error: DispatchError) -> (RefusalReason, String) {
    match error {
        DispatchError::Lost { cause: Cause::Refused(refusal), .. } => (refusal.reason, refusal.detail),
        other => panic!("no refusal: {other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_epoch_is_served_beside_the_old_one_and_the_one_before_is_retired() {
    let workers = Workers::start(&fixture("v3"), 2, Config::default());
    let placements = [1, 2, 3].map(|epoch| workers.placement(epoch, 2, move |e| (e + epoch as usize) % 2));
    workers.place(&placements[0]).await;
    let old = workers.dispatcher(&placements[0], false).await;
    let second = placements[1].clone();
    workers.place(&second).await;
    let (rows, routes) = one_row(&workers, 0);
    let mut y = vec![0.0; workers.checkpoint.config().hidden_size];
    old.dispatch(LAYER, 0, rows, 1, &routes).unwrap().combine(&mut y).await.expect("the old epoch is served on");
    ask(&workers, &second, 0).await.expect("and so is the new one");
    workers.place(&placements[2]).await;
    let (rows, routes) = one_row(&workers, 0);
    let error = old.dispatch(LAYER, 0, rows, 1, &routes).unwrap().combine(&mut y).await.unwrap_err();
    let (reason, detail) = refusal(error);
    assert_eq!(reason, RefusalReason::Epoch);
    assert!(detail.contains("epoch 1 is not served here; served: 2 and 3"), "{detail}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expert_that_is_not_held_is_refused_by_name() {
    let workers = Workers::start(&fixture("v3"), 2, Config::default());
    let placement = workers.placement(1, 2, |e| e % 2);
    workers.place(&placement).await;
    // The same workers, the other way round: what a caller with a wrong placement would ask.
    let wrong = workers.placement(1, 2, |e| (e + 1) % 2);
    let (reason, detail) = refusal(ask(&workers, &wrong, 5).await.unwrap_err());
    assert_eq!(reason, RefusalReason::NotHeld);
    assert_eq!(detail, "layer 1, expert 5 is not held here in epoch 1");
    ask(&workers, &placement, 5).await.expect("and nothing is lost for the others");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_says_serving_once_the_experts_are_loaded() {
    let workers = Workers::start(&fixture("v3"), 1, Config::default());
    let member = || workers.registry.view().borrow().of_role(Role::ExpertWorker).next().cloned();
    until("the worker's record", || member().is_some()).await;
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", member().unwrap().address)).unwrap();
    let mut health = HealthClient::new(channel.connect().await.unwrap());
    let status = async |health: &mut HealthClient<_>| health.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(status(&mut health).await.into_inner().status(), ServingStatus::NotServing);
    workers.place(&workers.placement(1, 1, |_| 0)).await;
    let serves = async {
        while status(&mut health).await.into_inner().status() != ServingStatus::Serving {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), serves).await.expect("it serves");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_leaves_the_registry_and_ends_well() {
    let workers = Workers::start(&fixture("v3"), 2, Config::default());
    let placement = workers.placement(1, 2, |e| e % 2);
    workers.place(&placement).await;
    let dispatcher = workers.dispatcher(&placement, false).await;
    workers.stop.cancel();
    for task in workers.tasks {
        tokio::time::timeout(Duration::from_secs(5), task).await.expect("it ends").unwrap().unwrap();
    }
    assert_eq!(workers.registry.view().borrow().of_role(Role::ExpertWorker).count(), 0);
    assert!(workers.hub.get(&worker_id(0)).is_none());
    until("broken edges", || !dispatcher.reachable()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_that_cannot_be_loaded_end_the_worker_with_their_name() {
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("v3-fp8").join(file), copy.path().join(file)).unwrap();
    }
    let mut bytes = std::fs::read(fixture("v3-fp8").join("model.safetensors")).unwrap();
    poison(&mut bytes, "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv");
    std::fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
    let mut workers = Workers::start(copy.path(), 1, Config::default());
    let placement = workers.placement(1, 1, |_| 0);
    assert!(workers.registry.publish(placement).await.unwrap());
    let task = workers.tasks.remove(0);
    let error = tokio::time::timeout(Duration::from_secs(5), task).await.unwrap().unwrap().unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("experts.3.up_proj.weight_scale_inv") && error.contains("NaN"), "{error}");
}

/// Makes the tensor's first f32 a NaN.
fn poison(bytes: &mut [u8], tensor: &str) {
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = std::str::from_utf8(&bytes[8..8 + header]).unwrap();
    let entry = text.split_once(&format!("\"{tensor}\":")).unwrap().1;
    let start: usize = entry.split_once("\"data_offsets\":[").unwrap().1.split(',').next().unwrap().parse().unwrap();
    bytes[8 + header + start..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
}
