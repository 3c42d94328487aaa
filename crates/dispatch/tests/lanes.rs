//! Frames from GPU to GPU, over a fabric in memory that waits as NCCL does: the same sums as over the stream, and no call lost
//! with a lane.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moesaic_dispatch::nccl::fake::FakeFabric;
use moesaic_dispatch::nccl::{
    ANSWER_TIMEOUT, BACKOFF_MIN, Fabric, IDLE_AFTER, LANE_FRAMES_MAX, LANES_MAX, SEND_TIMEOUT,
};
use moesaic_dispatch::{DispatchConfig, Dispatcher, Rows};
use moesaic_proto::v1::{Hello, Role};
use moesaic_proto::{Epoch, Placement};
use support::*;

const ANY_PORT: &str = "127.0.0.1:0";

fn with_lanes(mut hello: Hello, fabric: &FakeFabric) -> Hello {
    hello.nccl = fabric.version();
    hello
}

async fn start_with(number: usize, host: &Arc<FakeHost>, fabric: &FakeFabric) -> RemoteWorker {
    let hello = with_lanes(hello(Role::ExpertWorker, worker(number).as_str()), fabric);
    RemoteWorker::start_with(ANY_PORT.parse().unwrap(), host.clone(), Some(Arc::new(fabric.clone())), hello).await
}

fn config_with(fabric: &FakeFabric) -> DispatchConfig {
    let config = config(PATIENT);
    DispatchConfig { hello: with_lanes(config.hello, fabric), fabric: Some(Arc::new(fabric.clone())), ..config }
}

