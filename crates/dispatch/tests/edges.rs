//! Which workers are reached, by which way, and how much is sent to one that takes nothing.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moesaic_dispatch::grpc::{EDGE_FRAMES_MAX, STREAM_FRAMES_MAX};
use moesaic_dispatch::{DispatchError, Dispatcher, Route, Rows};
use moesaic_proto::v1::{EdgeState, Hello, Role};
use moesaic_proto::{Epoch, ExpertId, LayerId, Placement};
use support::*;
use tokio_util::sync::CancellationToken;

/// Dispatcher and worker, with their Hellos changed, never get together, and a call says why.
async fn check_mismatch(caller: fn(&mut Hello), peer: fn(&mut Hello), words: &str) {
    let host = FakeHost::new(Mood::Answers);
    let mut peer_hello = hello(Role::ExpertWorker, "w0");
    peer(&mut peer_hello);
    let remote = RemoteWorker::start(host.clone(), peer_hello).await;
    let mut config = config(Duration::from_millis(50));
    caller(&mut config.hello);
    let dispatcher = Dispatcher::new(config, None);
    dispatcher.set_view(placement(1, &blocks(1)), &members([(0, &remote)]));

    let (x, routes) = row_for(0);
    until(|| edge(&dispatcher, 0).detail.contains(words)).await;
    // Some attempts later it is still so.
    for _ in 0..3 {
        assert!(!dispatcher.reachable());
        let error = call(&dispatcher, &x, &routes).await.unwrap_err().to_string();
        let start = "layer 3, experts 0, 1, 2, 3, 4: no holder was to be had for 50 ms (w0: ";
        assert!(error.starts_with(start) && error.contains(words), "{error}");
    }
    assert_eq!(host.frame_count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_do_not_match_are_never_reachable_and_the_reason_is_told() {
    type Change = fn(&mut Hello);
    let same: Change = |_| {};
    let table: [(Change, Change, &str); 8] = [
        (same, |h| h.protocol_version += 1, "protocol_version does not match"),
        (same, |h| h.cluster = "other".into(), r#"cluster does not match: here "other", peer "test""#),
        (same, |h| h.fingerprint = "beef".into(), "fingerprint does not match"),
        (same, |h| h.numerics = "bf16".into(), r#"numerics does not match: here "bf16", peer "f32""#),
        (|h| h.role = Role::ExpertWorker.into(), same, "role does not match"),
        // A worker's role and id are for the caller to check.
        (same, |h| h.role = Role::AttentionWorker.into(), "role does not match"),
        (same, |h| h.id = "w1".into(), r#"is "w1"; expected "w0""#),
        (|h| h.source = 1 << 16, same, "source: 65536; expected at most 65535"),
    ];
    let checks = table.map(|(caller, peer, words)| check_mismatch(caller, peer, words));
    futures::future::join_all(checks).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_needs_an_expert_which_nobody_can_serve_fails_at_its_deadline() {
    let host = FakeHost::new(Mood::Answers);
    let remote = start(0, &host).await;
    let dispatcher = Dispatcher::new(config(SHORT), None);
    let (x, routes) = micro_batch(4, 1);
    let before = send(&dispatcher, &x, &routes).err();
    assert_eq!(before, Some(DispatchError::NoPlacement { layer: LAYER }));

    dispatcher.set_view(placement(2, &blocks(2)), &members([(0, &remote)]));
    until(|| edge(&dispatcher, 0).state() == EdgeState::Live).await;
    let (x0, routes0) = row_for(0);
    assert_eq!(call(&dispatcher, &x0, &routes0).await, Ok(expected(&x0, &routes0)));
    // Only w0's experts are held by a worker that may be used.
    let error = call(&dispatcher, &x, &routes).await.unwrap_err().to_string();
    assert!(error.ends_with("no holder was to be had for 300 ms (w1: not available)"), "{error}");
    let elsewhere = dispatcher.dispatch(LayerId(9), 0, Rows::F32(x0), TOP_K, &routes0).unwrap();
    let error = combined(elsewhere, 1).await.unwrap_err().to_string();
    assert_eq!(error, "layer 9, experts 0, 1, 2, 3, 4: no holder was to be had for 300 ms ()");
    assert!(!dispatcher.reachable());
    assert_eq!((dispatcher.outstanding(), host.frame_count()), (0, 2));
}

#[tokio::test]
async fn input_that_does_not_fit_is_an_error_that_says_what_was_given() {
    let host = FakeHost::new(Mood::Answers);
    let dispatcher = local(std::slice::from_ref(&host), &blocks(1), PATIENT);
    let check = |rows: Rows, top_k: usize, experts: &[u16], weight: f32, words: &str| {
        let routes: Vec<Route> = experts.iter().map(|&e| Route { expert: ExpertId(e), weight }).collect();
        let error = dispatcher.dispatch(LAYER, 0, rows, top_k, &routes).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    };
    let row = || Rows::F32(vec![1.0; HIDDEN]);
    check(Rows::F32(vec![1.0; HIDDEN + 1]), 1, &[0], 1.0, "25 values of rows of 24, and 1 routes of 1 a row");
    check(row(), 2, &[0], 1.0, "24 values of rows of 24, and 1 routes of 2 a row");
    check(row(), 0, &[], 1.0, "0 routes of 0 a row");
    check(row(), 2, &[3, 3], 1.0, "row 0: experts must ascend below 12");
    check(row(), 2, &[4, 3], 1.0, "row 0: experts must ascend below 12");
    check(row(), 1, &[EXPERTS as u16], 1.0, "row 0: experts must ascend below 12");
    check(row(), 1, &[0], f32::NAN, "weights be finite");
    assert_eq!(host.frame_count(), 0);

    let (x, routes) = micro_batch(2, 1);
    let pending = send(&dispatcher, &x, &routes).unwrap();
    let error = pending.combine(&mut [0.0; HIDDEN]).await.unwrap_err().to_string();
    assert!(error.ends_with("y has 24 values; expected 48"), "{error}");
}

/// Two processes of one worker, one after the other: the first keeps its call until it dies, the second must not be
/// taken for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_address_moves_the_edge_and_the_old_ones_end_costs_only_its_own_calls() {
    let (old_host, new_host) = (FakeHost::new(Mood::Keeps), FakeHost::new(Mood::Keeps));
    let (old, new) = (start(0, &old_host).await, start(0, &new_host).await);
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (x, routes) = micro_batch(4, 1);
    dispatcher.set_view(placement(1, &blocks(1)), &members([(0, &old)]));
    until(|| dispatcher.reachable()).await;
    let answered = send(&dispatcher, &x, &routes).unwrap();
    until(|| old_host.frame_count() == 1).await;

    dispatcher.set_view(placement(1, &blocks(1)), &members([(0, &new)]));
    old_host.answer_held();
    assert_eq!(combined(answered, 4).await, Ok(expected(&x, &routes)));
    until(|| dispatcher.reachable()).await;
    let new_call = send(&dispatcher, &x, &routes).unwrap();
    until(|| new_host.frame_count() == 1).await;
    dispatcher.set_view(placement(1, &blocks(1)), &members([(0, &old)]));
    until(|| dispatcher.reachable()).await;
    let old_call = send(&dispatcher, &x, &routes).unwrap();
    until(|| old_host.frame_count() == 2).await;
    drop(new);
    // It is asked of the one that is there now.
    until(|| old_host.frame_count() == 3).await;
    old_host.answer_held();
    assert_eq!(combined(new_call, 4).await, Ok(expected(&x, &routes)));
    assert_eq!(combined(old_call, 4).await, Ok(expected(&x, &routes)));
    assert_eq!((new_host.frame_count(), dispatcher.counts().resent), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_still_wanted_is_kept() {
    let host = FakeHost::new(Mood::Keeps);
    let remote = start(0, &host).await;
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (x, routes) = micro_batch(4, 1);
    let set_view = || dispatcher.set_view(placement(1, &blocks(1)), &members([(0, &remote)]));
    set_view();
    until(|| dispatcher.reachable()).await;
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| host.frame_count() == 1).await;
    set_view();
    assert!(dispatcher.reachable(), "without a moment in between");
    host.answer_held();
    assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_no_longer_placed_gets_nothing_more_and_its_last_answers_count() {
    let hosts = [FakeHost::new(Mood::Keeps), FakeHost::new(Mood::Keeps)];
    let workers = [start(0, &hosts[0]).await, start(1, &hosts[1]).await];
    // Each stream's reader has the host in hand.
    let idle = Arc::strong_count(&hosts[0]);
    let streams = || Arc::strong_count(&hosts[0]) - idle;
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (x, routes) = micro_batch(4, 1);
    dispatcher.set_view(placement(2, &vec![vec![0]; EXPERTS]), &members(workers.iter().enumerate()));
    until(|| dispatcher.reachable() && edge(&dispatcher, 1).state() == EdgeState::Live).await;
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| hosts[0].frame_count() == 1 && streams() == 1).await;

    let layers = BTreeMap::from([(LAYER, vec![vec![0]; EXPERTS])]);
    let only_w1 = Arc::new(Placement::new(Epoch(2), vec![worker(1)], layers).unwrap());
    dispatcher.set_view(only_w1.clone(), &members(workers.iter().enumerate()));
    assert_eq!(dispatcher.epoch(), Some(Epoch(2)));
    // Under the placement of today it is of no use: its stream ends when what it has in hand is answered, and what it was
    // asked is asked of another as well.
    dispatcher.set_view(only_w1, &members(workers.iter().enumerate()));
    until(|| streams() == 0 && hosts[1].frame_count() == 1).await;
    hosts[0].answer_held();
    assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
    hosts[1].answer_held();
    until(|| dispatcher.counts().unmatched == 1).await;
    assert_eq!((dispatcher.outstanding(), hosts[0].frame_count(), hosts[1].epochs()), (0, 1, vec![2]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_with_too_much_unanswered_is_not_read_on_and_the_others_are_served() {
    const MORE: usize = 20;
    let host = FakeHost::new(Mood::KeepsOf(SOURCE));
    let (greedy, workers) = remote(std::slice::from_ref(&host), &blocks(1), PATIENT).await;
    let (x, routes) = row_for(0);
    let from_greedy = || host.frames.lock().unwrap().iter().filter(|frame| frame.header.source == SOURCE).count();
    let mut pending = Vec::new();
    for sent in 1..=STREAM_FRAMES_MAX {
        pending.push(send(&greedy, &x, &routes).unwrap());
        until(|| from_greedy() == sent).await;
    }
    pending.extend((0..MORE).map(|_| send(&greedy, &x, &routes).unwrap()));

    let mut modest = config(PATIENT);
    (modest.source, modest.hello.source) = (SOURCE + 1, u32::from(SOURCE) + 1);
    let modest = Dispatcher::new(modest, None);
    modest.set_view(placement(1, &blocks(1)), &members([(0, &workers[0])]));
    until(|| modest.reachable()).await;
    for _ in 0..50 {
        assert_eq!(call(&modest, &x, &routes).await, Ok(expected(&x, &routes)));
        assert_eq!(from_greedy(), STREAM_FRAMES_MAX);
    }

    host.answer_held();
    until(|| from_greedy() == STREAM_FRAMES_MAX + MORE).await;
    host.answer_held();
    for pending in pending {
        assert_eq!(combined(pending, 1).await, Ok(expected(&x, &routes)));
    }
    let counts = greedy.counts();
    assert_eq!((greedy.outstanding(), counts.resent, counts.unmatched), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_for_which_a_workers_queue_has_no_room_wait_for_it() {
    const ROWS: usize = 1024;
    let host = FakeHost::new(Mood::Keeps);
    let (dispatcher, _workers) = remote(std::slice::from_ref(&host), &blocks(1), PATIENT).await;
    let (x, routes) = micro_batch(ROWS, 1);
    // The host's share, the queue's, and what the connection's windows take meanwhile.
    let sent_max = STREAM_FRAMES_MAX + EDGE_FRAMES_MAX + 64;
    let mut pending = Vec::new();
    while pending.len() == dispatcher.outstanding() {
        pending.push(send(&dispatcher, &x, &routes).unwrap());
        assert!(pending.len() <= sent_max);
    }
    host.set_mood(Mood::Answers);
    host.answer_held();
    let wanted = expected(&x, &routes);
    for pending in pending {
        assert!(combined(pending, ROWS).await.is_ok_and(|y| bits(&y) == bits(&wanted)));
    }
    assert!(dispatcher.counts().resent > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_for_which_no_queue_has_room_is_taken_by_another_holder() {
    const ROWS: usize = 1024;
    let hosts = [FakeHost::new(Mood::Keeps), FakeHost::new(Mood::Answers)];
    let (dispatcher, workers) = remote(&hosts, &blocks(1), PATIENT).await;
    let (x, routes) = micro_batch(ROWS, 1);
    let mut pending = Vec::new();
    // Until the connection takes no more out of the queue, either.
    while pending.len() == dispatcher.outstanding() {
        pending.push(send(&dispatcher, &x, &routes).unwrap());
        let settled = Instant::now() + Duration::from_millis(200);
        while pending.len() > dispatcher.outstanding() && Instant::now() < settled {
            tokio::time::sleep(POLL).await;
        }
    }
    assert_eq!(hosts[1].frame_count(), 0);
    dispatcher.set_view(placement_at(2, 2, &replicas(2)), &members(workers.iter().enumerate()));
    let wanted = expected(&x, &routes);
    let is_answered = async |call| combined(call, ROWS).await.is_ok_and(|y| bits(&y) == bits(&wanted));
    assert!(is_answered(pending.pop().unwrap()).await);
    hosts[0].set_mood(Mood::Answers);
    hosts[0].answer_held();
    for call in pending {
        assert!(is_answered(call).await);
    }
}

/// Moving there and back while calls are made: each is done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_that_changes_meanwhile_loses_no_call() {
    let host = FakeHost::new(Mood::Answers);
    let workers = [start(0, &host).await, start(0, &host).await];
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    dispatcher.set_view(placement(1, &blocks(1)), &members([(0, &workers[0])]));
    let (x, routes) = row_for(0);
    let (stop, caller) = (CancellationToken::new(), dispatcher.clone());
    let stopped = stop.clone();
    let calls = tokio::spawn(async move {
        let mut served = 0;
        while !stopped.is_cancelled() {
            assert_eq!(call(&caller, &x, &routes).await, Ok(expected(&x, &routes)));
            served += 1;
        }
        served
    });
    for round in 1..=300 {
        dispatcher.set_view(placement(1, &blocks(1)), &members([(0, &workers[round % 2])]));
        until(|| dispatcher.reachable()).await;
        dispatcher.set_view(placement(1, &blocks(1)), &BTreeMap::new());
        assert!(dispatcher.reachable());
    }
    stop.cancel();
    assert!(calls.await.unwrap() > 0);
    assert_eq!(dispatcher.outstanding(), 0);
}
