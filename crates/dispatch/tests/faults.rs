//! Workers that fail a call and that no other can stand in for: it waits for them, and at its deadline it ends with an
//! error that names layer, experts and worker; never with a sum that lacks something. Nothing stays outstanding.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moesaic_dispatch::error::ExpertList;
use moesaic_dispatch::{Cause, DispatchError, Dispatcher, Hub, Refusal, RequestFrame, Route};
use moesaic_proto::ExpertId;
use moesaic_proto::v1::{EdgeState, RefusalReason, Role};
use support::*;

/// Holders of `blocks(2)`: w0 has the experts below this, w1 the others.
const FIRST_OF_W1: u16 = (EXPERTS / 2) as u16;

/// What an error lists if w1 failed a call with these routes.
fn asked_of_w1(routes: &[Route]) -> ExpertList {
    let mut experts: Vec<ExpertId> = routes.iter().map(|r| r.expert).filter(|e| e.0 >= FIRST_OF_W1).collect();
    experts.sort_unstable();
    experts.dedup();
    experts.into()
}

fn lost_at_w1(routes: &[Route], cause: Cause) -> DispatchError {
    DispatchError::Lost { layer: LAYER, experts: asked_of_w1(routes), worker: worker(1), cause }
}

fn pair(mood: Mood) -> Vec<Arc<FakeHost>> {
    vec![FakeHost::new(Mood::Answers), FakeHost::new(mood)]
}

