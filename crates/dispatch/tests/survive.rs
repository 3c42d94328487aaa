//! Workers that are lost, silent or slow, and others that hold the same experts: calls go on, with the same bits.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use moesaic_dispatch::{Dispatcher, Hub, Pending, Route};
use moesaic_proto::Epoch;
use moesaic_proto::v1::{EdgeState, RefusalReason, Role};
use support::*;

/// More terms than may be asked for twice because they are late.
const MANY_ROWS: usize = 1024;

fn hosts(moods: &[Mood]) -> Vec<Arc<FakeHost>> {
    moods.iter().map(|mood| FakeHost::new(*mood)).collect()
}

/// Calls on their way, and what they must come to.
struct Calls {
    rows: usize,
    calls: Vec<(Pending, Vec<f32>)>,
}

impl Calls {
    fn send(dispatcher: &Dispatcher, count: u64, rows: usize) -> Self {
        let call = |seed| {
            let (x, routes) = micro_batch(rows, seed);
            (send(dispatcher, &x, &routes).unwrap(), expected(&x, &routes))
        };
        Self { rows, calls: (0..count).map(call).collect() }
    }

    async fn assert_done(self) {
        for (pending, wanted) in self.calls {
            assert_eq!(combined(pending, self.rows).await.map(|y| bits(&y)), Ok(bits(&wanted)));
        }
    }
}

async fn frames(host: &Arc<FakeHost>, count: usize) {
    until(|| host.frame_count() >= count).await;
}

/// The shortest time of three: a busy machine may stretch one.
async fn shortest(run: impl AsyncFn() -> Duration) -> Duration {
    let mut times = [Duration::ZERO; 3];
    for time in &mut times {
        *time = run().await;
    }
    *times.iter().min().unwrap()
}

