//! Which workers are reached, by which way, and how much is sent to one that takes nothing.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use moesaic_dispatch::grpc::{EDGE_FRAMES_MAX, STREAM_FRAMES_MAX};
use moesaic_dispatch::tracker::Counts;
use moesaic_dispatch::{Cause, DispatchError, Dispatcher, Route, Rows};
use moesaic_proto::v1::{Hello, Role};
use moesaic_proto::{ExpertId, LayerId};
use support::*;
use tokio_util::sync::CancellationToken;

/// Dispatcher and worker, with their Hellos changed, never get together, and dispatch says why.
async fn check_mismatch(caller: fn(&mut Hello), peer: fn(&mut Hello), words: &str) {
    let host = FakeHost::new(Mood::Answers);
    let mut peer_hello = hello(Role::ExpertWorker, "w0");
    peer(&mut peer_hello);
    let remote = RemoteWorker::start(host.clone(), peer_hello).await;
    let mut config = config(PATIENT);
    caller(&mut config.hello);
    let dispatcher = Dispatcher::new(config, None);
    dispatcher.set_view(placement(1, &blocks(1)), &addresses([(0, &remote)]));

    let (x, routes) = micro_batch(1, 1);
    let refused = || send(&dispatcher, &x, &routes).err().unwrap().to_string();
    until(|| refused().contains(words)).await;
    // Some attempts later it is still so.
    for _ in 0..10 {
        assert!(!dispatcher.reachable());
        assert!(refused().starts_with("layer 3: no holder of expert "), "{}", refused());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(host.frame_count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_do_not_match_are_never_reachable_and_the_reason_is_told() {
    type Change = fn(&mut Hello);
    let same: Change = |_| {};
    let table: [(Change, Change, &str); 8] = [
        (same, |h| h.protocol_version += 1, "w0: protocol_version does not match"),
        (same, |h| h.cluster = "other".into(), r#"w0: cluster does not match: here "other", peer "test""#),
        (same, |h| h.fingerprint = "beef".into(), "w0: fingerprint does not match"),
        (same, |h| h.numerics = "bf16".into(), r#"w0: numerics does not match: here "bf16", peer "f32""#),
        (|h| h.role = Role::ExpertWorker.into(), same, "w0: role does not match"),
        // A worker's role and id are for the caller to check.
        (same, |h| h.role = Role::AttentionWorker.into(), "w0: role does not match"),
        (same, |h| h.id = "w1".into(), r#"is "w1"; expected "w0""#),
        (|h| h.source = 1 << 16, same, "w0: source: 65536; expected at most 65535"),
    ];
    let checks = table.map(|(caller, peer, words)| check_mismatch(caller, peer, words));
    futures::future::join_all(checks).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_needs_an_expert_which_nobody_can_serve_sends_nothing() {
    let host = FakeHost::new(Mood::Answers);
    let remote = start(0, &host).await;
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (x, routes) = micro_batch(4, 1);
    let before = send(&dispatcher, &x, &routes).err();
    assert_eq!(before, Some(DispatchError::NoPlacement { layer: LAYER }));

    dispatcher.set_view(placement(2, &blocks(2)), &addresses([(0, &remote)]));
    let (x0, routes0) = row_for(0);
    until(|| send(&dispatcher, &x0, &routes0).is_ok()).await;
    until(|| host.frame_count() == 1).await;
    // Only w0's experts are held by a worker that may be used.
    let error = send(&dispatcher, &x, &routes).err().unwrap().to_string();
    assert!(error.ends_with("in epoch 1 can be reached (w1: not available)"), "{error}");
    let elsewhere = dispatcher.dispatch(LayerId(9), 0, Rows::F32(x0), TOP_K, &routes0).err().unwrap();
    assert!(elsewhere.to_string().starts_with("layer 9: no holder of expert 0"), "{elsewhere}");
    assert!(!dispatcher.reachable());
    assert_eq!((dispatcher.outstanding(), host.frame_count()), (0, 1));
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
async fn a_new_address_moves_the_edge_and_the_old_ones_end_fails_only_its_own_calls() {
    let (old_host, new_host) = (FakeHost::new(Mood::Silent), FakeHost::new(Mood::Silent));
    let (old, new) = (start(0, &old_host).await, start(0, &new_host).await);
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (x, routes) = micro_batch(4, 1);
    dispatcher.set_view(placement(1, &blocks(1)), &addresses([(0, &old)]));
    until(|| dispatcher.reachable()).await;
    let old_call = send(&dispatcher, &x, &routes).unwrap();
    until(|| old_host.frame_count() == 1).await;

    dispatcher.set_view(placement(1, &blocks(1)), &addresses([(0, &new)]));
    until(|| dispatcher.reachable()).await;
    let new_call = send(&dispatcher, &x, &routes).unwrap();
    until(|| new_host.frame_count() == 1).await;
    drop(old);
    let error = combined(old_call, 4).await.unwrap_err();
    assert!(matches!(error, DispatchError::Lost { cause: Cause::EdgeDown { .. }, .. }), "{error}");
    new_host.answer_held();
    assert_eq!(combined(new_call, 4).await, Ok(expected(&x, &routes)));
    assert_eq!(old_host.frame_count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_still_wanted_is_kept() {
    let host = FakeHost::new(Mood::Silent);
    let remote = start(0, &host).await;
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (x, routes) = micro_batch(4, 1);
    let set_view = || dispatcher.set_view(placement(1, &blocks(1)), &addresses([(0, &remote)]));
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
async fn a_worker_that_is_no_longer_in_the_view_gets_nothing_more_and_its_last_answers_count() {
    let host = FakeHost::new(Mood::Silent);
    let remote = start(0, &host).await;
    // Each stream's reader has the host in hand.
    let idle = Arc::strong_count(&host);
    let streams = || Arc::strong_count(&host) - idle;
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (x, routes) = micro_batch(4, 1);
    dispatcher.set_view(placement(1, &blocks(1)), &addresses([(0, &remote)]));
    until(|| dispatcher.reachable()).await;
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| host.frame_count() == 1 && streams() == 1).await;

    dispatcher.set_view(placement(1, &blocks(1)), &BTreeMap::new());
    assert!(!dispatcher.reachable());
    let error = send(&dispatcher, &x, &routes).err().unwrap().to_string();
    assert!(error.ends_with("(w0: not available)"), "{error}");
    until(|| streams() == 0).await;
    host.answer_held();
    assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
    assert_eq!((dispatcher.outstanding(), host.frame_count()), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_with_too_much_unanswered_is_not_read_on_and_the_others_are_served() {
    const MORE: usize = 20;
    let host = FakeHost::new(Mood::SilentTo(SOURCE));
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
    modest.set_view(placement(1, &blocks(1)), &addresses([(0, &workers[0])]));
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
    assert_eq!((greedy.outstanding(), greedy.counts()), (0, Counts::default()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_a_worker_does_not_empty_fails_the_next_call_and_no_other() {
    const ROWS: usize = 1024;
    let host = FakeHost::new(Mood::Silent);
    let (dispatcher, _workers) = remote(std::slice::from_ref(&host), &blocks(1), PATIENT).await;
    let (x, routes) = micro_batch(ROWS, 1);
    // The host's share, the queue's, and what the connection's windows take meanwhile.
    let sent_max = STREAM_FRAMES_MAX + EDGE_FRAMES_MAX + 64;
    let mut pending = Vec::new();
    while pending.len() == dispatcher.outstanding() {
        pending.push(send(&dispatcher, &x, &routes).unwrap());
        assert!(pending.len() <= sent_max);
    }
    let error = combined(pending.pop().unwrap(), ROWS).await.unwrap_err().to_string();
    assert!(error.ends_with("worker w0 takes no more frames: 64 wait to be sent to it"), "{error}");

    let wanted = expected(&x, &routes);
    until(|| {
        host.answer_held();
        dispatcher.outstanding() == 0
    })
    .await;
    for pending in pending {
        assert!(combined(pending, ROWS).await.is_ok_and(|y| bits(&y) == bits(&wanted)));
    }
}

/// Leaving and coming back while calls are made: one is sent and answered, or not sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_that_changes_meanwhile_loses_no_call() {
    let host = FakeHost::new(Mood::Answers);
    let (dispatcher, workers) = remote(std::slice::from_ref(&host), &blocks(1), PATIENT).await;
    let (x, routes) = row_for(0);
    let (stop, caller) = (CancellationToken::new(), dispatcher.clone());
    let stopped = stop.clone();
    let calls = tokio::spawn(async move {
        let (mut served, mut unsent) = (0, 0);
        while !stopped.is_cancelled() {
            match call(&caller, &x, &routes).await {
                Ok(_) => served += 1,
                Err(DispatchError::Unreachable { .. }) => unsent += 1,
                Err(error) => panic!("{error}"),
            }
            // Nothing in an unsent call waits, and the edge's task may be this thread's next.
            tokio::task::yield_now().await;
        }
        (served, unsent)
    });
    for _ in 0..500 {
        dispatcher.set_view(placement(1, &blocks(1)), &BTreeMap::new());
        dispatcher.set_view(placement(1, &blocks(1)), &addresses(workers.iter().enumerate()));
        until(|| dispatcher.reachable()).await;
    }
    stop.cancel();
    let (served, unsent) = calls.await.unwrap();
    assert!(served > 0 && unsent > 0);
}