/// Beside a worker that answers, one with this mood fails the call with this cause, in this process and behind gRPC.
/// Says how many frames it was given.
async fn check(mood: Mood, deadline: Duration, cause: impl Fn(&RequestFrame) -> Cause) -> [usize; 2] {
    let (x, routes) = micro_batch(4, 1);
    let (near_hosts, far_hosts) = (pair(mood), pair(mood));
    let near = local(&near_hosts, &blocks(2), deadline);
    let (far, _workers) = remote(&far_hosts, &blocks(2), deadline).await;
    let mut given = [0, 0];
    for ((dispatcher, hosts), given) in [(near, near_hosts), (far, far_hosts)].into_iter().zip(&mut given) {
        let error = call(&dispatcher, &x, &routes).await.unwrap_err();
        *given = hosts[1].frame_count();
        let cause = cause(&hosts[1].frames.lock().unwrap()[0]);
        assert_eq!(error, lost_at_w1(&routes, cause));
        assert_eq!(dispatcher.outstanding(), 0);
        let rejected = if mood == Mood::Short { *given as u64 } else { 0 };
        assert_eq!((dispatcher.counts().rejected, dispatcher.counts().resent), (rejected, *given as u64 - 1));
    }
    given
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_is_malformed_fails_its_call_at_once() {
    let refused = |_: &RequestFrame| Cause::Refused(Refusal::new(RefusalReason::Malformed, "as told"));
    assert_eq!(check(Mood::Refuses(RefusalReason::Malformed), PATIENT, refused).await, [1, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_refuses_is_asked_again_until_the_deadline_and_the_error_has_its_own_words() {
    use RefusalReason::*;
    let checks = [Epoch, NotHeld, Busy, Stopping].map(async |reason| {
        let refused = |_: &RequestFrame| Cause::Refused(Refusal::new(reason, "as told"));
        let given = check(Mood::Refuses(reason), Duration::from_secs(1), refused).await;
        assert!(given.into_iter().all(|given| given > 1), "{given:?}");
    });
    futures::future::join_all(checks).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_gives_short_answers_is_asked_again_until_the_deadline_and_each_is_counted() {
    let cause = |asked: &RequestFrame| {
        let outputs = asked.output_count();
        let detail = format!("it has {} values; asked were {outputs} rows of {HIDDEN}", (outputs - 1) * HIDDEN);
        Cause::Answer { detail }
    };
    let given = check(Mood::Short, Duration::from_secs(1), cause).await;
    assert!(given.into_iter().all(|given| given > 1), "{given:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_never_answers_fails_the_call_at_the_deadline_and_its_late_answer_is_dropped() {
    let (x, routes) = row_for(4);
    let hosts = pair(Mood::Keeps);
    let near = local(&hosts, &blocks(2), SHORT);
    let (far, _workers) = remote(&hosts, &blocks(2), SHORT).await;
    for dispatcher in [near, far] {
        let sent = Instant::now();
        let error = call(&dispatcher, &x, &routes).await.unwrap_err();
        let waited = sent.elapsed();
        assert_eq!(error.to_string(), "layer 3, experts 6, 7, 8: worker w1 did not answer within 300 ms");
        assert!(SHORT <= waited && waited < SHORT + Duration::from_secs(2), "it took {waited:?}");
        assert_eq!((dispatcher.outstanding(), dispatcher.counts().sent, dispatcher.counts().unmatched), (0, 2, 0));
        hosts[1].answer_held();
        until(|| dispatcher.counts().unmatched == 1).await;
        assert!(dispatcher.reachable(), "a slow worker is not a lost one");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_gives_a_frame_up_is_asked_again() {
    let (x, routes) = row_for(FIRST_OF_W1);
    for far in [false, true] {
        let hosts = pair(Mood::Keeps);
        let (dispatcher, _workers) = match far {
            false => (local(&hosts, &blocks(2), PATIENT), vec![]),
            true => remote(&hosts, &blocks(2), PATIENT).await,
        };
        let pending = send(&dispatcher, &x, &routes).unwrap();
        until(|| hosts[1].frame_count() == 1).await;
        hosts[1].set_mood(Mood::Answers);
        hosts[1].forget_held();
        assert_eq!(combined(pending, 1).await, Ok(expected(&x, &routes)));
        assert_eq!(hosts[1].frame_count(), 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_closes_answers_what_it_has_and_takes_no_more() {
    let (x, routes) = micro_batch(4, 1);
    let hosts = pair(Mood::Keeps);
    let (dispatcher, workers) = remote(&hosts, &blocks(2), Duration::from_secs(3)).await;
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| hosts[1].frame_count() == 1).await;
    workers[1].closing.cancel();
    hosts[1].answer_held();
    assert_eq!(combined(pending, 4).await.map(|y| bits(&y)), Ok(bits(&expected(&x, &routes))));
    until(|| edge(&dispatcher, 1).detail.contains("the worker is stopping")).await;
    assert!(!dispatcher.reachable());
    let error = call(&dispatcher, &x, &routes).await.unwrap_err();
    let DispatchError::Unreachable { layer, experts, holders, .. } = &error else { panic!("{error}") };
    assert_eq!((*layer, experts, holders.as_str()), (LAYER, &asked_of_w1(&routes), "w1: the worker is stopping"));
    assert_eq!((dispatcher.outstanding(), hosts[1].frame_count()), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_workers_calls_wait_for_it_and_the_others_go_on() {
    let hosts = [FakeHost::new(Mood::Keeps), FakeHost::new(Mood::Keeps)];
    let (dispatcher, mut workers) = remote(&hosts, &blocks(2), PATIENT).await;
    let ((x0, routes0), (x1, routes1)) = (row_for(0), row_for(FIRST_OF_W1));
    let (other, own) = (send(&dispatcher, &x0, &routes0).unwrap(), send(&dispatcher, &x1, &routes1).unwrap());
    until(|| hosts.iter().all(|host| host.frame_count() == 1)).await;

    let address = workers[1].address;
    drop(workers.pop());
    until(|| dispatcher.outstanding() == 1).await;
    hosts[0].answer_held();
    assert_eq!(combined(other, 1).await, Ok(expected(&x0, &routes0)));

    hosts[1].set_mood(Mood::Answers);
    workers.push(RemoteWorker::start_at(address, hosts[1].clone(), hello(Role::ExpertWorker, "w1")).await);
    assert_eq!(combined(own, 1).await, Ok(expected(&x1, &routes1)));
    assert_eq!((dispatcher.outstanding(), dispatcher.counts().resent), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_back_at_its_address_serves_the_calls_that_wait_for_it() {
    let (x, routes) = micro_batch(4, 1);
    let hosts = pair(Mood::Answers);
    let (dispatcher, mut workers) = remote(&hosts, &blocks(2), PATIENT).await;
    let address = workers[1].address;
    for _ in 0..3 {
        drop(workers.pop());
        until(|| !dispatcher.reachable()).await;
        let (asked, pending) = (hosts[1].frame_count(), send(&dispatcher, &x, &routes).unwrap());
        until(|| dispatcher.outstanding() == 0).await;
        assert_eq!(hosts[1].frame_count(), asked);
        workers.push(RemoteWorker::start_at(address, hosts[1].clone(), hello(Role::ExpertWorker, "w1")).await);
        assert_eq!(combined(pending, 4).await, Ok(expected(&x, &routes)));
        assert!(dispatcher.reachable());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_worker_is_away_fails_at_its_deadline_and_says_why() {
    let (x, routes) = micro_batch(4, 1);
    let (dispatcher, mut workers) = remote(&pair(Mood::Answers), &blocks(2), SHORT).await;
    drop(workers.pop());
    until(|| edge(&dispatcher, 1).state() == EdgeState::Down).await;
    let sent = Instant::now();
    let error = call(&dispatcher, &x, &routes).await.unwrap_err();
    let DispatchError::Unreachable { experts, after, holders, .. } = &error else { panic!("{error}") };
    assert_eq!((experts, *after), (&asked_of_w1(&routes), SHORT));
    assert!(holders.starts_with("w1: ") && holders.len() > "w1: ".len(), "{error}");
    assert!(SHORT <= sent.elapsed() && sent.elapsed() < SHORT + Duration::from_secs(2));
    assert_eq!(dispatcher.outstanding(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_a_call_that_was_dropped_changes_nothing() {
    let (x, routes) = micro_batch(4, 1);
    let hosts = [FakeHost::new(Mood::Keeps), FakeHost::new(Mood::Keeps)];
    let near = local(&hosts, &blocks(2), PATIENT);
    let (far, _workers) = remote(&hosts, &blocks(2), PATIENT).await;
    for (calls, dispatcher) in [near, far].into_iter().enumerate() {
        let pending = send(&dispatcher, &x, &routes).unwrap();
        assert_eq!(dispatcher.outstanding(), 2);
        drop(pending);
        assert_eq!(dispatcher.outstanding(), 0);
        // The same where it is dropped while it waits.
        let waiting = call(&dispatcher, &x, &routes);
        assert!(tokio::time::timeout(Duration::from_millis(20), waiting).await.is_err());
        assert_eq!(dispatcher.outstanding(), 0);

        until(|| hosts.iter().all(|host| host.frame_count() == 2 * (calls + 1))).await;
        hosts.iter().for_each(|host| host.answer_held());
        until(|| dispatcher.counts().unmatched == 4).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_has_left_this_process_is_not_asked_until_it_is_back() {
    let (x, routes) = row_for(FIRST_OF_W1);
    let (hub, host) = (Hub::default(), FakeHost::new(Mood::Answers));
    hub.insert(worker(1), host.clone());
    let dispatcher = Dispatcher::new(config(SHORT), Some(hub.clone()));
    let set_view = || dispatcher.set_view(placement(2, &blocks(2)), &BTreeMap::from([(worker(1), member("here"))]));
    set_view();
    assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));

    hub.remove(&worker(1));
    let gone = Cause::EdgeDown { reason: "it has left this process".into() };
    assert_eq!(call(&dispatcher, &x, &routes).await, Err(lost_at_w1(&routes, gone)));
    let words = "layer 3, experts 6, 7, 8, 9, 10: no holder was to be had for 300 ms (w1: it has left this process)";
    assert_eq!(call(&dispatcher, &x, &routes).await.unwrap_err().to_string(), words);

    let waiting = send(&dispatcher, &x, &routes).unwrap();
    hub.insert(worker(1), host.clone());
    set_view();
    assert_eq!(combined(waiting, 1).await, Ok(expected(&x, &routes)));
    assert_eq!(host.frame_count(), 2);
}
