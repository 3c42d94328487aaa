//! Whatever workers hold the experts and however they are reached, a row's sum has the same bits.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;

use moesaic_dispatch::{Dispatcher, Rows};
use proptest::prelude::*;
use support::*;

/// Of a worker that may fail.
fn bad_mood() -> impl Strategy<Value = Mood> {
    use moesaic_proto::v1::RefusalReason::*;
    let refuses = prop::sample::select(vec![Epoch, NotHeld, Busy, Stopping]).prop_map(Mood::Refuses);
    prop_oneof![Just(Mood::Short), Just(Mood::Forgets), refuses, any::<u64>().prop_map(Mood::Fickle)]
}

async fn run(dispatcher: &Dispatcher, micro_batch: u8, x: &[f32], routes: &[moesaic_dispatch::Route]) -> Vec<f32> {
    let pending = dispatcher.dispatch(LAYER, micro_batch, Rows::F32(x.to_vec()), TOP_K, routes).unwrap();
    let mut y = vec![f32::NAN; x.len()];
    pending.combine(&mut y).await.unwrap();
    y
}

fn hosts(count: usize) -> Vec<Arc<FakeHost>> {
    (0..count).map(|_| FakeHost::new(Mood::Answers)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any assignment of experts to 1 to 5 workers, replicas included.
    #[test]
    fn every_assignment_gives_the_same_bits(
        (workers, holders) in (1usize..=5).prop_flat_map(|workers| {
            let holder = prop::collection::btree_set(0..workers as u32, 1..=workers);
            let holders = prop::collection::vec(holder.prop_map(|set| set.into_iter().collect()), EXPERTS);
            (Just(workers), holders)
        }),
        rows in 0usize..9,
        seed: u64,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let (x, routes) = micro_batch(rows, seed);
        let dispatcher = local(&hosts(workers), &holders, PATIENT);
        let y = runtime.block_on(run(&dispatcher, 0, &x, &routes));
        prop_assert_eq!(bits(&y), bits(&expected(&x, &routes)));
    }

    /// The same where workers fail, as long as each expert has a good one: at once, as no other must be waited for.
    #[test]
    fn failing_workers_change_no_bits(
        moods in prop::collection::vec(bad_mood(), 1..5),
        goods in 1usize..4,
        holders in prop::collection::vec((prop::collection::vec(any::<prop::sample::Index>(), 0..4), any::<u32>()), EXPERTS),
        rows in 0usize..9,
        seed: u64,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let (x, routes) = micro_batch(rows, seed);
        let hosts: Vec<_> = moods.iter().copied().chain(vec![Mood::Answers; goods]).map(FakeHost::new).collect();
        let holders: Vec<Vec<u32>> = holders.into_iter().map(|(bad, good)| {
            let bad: BTreeSet<u32> = bad.iter().map(|bad| bad.index(moods.len()) as u32).collect();
            bad.into_iter().chain([moods.len() as u32 + good % goods as u32]).collect()
        }).collect();
        let dispatcher = local(&hosts, &holders, PATIENT);
        for micro_batch in 0..3 {
            let y = runtime.block_on(run(&dispatcher, micro_batch, &x, &routes));
            prop_assert_eq!(bits(&y), bits(&expected(&x, &routes)));
        }
        prop_assert_eq!(dispatcher.outstanding(), 0);
    }
}

/// And behind sockets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_workers_behind_grpc_change_no_bits() {
    use moesaic_proto::v1::RefusalReason::Busy;
    // Those that are busy are asked again and again, the other bad one now and then.
    let moods = [Mood::Refuses(Busy), Mood::Fickle(2), Mood::Refuses(Busy), Mood::Answers];
    let hosts = moods.map(FakeHost::new);
    let holders: Vec<Vec<u32>> = (0..EXPERTS as u32).map(|e| vec![e % 3, (e + 1) % 3, 3]).collect();
    let (far, _servers) = remote(&hosts, &holders, PATIENT).await;
    for seed in 0..100 {
        let (x, routes) = micro_batch(seed as usize % 7, seed);
        assert_eq!(bits(&run(&far, 0, &x, &routes).await), bits(&expected(&x, &routes)));
    }
    assert!(far.counts().resent > 50 && far.outstanding() == 0, "{:?}", far.counts());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_and_grpc_give_the_same_bits() {
    let (x, routes) = micro_batch(33, 5);
    let wanted = bits(&expected(&x, &routes));
    for workers in 1..=5 {
        let near = local(&hosts(workers), &blocks(workers), PATIENT);
        assert_eq!(bits(&run(&near, 0, &x, &routes).await), wanted, "{workers} local workers");
        let (far, _servers) = remote(&hosts(workers), &blocks(workers), PATIENT).await;
        assert_eq!(bits(&run(&far, 0, &x, &routes).await), wanted, "{workers} workers behind gRPC");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn micro_batches_travel_side_by_side_and_do_not_mix() {
    let (far, _servers) = remote(&hosts(3), &blocks(3), PATIENT).await;
    for near in [local(&hosts(3), &blocks(3), PATIENT), far] {
        let batches: Vec<_> = (0..3).map(|i| micro_batch(4 + i, 100 + i as u64)).collect();
        for _ in 0..20 {
            let results = batches.iter().enumerate().map(|(i, (x, routes))| run(&near, i as u8, x, routes));
            let results = futures::future::join_all(results).await;
            for (y, (x, routes)) in results.iter().zip(&batches) {
                assert_eq!(bits(y), bits(&expected(x, routes)));
            }
        }
        let counts = near.counts();
        assert_eq!((near.outstanding(), counts.unmatched, counts.resent, counts.rejected), (0, 0, 0, 0));
    }
}

/// More rows than a frame may hold are sent as several.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_micro_batch_goes_in_several_frames() {
    let rows = moesaic_proto::limits::FRAME_ROWS_MAX + 10;
    let (x, routes) = micro_batch(rows, 9);
    let hosts = hosts(1);
    let (dispatcher, _servers) = remote(&hosts, &blocks(1), PATIENT).await;
    assert_eq!(bits(&run(&dispatcher, 0, &x, &routes).await), bits(&expected(&x, &routes)));
    let sizes: Vec<usize> = hosts[0].frames.lock().unwrap().iter().map(|frame| frame.row_count()).collect();
    assert_eq!(sizes, [rows - 10, 10]);
}

/// One destination's rows are the call's own memory; several share it.
#[tokio::test]
async fn local_workers_get_the_activations_without_a_copy() {
    let (x, routes) = micro_batch(6, 1);
    let hosts = hosts(3);
    let dispatcher = local(&hosts, &blocks(3), PATIENT);
    let address = x.as_ptr();
    let pending = dispatcher.dispatch(LAYER, 0, Rows::F32(x), TOP_K, &routes).unwrap();
    pending.combine(&mut [0.0; 6 * HIDDEN]).await.unwrap();
    for host in &hosts {
        for frame in &*host.frames.lock().unwrap() {
            let moesaic_dispatch::Activations::F32(values) = frame.activations() else { panic!("f32 was sent") };
            assert_eq!(values.as_ptr(), address);
        }
    }
}

/// Each row goes once to each worker whose turn it is with one of its experts, and to no other.
#[tokio::test]
async fn holders_take_turns_and_get_only_the_rows_that_they_need() {
    let (x, routes) = micro_batch(8, 3);
    let hosts = hosts(3);
    // Worker 2 has everything, the others one half each.
    let holders: Vec<Vec<u32>> = (0..EXPERTS).map(|e| vec![(e % 2) as u32, 2]).collect();
    let dispatcher = local(&hosts, &holders, PATIENT);
    let counts = || hosts.iter().map(|host| host.frame_count()).collect::<Vec<_>>();
    run(&dispatcher, 0, &x, &routes).await;
    assert_eq!(counts(), [0, 0, 1]);
    run(&dispatcher, 0, &x, &routes).await;
    assert_eq!(counts(), [1, 1, 1]);
    for (number, host) in hosts[..2].iter().enumerate() {
        let needs = |routes: &&[moesaic_dispatch::Route]| routes.iter().any(|r| usize::from(r.expert.0) % 2 == number);
        assert_eq!(host.frames.lock().unwrap()[0].row_count(), routes.chunks(TOP_K).filter(needs).count());
    }
    run(&dispatcher, 0, &x, &routes).await;
    assert_eq!(counts(), [1, 1, 2]);
}
