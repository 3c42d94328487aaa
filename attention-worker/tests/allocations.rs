//! The layer loop allocates for its calls, not for its rows: in a binary of its own, because it counts every allocation
//! of the process.
#![allow(clippy::unwrap_used)]

use std::alloc::System;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use moesaic_attention_worker::core::batcher::{Part, SequenceId};
use moesaic_attention_worker::engine::cpu::{self, Cpu};
use moesaic_attention_worker::engine::decoder::{Buffers, Decoder};
use moesaic_attention_worker::engine::expert_counts::ExpertCounts;
use moesaic_attention_worker::engine::profile::Profile;
use moesaic_attention_worker::engine::weights::Weights;
use moesaic_dispatch::{
    CombineOps, DispatchConfig, Dispatcher, ExpertHost, Holder, Hub, ReplySender, RequestFrame, Shape,
};
use moesaic_kernels::{Dtype, Numerics, Pool, add, combine_first, combine_next};
use moesaic_model::Checkpoint;
use moesaic_node::Connector;
use moesaic_node::trace::Span;
use moesaic_proto::{Epoch, LayerId, Placement, WorkerId, v1};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static GLOBAL: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Answers zeros: one allocation a frame.
struct Zeros(Shape);

impl ExpertHost for Zeros {
    fn shape(&self) -> Shape {
        self.0
    }

    fn submit(&self, frame: RequestFrame, reply: ReplySender) {
        reply.send(Ok(vec![0.0; frame.output_count() * self.0.hidden].into()));
    }
}

fn decoder() -> Decoder<Cpu> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/v3");
    let checkpoint = Arc::new(Checkpoint::open(&fixture).unwrap());
    let config = checkpoint.config();
    let (hidden, experts) = (config.hidden_size, config.n_routed_experts);
    let (hub, worker) = (Hub::default(), WorkerId::new("e0").unwrap());
    hub.insert(worker.clone(), Arc::new(Zeros(Shape { hidden, experts })));
    let layers: BTreeMap<_, _> =
        config.moe_layers().into_iter().map(|layer| (LayerId(layer as u8), vec![vec![0]; experts])).collect();
    let placement = Arc::new(Placement::new(Epoch(1), vec![worker.clone()], layers).unwrap());
    let dispatcher = Dispatcher::new(
        DispatchConfig {
            hidden,
            experts,
            groups: config.logical_groups(),
            source: 1,
            layer_deadline: Duration::from_secs(10),
            hello: v1::Hello::default(),
            connector: Connector::default(),
            fabric: None,
            ops: CombineOps { first: combine_first, next: combine_next, add },
        },
        Some(hub),
    );
    dispatcher
        .set_view(placement, &BTreeMap::from([(worker, Holder { address: "here:1".into(), epoch_loaded: Epoch(1) })]));
    let weights = Arc::new(Weights::load(checkpoint, Numerics::detect(Dtype::Bf16)).unwrap());
    let experts = Arc::new(ExpertCounts::new(weights.config()));
    Decoder::new(Cpu::new(weights, Pool::new(2), 64), dispatcher, Arc::new(Profile::default()), experts)
}

/// So many sequences that decode, each on a page of its own.
fn batch(rows: u32) -> Vec<Part> {
    let part = |i: u32| Part {
        sequence: SequenceId(u64::from(i)),
        start: 5,
        tokens: vec![7 + i],
        prompt: 5,
        pages: vec![i],
        draws: true,
    };
    (0..rows).map(part).collect()
}

#[tokio::test]
async fn a_step_of_many_rows_allocates_hardly_more_than_one_of_few() {
    let decoder = decoder();
    let mut buffers = decoder.buffers().unwrap();
    let mut counts = Vec::new();
    for rows in [1, 64] {
        let parts = batch(rows);
        // The first step of a size makes the buffers.
        decoder.forward(0, &parts, &mut buffers, &Span::default()).await.unwrap();
        let region = Region::new(GLOBAL);
        decoder.forward(0, &parts, &mut buffers, &Span::default()).await.unwrap();
        let change = region.change();
        counts.push(change.allocations + change.reallocations);
        let row =
            Buffers::<cpu::Buffers>::bytes_per_row(decoder.config()) + cpu::Buffers::bytes_per_row(decoder.config());
        let (taken, planned) = (buffers.bytes() + buffers.own().bytes(), rows as usize * row);
        assert!(taken <= planned && taken * 5 >= planned * 4, "{rows} rows take {taken} bytes; planned were {planned}");
    }
    let [one, many] = counts[..] else { unreachable!("two sizes") };
    println!("allocations of a step in 3 layers with experts: {one} for 1 row, {many} for 64 rows");
    // What grows are lists that double: less than one allocation for each row.
    assert!(many < one + 63, "{one} allocations for 1 row, {many} for 64");
}
