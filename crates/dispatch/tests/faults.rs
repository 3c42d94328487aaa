//! Workers that fail a call: it ends with an error that names layer, experts and worker, never with a sum that lacks
//! something, and leaves nothing outstanding.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moesaic_dispatch::error::ExpertList;
use moesaic_dispatch::tracker::Counts;
use moesaic_dispatch::{Cause, DispatchError, Dispatcher, Hub, Refusal, RequestFrame, Route};
use moesaic_proto::ExpertId;
use moesaic_proto::v1::{RefusalReason, Role};
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
async fn check(mood: Mood, cause: impl Fn(&RequestFrame) -> Cause, counts: Counts) {
    let (x, routes) = micro_batch(4, 1);
    let (near_hosts, far_hosts) = (pair(mood), pair(mood));
    let near = local(&near_hosts, &blocks(2), PATIENT);
    let (far, _workers) = remote(&far_hosts, &blocks(2), PATIENT).await;
    for (dispatcher, hosts) in [(near, near_hosts), (far, far_hosts)] {
        let error = call(&dispatcher, &x, &routes).await.unwrap_err();
        let cause = cause(&hosts[1].frames.lock().unwrap()[0]);
        assert_eq!(error, lost_at_w1(&routes, cause));
        assert_eq!(dispatcher.outstanding(), 0);
        assert_eq!(dispatcher.counts().rejected, counts.rejected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_fails_the_call_in_the_workers_own_words() {
    use RefusalReason::*;
    for reason in [Malformed, Epoch, NotHeld, Busy, Stopping] {
        check(Mood::Refuses(reason), |_| Cause::Refused(Refusal::new(reason, "as told")), Counts::default()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_answer_fails_the_call_and_is_counted() {
    let cause = |asked: &RequestFrame| {
        let outputs = asked.output_count();
        let detail = format!("it has {} values; asked were {outputs} rows of {HIDDEN}", (outputs - 1) * HIDDEN);
        Cause::Answer { detail }
    };
    check(Mood::Short, cause, Counts { rejected: 1, ..Counts::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_worker_fails_the_call_at_the_deadline_and_its_late_answer_is_dropped() {
    let deadline = Duration::from_millis(300);
    let (x, routes) = row_for(4);
    let hosts = pair(Mood::Silent);
    let near = local(&hosts, &blocks(2), deadline);
    let (far, _workers) = remote(&hosts, &blocks(2), deadline).await;
    for dispatcher in [near, far] {
        let sent = Instant::now();
        let error = call(&dispatcher, &x, &routes).await.unwrap_err();
        let waited = sent.elapsed();
        assert_eq!(error.to_string(), "layer 3, experts 6, 7, 8: worker w1 did not answer within 300 ms");
        assert!(deadline <= waited && waited < deadline + Duration::from_secs(2), "it took {waited:?}");
        assert_eq!((dispatcher.outstanding(), dispatcher.counts()), (0, Counts::default()));
        hosts[1].answer_held();
        until(|| dispatcher.counts() == Counts { unmatched: 1, ..Counts::default() }).await;
        assert!(dispatcher.reachable(), "a slow worker is not a lost one");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_gives_a_frame_up_refuses_it() {
    let (x, routes) = row_for(FIRST_OF_W1);
    let hosts = pair(Mood::Silent);
    let near = local(&hosts, &blocks(2), PATIENT);
    let (far, _workers) = remote(&hosts, &blocks(2), PATIENT).await;
    for (calls, dispatcher) in [near, far].into_iter().enumerate() {
        let pending = send(&dispatcher, &x, &routes).unwrap();
        until(|| hosts[1].frame_count() == calls + 1).await;
        hosts[1].forget_held();
        let refusal = Refusal::new(RefusalReason::Stopping, "the worker gave the frame up");
        assert_eq!(combined(pending, 1).await, Err(lost_at_w1(&routes, Cause::Refused(refusal))));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_closes_answers_what_it_has_and_takes_no_more() {
    let (x, routes) = micro_batch(4, 1);
    let hosts = pair(Mood::Silent);
    let (dispatcher, workers) = remote(&hosts, &blocks(2), PATIENT).await;
    let pending = send(&dispatcher, &x, &routes).unwrap();
    until(|| hosts[1].frame_count() == 1).await;
    workers[1].closing.cancel();
    hosts[1].answer_held();
    assert_eq!(combined(pending, 4).await.map(|y| bits(&y)), Ok(bits(&expected(&x, &routes))));
    let reason = "the worker is stopping";
    until(|| send(&dispatcher, &x, &routes).is_err_and(|error| error.to_string().contains(reason))).await;
    assert!(!dispatcher.reachable());
    assert_eq!(dispatcher.outstanding(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_worker_fails_its_own_calls_at_once() {
    let hosts = [FakeHost::new(Mood::Silent), FakeHost::new(Mood::Silent)];
    let (dispatcher, mut workers) = remote(&hosts, &blocks(2), PATIENT).await;
    let ((x0, routes0), (x1, routes1)) = (row_for(0), row_for(FIRST_OF_W1));
    let (other, own) = (send(&dispatcher, &x0, &routes0).unwrap(), send(&dispatcher, &x1, &routes1).unwrap());
    until(|| hosts.iter().all(|host| host.frame_count() == 1)).await;

    let killed = Instant::now();
    drop(workers.pop());
    let error = combined(own, 1).await.unwrap_err();
    assert!(killed.elapsed() < Duration::from_secs(2), "it took {:?}", killed.elapsed());
    let DispatchError::Lost { cause: Cause::EdgeDown { reason }, .. } = &error else { panic!("{error}") };
    assert!(!reason.is_empty());
    assert_eq!(error, lost_at_w1(&routes1, Cause::EdgeDown { reason: reason.clone() }));

    assert_eq!(dispatcher.outstanding(), 1, "the other worker's call goes on");
    hosts[0].answer_held();
    assert_eq!(combined(other, 1).await, Ok(expected(&x0, &routes0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_back_at_its_address_serves_again() {
    let (x, routes) = micro_batch(4, 1);
    let hosts = pair(Mood::Answers);
    let (dispatcher, mut workers) = remote(&hosts, &blocks(2), PATIENT).await;
    let address = workers[1].address;
    for _ in 0..3 {
        drop(workers.pop());
        until(|| !dispatcher.reachable()).await;
        let error = send(&dispatcher, &x, &routes).err().unwrap();
        assert!(matches!(&error, DispatchError::Unreachable { holders, .. } if holders.starts_with("w1: ")), "{error}");
        workers.push(RemoteWorker::start_at(address, hosts[1].clone(), hello(Role::ExpertWorker, "w1")).await);
        until(|| dispatcher.reachable()).await;
        assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_a_call_that_was_dropped_changes_nothing() {
    let (x, routes) = micro_batch(4, 1);
    let hosts = [FakeHost::new(Mood::Silent), FakeHost::new(Mood::Silent)];
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
        until(|| dispatcher.counts() == Counts { unmatched: 4, ..Counts::default() }).await;
    }
}

#[tokio::test]
async fn a_worker_that_has_left_this_process_is_not_asked() {
    let (x, routes) = row_for(FIRST_OF_W1);
    let hub = Hub::default();
    hub.insert(worker(1), FakeHost::new(Mood::Answers));
    let dispatcher = Dispatcher::new(config(PATIENT), Some(hub.clone()));
    dispatcher.set_view(placement(2, &blocks(2)), &BTreeMap::from([(worker(1), "here".to_owned())]));
    assert_eq!(call(&dispatcher, &x, &routes).await, Ok(expected(&x, &routes)));
    hub.remove(&worker(1));
    let error = call(&dispatcher, &x, &routes).await.unwrap_err();
    let words = "layer 3: no holder of expert 6 in epoch 1 can be reached (w1: left this process)";
    assert_eq!(error.to_string(), words);
}
