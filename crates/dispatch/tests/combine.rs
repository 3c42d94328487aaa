//! Whatever workers hold the experts and however they are reached, a row's sum has the same bits.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use moesaic_dispatch::{Dispatcher, Rows};
use proptest::prelude::*;
use support::*;

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
        assert_eq!((near.outstanding(), near.counts()), (0, Default::default()));
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

/// Each row goes once to each worker that holds one of its experts, and to no other.
#[tokio::test]
async fn the_first_live_holder_gets_the_rows_and_only_those_it_needs() {
    let (x, routes) = micro_batch(8, 3);
    let hosts = hosts(3);
    // Worker 2 is everybody's second choice.
    let holders: Vec<Vec<u32>> = (0..EXPERTS).map(|e| vec![(e % 2) as u32, 2]).collect();
    let dispatcher = local(&hosts, &holders, PATIENT);
    run(&dispatcher, 0, &x, &routes).await;
    assert!(hosts[2].frames.lock().unwrap().is_empty());
    for (number, host) in hosts[..2].iter().enumerate() {
        let needs = |routes: &&[moesaic_dispatch::Route]| routes.iter().any(|r| usize::from(r.expert.0) % 2 == number);
        let frames = host.frames.lock().unwrap();
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].row_count(), routes.chunks(TOP_K).filter(needs).count());
    }
}