/// Every frame that was asked of two has had two answers, one of them too late.
async fn assert_late_answers_are_counted(dispatcher: &Dispatcher) {
    until(|| dispatcher.counts().unmatched == dispatcher.counts().hedged).await;
    assert_eq!((dispatcher.outstanding(), dispatcher.counts().rejected, dispatcher.counts().misdirected), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_workers_calls_are_done_by_its_replica_at_once() {
    let took = shortest(async || {
        let hosts = hosts(&[Mood::Keeps, Mood::Keeps]);
        let (dispatcher, mut workers) = remote(&hosts, &replicas(2), PATIENT).await;
        // More terms than are asked for twice if they are only late.
        let calls = Calls::send(&dispatcher, 6, MANY_ROWS);
        frames(&hosts[0], 3).await;
        frames(&hosts[1], 3).await;
        hosts[0].set_mood(Mood::Answers);
        hosts[0].answer_held();

        let killed = Instant::now();
        drop(workers.pop());
        calls.assert_done().await;
        let took = killed.elapsed();
        let counts = dispatcher.counts();
        assert!(counts.resent + counts.hedged >= 3 && dispatcher.outstanding() == 0, "{counts:?}");
        assert!(dispatcher.reachable());
        Calls::send(&dispatcher, 4, 3).assert_done().await;
        took
    });
    let took = took.await;
    assert!(took < Duration::from_millis(300), "it took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_no_single_survivor_has_all_of_is_split_over_them() {
    let hosts = hosts(&[Mood::Keeps, Mood::Answers, Mood::Answers, Mood::Answers]);
    // Worker 0 has everything and the others a third each, so that groups are torn apart.
    let holders: Vec<Vec<u32>> = (0..EXPERTS as u32).map(|e| vec![0, 1 + e % 3]).collect();
    let (dispatcher, mut workers) = remote(&hosts, &holders, PATIENT).await;
    let calls = Calls::send(&dispatcher, 4, MANY_ROWS);
    frames(&hosts[0], 2).await;
    drop(workers.remove(0));
    calls.assert_done().await;
    let counts = dispatcher.counts();
    assert!(counts.resent + counts.hedged >= 2 * 3 && dispatcher.outstanding() == 0, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_refuses_or_answers_wrongly_costs_one_more_round_trip() {
    use RefusalReason::*;
    let moods = [Epoch, NotHeld, Busy, Stopping].map(Mood::Refuses).into_iter();
    for mood in moods.chain([Mood::Short, Mood::Forgets]) {
        let (near_hosts, far_hosts) = (hosts(&[Mood::Answers, mood]), hosts(&[Mood::Answers, mood]));
        let near = local(&near_hosts, &replicas(2), PATIENT);
        let (far, _workers) = remote(&far_hosts, &replicas(2), PATIENT).await;
        Calls::send(&near, 1, 5).assert_done().await;
        assert_eq!((near_hosts[0].frame_count(), near_hosts[1].frame_count()), (1, 1));
        assert_eq!((near.counts().resent, near.outstanding()), (1, 0));
        while far_hosts[1].frame_count() == 0 {
            Calls::send(&far, 1, 5).assert_done().await;
        }
        assert!(far.counts().resent + far.counts().hedged >= 1 && far.outstanding() == 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_workers_calls_are_done_by_its_replica_in_half_a_second_and_its_late_answers_are_counted() {
    let took = shortest(async || {
        let hosts = hosts(&[Mood::Answers, Mood::Answers]);
        let (dispatcher, workers) = remote(&hosts, &replicas(2), PATIENT).await;
        Calls::send(&dispatcher, 4, MANY_ROWS).assert_done().await;
        let (frozen, asked) = (workers[1].freeze().await, hosts[1].frame_count());
        let start = Instant::now();
        Calls::send(&dispatcher, 4, MANY_ROWS).assert_done().await;
        let took = start.elapsed();
        assert!(dispatcher.counts().hedged >= 2, "{:?}", dispatcher.counts());
        until(|| edge(&dispatcher, 1).state() == EdgeState::Silent).await;
        // Nobody asks it any more.
        Calls::send(&dispatcher, 6, MANY_ROWS).assert_done().await;
        drop(frozen);
        assert_late_answers_are_counted(&dispatcher).await;
        until(|| edge(&dispatcher, 1).state() != EdgeState::Silent).await;
        assert!(hosts[1].frame_count() < asked + 5);
        took
    });
    let took = took.await;
    assert!(Duration::from_millis(250) < took && took < Duration::from_secs(1), "it took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_hangs_while_its_server_speaks_is_late_before_it_could_be_silent() {
    let took = shortest(async || {
        let hosts = hosts(&[Mood::Answers, Mood::Keeps]);
        let (dispatcher, _workers) = remote(&hosts, &replicas(2), PATIENT).await;
        let start = Instant::now();
        while hosts[1].frame_count() == 0 {
            Calls::send(&dispatcher, 1, 4).assert_done().await;
        }
        let took = start.elapsed();
        let counts = dispatcher.counts();
        assert!(counts.hedged >= 1 && counts.resent == 0, "{counts:?}");
        hosts[1].set_mood(Mood::Answers);
        hosts[1].answer_held();
        assert_late_answers_are_counted(&dispatcher).await;
        took
    });
    let took = took.await;
    assert!(Duration::from_millis(80) <= took && took < Duration::from_millis(300), "it took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_worker_is_steered_around_and_comes_back() {
    const ROWS: usize = 64;
    let hosts = hosts(&[Mood::Answers; 3]);
    let (dispatcher, _workers) = remote(&hosts, &replicas(3), PATIENT).await;
    let calls = async |count| {
        for _ in 0..count {
            Calls::send(&dispatcher, 1, ROWS).assert_done().await;
        }
    };
    let asked = || hosts[0].frame_count();
    calls(30).await;
    hosts[0].set_mood(Mood::AnswersAfter(Duration::from_millis(300)));
    let before = asked();
    while edge(&dispatcher, 0).state() != EdgeState::Slow {
        calls(1).await;
    }
    assert!(asked() - before <= 10, "{} frames", asked() - before);
    let before = asked();
    calls(600).await;
    assert!(asked() - before < 30, "{} frames", asked() - before);
    let counts = dispatcher.counts();
    assert!(counts.terms_hedged * 20 <= counts.terms && counts.resent == 0, "{counts:?}");

    // Probes alone would not make it so many.
    hosts[0].set_mood(Mood::Answers);
    let (start, mut before) = (Instant::now(), asked());
    calls(60).await;
    while asked() - before <= 10 {
        assert!(start.elapsed() < PATIENT);
        before = asked();
        calls(60).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_whose_workers_all_die_wait_for_one_to_come_back() {
    let hosts = hosts(&[Mood::Keeps, Mood::Keeps]);
    let (dispatcher, mut workers) = remote(&hosts, &replicas(2), PATIENT).await;
    let lost = Calls::send(&dispatcher, 4, 5);
    frames(&hosts[0], 1).await;
    frames(&hosts[1], 1).await;
    let address = workers[1].address;
    workers.clear();
    until(|| dispatcher.outstanding() == 0 && !dispatcher.reachable()).await;
    let never_sent = Calls::send(&dispatcher, 4, 5);
    assert_eq!(dispatcher.outstanding(), 0);

    hosts[1].set_mood(Mood::Answers);
    let _back = RemoteWorker::start_at(address, hosts[1].clone(), hello(Role::ExpertWorker, "w1")).await;
    lost.assert_done().await;
    never_sent.assert_done().await;
    assert_eq!(dispatcher.outstanding(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_placement_under_which_a_survivor_has_the_lost_experts_ends_the_wait() {
    let hosts = hosts(&[Mood::Answers, Mood::Keeps]);
    let (dispatcher, mut workers) = remote(&hosts, &blocks(2), PATIENT).await;
    let calls = Calls::send(&dispatcher, 3, 5);
    frames(&hosts[1], 3).await;
    drop(workers.pop());
    until(|| dispatcher.outstanding() == 0).await;
    dispatcher.set_view(placement_at(2, 2, &vec![vec![0]; EXPERTS]), &members([(0, &workers[0])]));
    calls.assert_done().await;
    assert_eq!((hosts[0].epochs(), dispatcher.epoch()), (vec![1, 1, 1, 2, 2, 2], Some(Epoch(2))));
}

/// A placement comes into use when every expert can be reached under it, and not before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn epochs_live_side_by_side() {
    let hosts = hosts(&[Mood::Keeps, Mood::Answers]);
    let mut workers = Vec::new();
    for (number, host) in hosts.iter().enumerate() {
        workers.push(start(number, host).await);
    }
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    let (first, second) = (placement_at(4, 2, &vec![vec![0]; EXPERTS]), placement_at(5, 2, &vec![vec![1]; EXPERTS]));
    let loaded = |epochs: [u32; 2]| {
        let mut members = members(workers.iter().enumerate());
        members.values_mut().zip(epochs).for_each(|(member, epoch)| member.epoch_loaded = Epoch(epoch));
        members
    };
    dispatcher.set_view(first.clone(), &loaded([4, 0]));
    until(|| dispatcher.reachable()).await;
    let old = Calls::send(&dispatcher, 2, 5);
    frames(&hosts[0], 2).await;

    // The new worker has not loaded its experts, and then its edge must come up.
    dispatcher.set_view(second.clone(), &loaded([4, 4]));
    assert_eq!((dispatcher.epoch(), dispatcher.reachable()), (Some(Epoch(4)), true));
    let early = Dispatcher::new(config(SHORT), None);
    early.set_view(second.clone(), &loaded([4, 4]));
    let (x, routes) = row_for(0);
    let error = call(&early, &x, &routes).await.unwrap_err().to_string();
    assert!(error.ends_with("(w1: has not loaded epoch 5, but 4)"), "{error}");
    let old_too = Calls::send(&dispatcher, 1, 5);
    frames(&hosts[0], 3).await;
    dispatcher.set_view(second.clone(), &loaded([4, 5]));
    until(|| dispatcher.epoch() == Some(Epoch(5))).await;
    Calls::send(&dispatcher, 2, 5).assert_done().await;
    assert_eq!(hosts[0].epochs(), [4, 4, 4]);

    // The old worker is of no use any more; what it still answers counts.
    dispatcher.set_view(second, &loaded([4, 5]));
    hosts[0].answer_held();
    old.assert_done().await;
    old_too.assert_done().await;
    assert!(hosts[1].epochs().iter().all(|epoch| *epoch == 5));
    assert_eq!(dispatcher.counts().resent, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_placement_comes_into_use_when_the_edge_of_its_last_worker_is_up() {
    let hosts = hosts(&[Mood::Answers, Mood::Answers]);
    let w0 = start(0, &hosts[0]).await;
    let (w1, address) = {
        let gone = start(1, &hosts[1]).await;
        (hello(Role::ExpertWorker, "w1"), gone.address)
    };
    let dispatcher = Dispatcher::new(config(PATIENT), None);
    dispatcher.set_view(placement_at(1, 2, &vec![vec![0]; EXPERTS]), &members([(0, &w0)]));
    until(|| dispatcher.reachable()).await;
    let mut both = members([(0, &w0)]);
    both.insert(worker(1), member(address));
    dispatcher.set_view(placement_at(2, 2, &vec![vec![1]; EXPERTS]), &both);
    Calls::send(&dispatcher, 1, 5).assert_done().await;
    assert_eq!(dispatcher.epoch(), Some(Epoch(1)));
    let _w1 = RemoteWorker::start_at(address, hosts[1].clone(), w1).await;
    until(|| dispatcher.epoch() == Some(Epoch(2))).await;
    Calls::send(&dispatcher, 1, 5).assert_done().await;
    assert_eq!((hosts[0].epochs(), hosts[1].epochs()), (vec![1], vec![2]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_the_registry_has_lost_stays_in_use_while_its_edge_is_live() {
    let hosts = hosts(&[Mood::Answers]);
    let (dispatcher, workers) = remote(&hosts, &blocks(1), PATIENT).await;
    let nobody = BTreeMap::new();
    for epoch in 1..4 {
        dispatcher.set_view(placement_at(epoch, 1, &blocks(1)), &nobody);
        assert!(dispatcher.reachable(), "without a moment in between");
        Calls::send(&dispatcher, 1, 5).assert_done().await;
    }
    assert_eq!(hosts[0].epochs(), [1, 2, 3]);
    drop(workers);
    until(|| !dispatcher.reachable()).await;
    dispatcher.set_view(placement_at(3, 1, &blocks(1)), &nobody);
    assert_eq!(edge(&dispatcher, 0).detail, "not available");
}

/// The same for a worker of this process, which is there as long as it is in the hub.
#[tokio::test]
async fn a_worker_of_this_process_stays_in_use_while_it_is_there() {
    let (hub, host) = (Hub::default(), FakeHost::new(Mood::Answers));
    hub.insert(worker(0), host.clone());
    let dispatcher = Dispatcher::new(config(SHORT), Some(hub.clone()));
    dispatcher.set_view(placement(1, &blocks(1)), &BTreeMap::from([(worker(0), member("here"))]));
    dispatcher.set_view(placement(1, &blocks(1)), &BTreeMap::new());
    Calls::send(&dispatcher, 2, 3).assert_done().await;
    hub.remove(&worker(0));
    dispatcher.set_view(placement(1, &blocks(1)), &BTreeMap::new());
    assert!(!dispatcher.reachable());
    assert_eq!((host.frame_count(), edge(&dispatcher, 0).detail), (2, "not available".to_owned()));
}

/// A worker of this process beside one behind a socket: each stands in for the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_here_and_elsewhere_stand_in_for_each_other() {
    let (here, there) = (FakeHost::new(Mood::Answers), FakeHost::new(Mood::Keeps));
    let hub = Hub::default();
    hub.insert(worker(0), here.clone());
    let w1 = start(1, &there).await;
    let dispatcher = Dispatcher::new(config(PATIENT), Some(hub.clone()));
    let mut both = members([(1, &w1)]);
    both.insert(worker(0), member("here"));
    dispatcher.set_view(placement(2, &replicas(2)), &both);
    until(|| edge(&dispatcher, 1).state() == EdgeState::Live).await;
    let transports: Vec<String> = dispatcher.edges().into_iter().map(|edge| edge.transport).collect();
    assert_eq!(transports, ["local", "grpc"]);

    let calls = Calls::send(&dispatcher, 4, MANY_ROWS);
    frames(&there, 1).await;
    let address = w1.address;
    drop(w1);
    calls.assert_done().await;
    assert_eq!(here.frame_count(), 4);
    // What is asked again is asked by background tasks, which must not compute it.
    let (by_caller, counts) = (here.answered_by_caller.load(Ordering::SeqCst), dispatcher.counts());
    assert_eq!(by_caller as u64 + counts.resent + counts.hedged, 4);

    there.set_mood(Mood::Answers);
    let _w1 = RemoteWorker::start_at(address, there.clone(), hello(Role::ExpertWorker, "w1")).await;
    until(|| edge(&dispatcher, 1).state() == EdgeState::Live).await;
    hub.remove(&worker(0));
    let before = there.frame_count();
    Calls::send(&dispatcher, 4, 5).assert_done().await;
    assert_eq!((here.frame_count(), there.frame_count()), (4, before + 4));
}

/// Calls without a pause while workers are killed and started again in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_go_on_while_workers_come_and_go() {
    let hosts = hosts(&[Mood::Answers, Mood::Answers]);
    let (dispatcher, mut workers) = remote(&hosts, &replicas(2), PATIENT).await;
    let (stop, caller) = (tokio_util::sync::CancellationToken::new(), dispatcher.clone());
    let stopped = stop.clone();
    let calls = tokio::spawn(async move {
        let (x, routes): (Vec<f32>, Vec<Route>) = micro_batch(6, 1);
        let wanted = bits(&expected(&x, &routes));
        while !stopped.is_cancelled() {
            assert_eq!(call(&caller, &x, &routes).await.map(|y| bits(&y)), Ok(wanted.clone()));
        }
    });
    for round in 0..20 {
        let number = round % 2;
        let address = workers[number].address;
        let id = hello(Role::ExpertWorker, worker(number).as_str());
        drop(workers.remove(number));
        until(|| edge(&dispatcher, number).state() == EdgeState::Down).await;
        workers.insert(number, RemoteWorker::start_at(address, hosts[number].clone(), id).await);
        until(|| edge(&dispatcher, number).state() != EdgeState::Down).await;
    }
    stop.cancel();
    calls.await.unwrap();
    assert_eq!((dispatcher.outstanding(), dispatcher.counts().rejected), (0, 0));
}