/// A dispatcher and so many workers that hold everything, all lanes up.
async fn cluster(moods: &[Mood]) -> (Dispatcher, Vec<Arc<FakeHost>>, Vec<RemoteWorker>, FakeFabric) {
    let (fabric, hosts) = (FakeFabric::default(), moods.iter().map(|mood| FakeHost::new(*mood)).collect::<Vec<_>>());
    let mut workers = Vec::new();
    for (number, host) in hosts.iter().enumerate() {
        workers.push(start_with(number, host, &fabric).await);
    }
    let dispatcher = Dispatcher::new(config_with(&fabric), None);
    dispatcher.set_view(placement(hosts.len(), &replicas(hosts.len())), &members(workers.iter().enumerate()));
    for number in 0..hosts.len() {
        until(|| edge(&dispatcher, number).transport == "nccl").await;
    }
    (dispatcher, hosts, workers, fabric)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sums_are_the_same_for_frames_of_any_size_and_after_a_rest() {
    let (dispatcher, hosts, _workers, fabric) = cluster(&[Mood::Answers]).await;
    // One that fills a slot in part, and one that needs a second message.
    for rows in [1, 5, 400] {
        let (x, routes) = micro_batch(rows, rows as u64);
        let before = fabric.message_count();
        let y = call(&dispatcher, &x, &routes).await.unwrap();
        assert_eq!(bits(&y), bits(&expected(&x, &routes)));
        let messages = fabric.message_count() - before;
        assert!(if rows == 400 { messages >= 4 } else { messages >= 2 }, "{rows} rows: {messages} messages");
        tokio::time::sleep(3 * IDLE_AFTER).await;
    }
    let status = edge(&dispatcher, 0);
    assert_eq!((status.detail.as_str(), status.lane_failures, hosts[0].frame_count()), ("connected; lane up", 0, 3));
    let row_bytes = (HIDDEN * size_of::<f32>()) as u64;
    assert!(status.sent_bytes > 406 * row_bytes && status.received_bytes > 406 * row_bytes, "{status:?}");
    assert!(0 < status.answer_p50_us && status.answer_p50_us <= status.answer_p99_us, "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_lane_moves_nothing() {
    let (dispatcher, _hosts, _workers, fabric) = cluster(&[Mood::Answers]).await;
    tokio::time::sleep(4 * IDLE_AFTER).await;
    let before = fabric.message_count();
    tokio::time::sleep(4 * IDLE_AFTER).await;
    assert_eq!(fabric.message_count(), before);
    let (x, routes) = micro_batch(3, 1);
    assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
    assert!(fabric.message_count() > before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_at_once_get_their_own_answers() {
    let (dispatcher, _hosts, _workers, fabric) = cluster(&[Mood::Answers, Mood::Answers]).await;
    let calls = (0..100u64).map(|seed| {
        let dispatcher = dispatcher.clone();
        async move {
            let (x, routes) = micro_batch(1 + seed as usize % 50, seed);
            let sent = dispatcher.dispatch(LAYER, seed as u8, Rows::F32(x.clone()), TOP_K, &routes).unwrap();
            let y = combined(sent, x.len() / HIDDEN).await.unwrap();
            assert_eq!(bits(&y), bits(&expected(&x, &routes)));
        }
    });
    futures::future::join_all(calls).await;
    assert_eq!(dispatcher.outstanding(), 0);
    // As many as a lane has room for went over it, and came back, at least.
    assert!(fabric.message_count() > 2 * LANE_FRAMES_MAX, "{}", fabric.message_count());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_lane_carried_is_asked_again_over_the_stream_and_a_new_lane_comes() {
    let (dispatcher, hosts, _workers, fabric) = cluster(&[Mood::Keeps]).await;
    let (x, routes) = micro_batch(4, 1);
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| hosts[0].frame_count() == 1).await;
    fabric.fail_all("the network is gone");
    until(|| hosts[0].frame_count() == 2).await;
    assert_eq!(edge(&dispatcher, 0).transport, "grpc");
    // Answers both: that of the lane has no way back any more.
    hosts[0].answer_held();
    assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
    // Nobody else was asked: the tracker knows nothing of it.
    assert_eq!((dispatcher.counts().sent, dispatcher.counts().resent), (1, 0));

    until(|| edge(&dispatcher, 0).transport == "nccl").await;
    assert_eq!(edge(&dispatcher, 0).lane_failures, 1);
    hosts[0].set_mood(Mood::Answers);
    assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_on_which_nothing_moves_is_given_up() {
    // What is small leaves, and nobody answers; what is large does not leave.
    for (rows, timeout, words) in [(4, ANSWER_TIMEOUT, "no answer for"), (4000, SEND_TIMEOUT, "took longer than")] {
        let (dispatcher, _hosts, _workers, fabric) = cluster(&[Mood::Answers]).await;
        fabric.freeze_all();
        let (x, routes) = micro_batch(rows, 1);
        let start = Instant::now();
        assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
        let took = start.elapsed();
        assert!(took < timeout + Duration::from_secs(3), "{took:?}");
        let detail = edge(&dispatcher, 0).detail;
        assert!(detail.contains(words), "{detail}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_leaves_its_frames_to_a_replica() {
    let (dispatcher, hosts, mut workers, _fabric) = cluster(&[Mood::Keeps, Mood::Keeps]).await;
    let (x, routes) = micro_batch(4, 1);
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| hosts.iter().all(|host| host.frame_count() > 0)).await;
    hosts[1].set_mood(Mood::Answers);
    hosts[1].answer_held();
    drop(workers.remove(0));
    assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_common_library_frames_go_over_the_stream_and_the_edge_says_why() {
    for (theirs, words) in
        [("", "lane none: the worker has no NCCL"), ("2.20", "lane none: NCCL is fake here and 2.20 there")]
    {
        let (fabric, host) = (FakeFabric::default(), FakeHost::new(Mood::Answers));
        let mut peer = hello(Role::ExpertWorker, "w0");
        peer.nccl = theirs.into();
        let remote = RemoteWorker::start(host.clone(), peer).await;
        let dispatcher = Dispatcher::new(config_with(&fabric), None);
        dispatcher.set_view(placement(1, &replicas(1)), &members([(0, &remote)]));
        until(|| edge(&dispatcher, 0).detail.contains(words)).await;
        let (x, routes) = micro_batch(4, 1);
        assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
        assert_eq!((edge(&dispatcher, 0).transport.as_str(), fabric.message_count()), ("grpc", 0));
    }
}

/// One that says it has what it has not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offer_that_is_refused_is_not_the_end_of_the_edge() {
    let (fabric, host) = (FakeFabric::default(), FakeHost::new(Mood::Answers));
    let remote = RemoteWorker::start(host.clone(), with_lanes(hello(Role::ExpertWorker, "w0"), &fabric)).await;
    let dispatcher = Dispatcher::new(config_with(&fabric), None);
    dispatcher.set_view(placement(1, &replicas(1)), &members([(0, &remote)]));
    until(|| edge(&dispatcher, 0).detail.contains("the worker says: there is no NCCL here")).await;
    let (x, routes) = micro_batch(4, 1);
    assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
}

/// NCCL keeps threads and sockets of each id that only one side takes up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_without_room_for_a_lane_wastes_no_ids() {
    for (here, there, words, ids) in [
        (0, LANES_MAX, "lane 0 lanes are open or being connected", 0),
        (LANES_MAX, 0, "the worker says: 0 lanes are open or being connected", 2),
    ] {
        let (fabric, host) = (FakeFabric::default(), FakeHost::new(Mood::Answers));
        let remote = start_with(0, &host, &fabric.limited(there)).await;
        let dispatcher = Dispatcher::new(config_with(&fabric.limited(here)), None);
        dispatcher.set_view(placement(1, &replicas(1)), &members([(0, &remote)]));
        until(|| edge(&dispatcher, 0).detail.contains(words)).await;
        // The next offer comes after two seconds at most.
        tokio::time::sleep(2 * BACKOFF_MIN + Duration::from_millis(500)).await;
        assert!(edge(&dispatcher, 0).detail.contains(words), "{}", edge(&dispatcher, 0).detail);
        assert_eq!((fabric.id_count(), edge(&dispatcher, 0).lane_failures), (ids, 0));
        let (x, routes) = micro_batch(4, 1);
        assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lane_has_in_hand_is_answered_when_its_worker_closes() {
    let (dispatcher, hosts, workers, _fabric) = cluster(&[Mood::Keeps]).await;
    let (x, routes) = micro_batch(4, 1);
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| hosts[0].frame_count() == 1).await;
    workers[0].closing.cancel();
    tokio::time::sleep(2 * IDLE_AFTER).await;
    hosts[0].answer_held();
    assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
    assert_eq!((hosts[0].frame_count(), dispatcher.counts().resent), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lane_has_in_hand_is_asked_over_the_stream_when_its_edge_is_given_up() {
    let (dispatcher, hosts, workers, _fabric) = cluster(&[Mood::Keeps, Mood::Keeps]).await;
    let (x, routes) = micro_batch(4, 1);
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| hosts.iter().all(|host| host.frame_count() == 1)).await;
    let without = BTreeMap::from([(LAYER, vec![vec![0]; EXPERTS])]);
    let without = Arc::new(Placement::new(Epoch(2), vec![worker(1)], without).unwrap());
    // The placement before is over with the second view.
    for _ in 0..2 {
        dispatcher.set_view(without.clone(), &members([(1, &workers[1])]));
    }
    until(|| hosts[0].frame_count() == 2).await;
    hosts.iter().for_each(|host| host.answer_held());
    assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
    assert_eq!((hosts[1].frame_count(), dispatcher.counts().resent), (1, 0));
}
