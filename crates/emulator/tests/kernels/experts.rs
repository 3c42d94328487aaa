//! A layer's experts, against plain loops.

use half::bf16;
use moesaic_kernels::cuda::{Device, Experts, GpuBytes, GpuFfn, Output, Recorded, Workspace, X};
use proptest::prelude::*;

use moesaic_emulator::test_device as device;

use crate::support::{Random, Stored};

struct Expert {
    gate: Stored,
    up: Stored,
    down: Stored,
}

impl Expert {
    fn random(random: &mut Random, [in_, width, out]: [usize; 3], is_fp8: bool) -> Self {
        Self {
            gate: Stored::random(random, width, in_, is_fp8),
            up: Stored::random(random, width, in_, is_fp8),
            down: Stored::random(random, out, width, is_fp8),
        }
    }

    fn load(&self, device: &Device) -> GpuFfn {
        GpuFfn::load(device, &self.gate.matrix(), &self.up.matrix(), &self.down.matrix()).unwrap()
    }

    fn forward(&self, x: &[bf16]) -> Vec<f32> {
        let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let (gate, up) = (self.gate.times(&x), self.up.times(&x));
        let h = |(gate, up): (&f32, &f32)| bf16::from_f32(gate / (1.0 + (-gate).exp()) * up).to_f32();
        self.down.times(&gate.iter().zip(&up).map(h).collect::<Vec<_>>())
    }
}

/// Rows of each expert, and outputs that add up some of their results.
struct Call {
    x: Vec<bf16>,
    rows: Vec<Vec<u32>>,
    outputs: Vec<Vec<(u32, f32)>>,
}

impl Call {
    fn random(random: &mut Random, in_: usize, counts: &[usize]) -> Self {
        let x_rows = counts.iter().copied().max().unwrap_or(0).max(1) + random.below(3);
        let rows = counts.iter().map(|count| (0..*count).map(|_| random.below(x_rows) as u32).collect()).collect();
        let y_rows: usize = counts.iter().sum();
        let terms = |random: &mut Random| -> Vec<(u32, f32)> {
            (0..1 + random.below(4)).map(|_| (random.below(y_rows) as u32, random.unit())).collect()
        };
        // Every row is asked for by itself, too.
        let singles = (0..y_rows).map(|row| vec![(row as u32, 1.0)]);
        let outputs = singles.collect::<Vec<_>>().into_iter().chain((0..5).map(|_| terms(random))).collect();
        Self { x: random.bf16s(x_rows * in_), rows, outputs }
    }

    fn run(&self, workspace: &mut Workspace, experts: &[GpuFfn], out: usize) -> Vec<f32> {
        let groups: Vec<_> = experts.iter().zip(&self.rows).map(|(ffn, rows)| (ffn, &rows[..])).collect();
        let outputs: Vec<_> = self.outputs.iter().map(|terms| Output { terms }).collect();
        let sums = Experts { groups: &groups, x: X::Here(&self.x), outputs: &outputs }.run(workspace).unwrap();
        assert_eq!(sums.len(), outputs.len() * out);
        sums.to_vec()
    }

    fn run_there(&self, workspace: &mut Workspace, experts: &[GpuFfn], x: &[GpuBytes]) -> Vec<f32> {
        let groups: Vec<_> = experts.iter().zip(&self.rows).map(|(ffn, rows)| (ffn, &rows[..])).collect();
        let outputs: Vec<_> = self.outputs.iter().map(|terms| Output { terms }).collect();
        Experts { groups: &groups, x: X::There(x), outputs: &outputs }.run_there(workspace).unwrap().read().unwrap()
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, ..ProptestConfig::default() })]

    /// Close to plain loops, for all shapes and all sizes of tiles; and equal bits for a row whichever rows are beside it.
    #[test]
    fn experts_are_the_plain_loops_and_keep_rule_1(
        in_ in (1..40usize).prop_map(|n| n * 8),
        width in (1..26usize).prop_map(|n| n * 8),
        out in 1..150usize,
        counts in prop::collection::vec(prop_oneof![Just(0usize), 1..10usize, 1..40usize, 60..140usize], 1..4),
        is_fp8 in any::<bool>(),
        seed in any::<u64>(),
    ) {
        prop_assume!(counts.iter().sum::<usize>() > 0);
        let mut random = Random::new(seed);
        let plain: Vec<Expert> = counts.iter().map(|_| Expert::random(&mut random, [in_, width, out], is_fp8)).collect();
        let device = device(64 << 20, seed);
        let experts: Vec<GpuFfn> = plain.iter().map(|expert| expert.load(&device)).collect();
        let call = Call::random(&mut random, in_, &counts);
        let mut workspace = Workspace::new(device.clone());
        let sums = call.run(&mut workspace, &experts, out);

        let mut y = Vec::new();
        for (expert, rows) in plain.iter().zip(&call.rows) {
            for row in rows {
                y.push(expert.forward(&call.x[*row as usize * in_..][..in_]));
            }
        }
        for (terms, sums) in call.outputs.iter().zip(sums.chunks_exact(out)) {
            for (i, sum) in sums.iter().enumerate() {
                let expected: f32 = terms.iter().map(|(row, weight)| y[*row as usize][i] * weight).sum();
                prop_assert!((sum - expected).abs() < 0.02, "output {i}: {sum}, expected {expected}");
            }
        }

        // Rows that are on the GPU already, here and there, and sums that stay there.
        let bytes: &[u8] = bytemuck::cast_slice(&call.x);
        let (first, second) = bytes.split_at(random.below(call.x.len() / in_ + 1) * in_ * 2);
        let pieces = [first, second].map(|piece| GpuBytes::of(&device, piece).unwrap());
        prop_assert_eq!(bits(&call.run_there(&mut workspace, &experts, &pieces)), bits(&sums));

        // One row of one expert alone: the smallest tile there is.
        let y_row = random.below(y.len());
        let (mut expert, mut place) = (0, y_row);
        while place >= call.rows[expert].len() {
            place -= call.rows[expert].len();
            expert += 1;
        }
        let alone = Call {
            x: call.x.clone(),
            rows: vec![vec![call.rows[expert][place]]],
            outputs: vec![vec![(0, 1.0)]],
        };
        let single = alone.run(&mut workspace, std::slice::from_ref(&experts[expert]), out);
        prop_assert_eq!(bits(&single), bits(&sums[y_row * out..][..out]));
    }
}

