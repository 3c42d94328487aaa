//! What comes back is what the experts compute, added up as rule 1(c) says, whoever holds them and whoever else asks.

use futures::future::join_all;
use moesaic_dispatch::{Dispatcher, Route, Rows};
use moesaic_expert_worker::Config;
use moesaic_kernels::{Ffn, Pool, RowsRef, add, combine_first, combine_next};
use moesaic_model::Checkpoint;
use moesaic_proto::{ExpertId, LayerId};

use crate::harness::{Workers, f32_numerics, fixture};

const TOP_K: usize = 4;
const LAYER: usize = 2;

/// Rows and routes made from a seed: TOP_K different experts a row, ascending.
fn micro_batch(rows: usize, hidden: usize, experts: usize, seed: usize) -> (Vec<f32>, Vec<Route>) {
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
    let x = (0..rows * hidden).map(value).collect();
    let mut routes = Vec::new();
    for row in 0..rows {
        let mut chosen: Vec<usize> = (0..TOP_K).map(|k| (row * 5 + seed + k * (1 + row % 7)) % experts).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let unused = (0..experts).filter(|e| !chosen.contains(e)).take(TOP_K - chosen.len()).collect::<Vec<_>>();
        chosen.extend(unused);
        chosen.sort_unstable();
        routes.extend(chosen.iter().map(|&e| Route { expert: ExpertId(e as u16), weight: value(row + e).abs() + 0.1 }));
    }
    (x, routes)
}

/// One expert and one row at a time.
fn expected(checkpoint: &Checkpoint, x: &[f32], routes: &[Route]) -> Vec<f32> {
    let config = checkpoint.config();
    let (hidden, group) = (config.hidden_size, config.n_routed_experts / config.logical_groups());
    let single = |expert: ExpertId, x: &[f32]| {
        let block = checkpoint.expert(LAYER, usize::from(expert.0)).unwrap();
        let ffn = Ffn::pack(&block.gate, &block.up, &block.down, f32_numerics());
        let mut y = vec![f32::NAN; hidden];
        ffn.forward(&Pool::new(1), RowsRef::F32(x), &mut y);
        y
    };
    let mut y = Vec::new();
    for (x, routes) in x.chunks_exact(hidden).zip(routes.chunks_exact(TOP_K)) {
        let mut sum: Option<Vec<f32>> = None;
        for routes in routes.chunk_by(|a, b| usize::from(a.expert.0) / group == usize::from(b.expert.0) / group) {
            let mut group_sum = vec![f32::NAN; hidden];
            combine_first(&mut group_sum, routes[0].weight, &single(routes[0].expert, x));
            routes[1..].iter().for_each(|r| combine_next(&mut group_sum, r.weight, &single(r.expert, x)));
            match &mut sum {
                None => sum = Some(group_sum),
                Some(sum) => add(sum, &group_sum),
            }
        }
        y.extend(sum.unwrap());
    }
    y
}

async fn ask(dispatcher: &Dispatcher, micro_batch: u8, x: &[f32], routes: &[Route]) -> Vec<u32> {
    let pending = dispatcher.dispatch(LayerId(LAYER as u8), micro_batch, Rows::F32(x.to_vec()), TOP_K, routes).unwrap();
    let mut y = vec![f32::NAN; x.len()];
    pending.combine(&mut y).await.unwrap();
    bits(&y)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_split_of_the_experts_and_either_transport_gives_the_same_bits() {
    type Holder = fn(usize) -> usize;
    let splits: [(usize, Holder); 4] = [(1, |_| 0), (2, |e| e / 16), (3, |e| e % 3), (5, |e| (e * 7 + e / 3) % 5)];
    for name in ["v3", "v3-fp8"] {
        for (count, holder) in splits {
            let workers = Workers::start(&fixture(name), count, Config::default());
            let placement = workers.placement(1, count, holder);
            workers.place(&placement).await;
            let config = workers.checkpoint.config();
            let (x, routes) = micro_batch(19, config.hidden_size, config.n_routed_experts, count);
            let wanted = bits(&expected(&workers.checkpoint, &x, &routes));
            for local in [true, false] {
                let dispatcher = workers.dispatcher(&placement, local).await;
                assert_eq!(ask(&dispatcher, 0, &x, &routes).await, wanted, "{name}, {count} workers, local: {local}");
            }
        }
    }
}

/// Frames of one layer that wait together are computed in one call of the kernels.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_ask_at_once_change_nothing_for_each_other() {
    let workers = Workers::start(&fixture("v3"), 2, Config::default());
    let placement = workers.placement(1, 2, |e| e % 2);
    workers.place(&placement).await;
    let dispatchers = [workers.dispatcher(&placement, true).await, workers.dispatcher(&placement, false).await];
    let config = workers.checkpoint.config();
    let batches: Vec<_> =
        (0..12).map(|seed| micro_batch(1 + seed * 3, config.hidden_size, config.n_routed_experts, seed)).collect();
    let wanted: Vec<_> = batches.iter().map(|(x, routes)| bits(&expected(&workers.checkpoint, x, routes))).collect();
    for _ in 0..20 {
        let asked = batches.iter().enumerate().map(|(i, (x, routes))| ask(&dispatchers[i % 2], i as u8, x, routes));
        assert_eq!(join_all(asked).await, wanted);
    }
}