/// What a call does not write stays as it was, and what it writes does not depend on what was there.
#[test]
fn a_second_call_in_the_same_workspace_gives_the_same() {
    let mut random = Random::new(7);
    let device = device(16 << 20, 7);
    let experts = [Expert::random(&mut random, [256, 160, 256], true).load(&device)];
    let mut workspace = Workspace::new(device.clone());
    let mut run =
        |rows: usize| Call::random(&mut Random::new(rows as u64), 256, &[rows]).run(&mut workspace, &experts, 256);
    // 3 and 4 rows are calls of one size: the second is a replay, with a row more.
    let results = [3, 70, 3, 4].map(&mut run);
    let alone = [3, 4].map(|rows| {
        let mut fresh = Workspace::new(device.clone());
        Call::random(&mut Random::new(rows as u64), 256, &[rows]).run(&mut fresh, &experts, 256)
    });
    assert_eq!([&results[0], &results[2], &results[3]], [&alone[0], &alone[0], &alone[1]]);
    assert!(results.iter().flatten().all(|x| x.is_finite()));
}

/// As `moesaic bench --rank expert` measures a rank.
#[test]
fn random_experts_give_numbers_and_a_recording_gives_the_same() {
    let device = device(64 << 20, 9);
    for is_fp8 in [true, false] {
        let make = |seed| GpuFfn::random(&device, [256, 128, 256], is_fp8, seed).unwrap();
        let (experts, again) = ([make(1), make(2)], [make(1), make(2)]);
        let mut workspace = Workspace::new(device.clone());
        let call = Call::random(&mut Random::new(3), 256, &[5, 12]);
        let sums = call.run(&mut workspace, &experts, 256);
        assert!(
            sums.iter().all(|x| x.is_finite()) && sums.iter().any(|x| x.abs() > 0.01),
            "{is_fp8}: {:?}",
            &sums[..8]
        );
        assert_eq!(call.run(&mut workspace, &again, 256), sums, "the same seed");

        let groups: Vec<_> = experts.iter().zip(&call.rows).map(|(ffn, rows)| (ffn, &rows[..])).collect();
        let outputs: Vec<_> = call.outputs.iter().map(|terms| Output { terms }).collect();
        let (asked, mut parcel) = (Experts { groups: &groups, x: X::Here(&call.x), outputs: &outputs }, None);
        let sent = [asked.send(&mut workspace, &mut parcel).unwrap()];
        let recorded = Recorded::new(&device, &sent).unwrap();
        for _ in 0..2 {
            recorded.queue().unwrap();
            device.finish().unwrap();
            assert_eq!(workspace.sums(sums.len()).unwrap(), sums);
        }
    }
}

#[test]
fn weights_that_kernels_cannot_read_are_refused_by_name() {
    let device = device(1 << 20, 1);
    let mut random = Random::new(1);
    let refusal = |expert: &Expert| {
        let [gate, up, down] = [&expert.gate, &expert.up, &expert.down].map(Stored::matrix);
        GpuFfn::load(&device, &gate, &up, &down).unwrap_err().to_string()
    };
    let mut nan = Expert::random(&mut random, [128, 64, 128], true);
    nan.up.bytes[128 + 5] = 0xff;
    assert_eq!(refusal(&nan), "FP8 weights have a NaN at row 1, column 5");
    let narrow = Expert::random(&mut random, [12, 64, 8], false);
    assert_eq!(refusal(&narrow), "12 inputs; on a GPU they have to be a multiple of 8");
    let mut mixed = Expert::random(&mut random, [128, 64, 128], true);
    mixed.down = Stored::random(&mut random, 128, 64, false);
    assert_eq!(refusal(&mixed), "weights of one linear are stored in more than one way");
    let large = Expert::random(&mut random, [512, 2048, 512], true);
    assert!(refusal(&large).contains("bytes are asked of the GPU's arena of 1048576"), "{}", refusal(&large));
}
