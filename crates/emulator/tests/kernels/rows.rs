//! The residual stream: embedding, norm, the gate.

use half::bf16;
use moesaic_kernels::cuda::{self, Buffer, Device, Normed, Routed, View, embed, gate, norm};
use moesaic_kernels::{Choice, GateParams, GroupScore, Scoring, route};
use proptest::prelude::*;

use moesaic_emulator::test_device as device;

use crate::support::Random;

fn read(device: &Device, from: View<'_, f32>) -> Vec<f32> {
    let mut returned = device.returned::<f32>(from.len()).unwrap();
    device.queue_return(from, &mut returned, from.len()).unwrap();
    device.finish().unwrap();
    returned.values().to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn embedding_takes_rows_of_the_table(hidden in 1..2600usize, rows in 1..20usize, seed in any::<u64>()) {
        let (mut random, device) = (Random::new(seed), device(4 << 20, seed));
        let table = random.bf16s(30 * hidden);
        let tokens: Vec<u32> = (0..rows).map(|_| random.below(30) as u32).collect();
        let bits: Vec<u16> = table.iter().map(|x| x.to_bits()).collect();
        let (table_there, tokens_there) = (device.buffer_of(&bits).unwrap(), device.buffer_of(&tokens).unwrap());
        let h = device.buffer::<f32>(rows * hidden).unwrap();
        embed(&device, tokens_there.view(), table_there.view(), hidden, h.view()).unwrap();
        let rows = tokens.iter().flat_map(|token| &table[*token as usize * hidden..][..hidden]);
        prop_assert_eq!(read(&device, h.view()), rows.map(|x| x.to_f32()).collect::<Vec<_>>());
    }

    #[test]
    fn a_norm_adds_what_is_pending_first(
        hidden in 1..2600usize,
        rows in 1..20usize,
        adds in 0..3usize,
        picks in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (mut random, device) = (Random::new(seed), device(4 << 20, seed));
        let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| random.unit()).collect() };
        let [mut h, y, shared] = [(); 3].map(|()| values(rows * hidden));
        let weight = values(hidden);
        // Some rows, backwards.
        let pick: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
        let count = if picks { pick.len() } else { rows };
        let [h_there, y_there, shared_there] = [&h, &y, &shared].map(|values| device.buffer_of(values).unwrap());
        let (weight_there, pick_there) = (device.buffer_of(&weight).unwrap(), device.buffer_of(&pick).unwrap());
        let (x, exact) = (device.buffer::<u16>(count * hidden).unwrap(), device.buffer::<f32>(count * hidden).unwrap());
        let normed = Normed {
            y: (adds > 0).then(|| y_there.view()),
            shared: (adds > 1).then(|| shared_there.view()),
            pick: picks.then(|| pick_there.view()),
            weight: Some(weight_there.view()),
            eps: 1e-6,
            x: Some(x.view()),
            exact: Some(exact.view()),
        };
        norm(&device, count, hidden, h_there.view(), normed).unwrap();
        let got = read(&device, exact.view());
        let mut rounded = device.returned::<u16>(count * hidden).unwrap();
        device.queue_return(x.view(), &mut rounded, count * hidden).unwrap();
        device.finish().unwrap();
        for (i, got) in got.chunks_exact(hidden).enumerate() {
            let row = if picks { pick[i] as usize } else { i };
            let h = &mut h[row * hidden..][..hidden];
            for (j, h) in h.iter_mut().enumerate() {
                let at = row * hidden + j;
                *h += [0.0, y[at], y[at] + shared[at]][adds];
            }
            let mean = h.iter().map(|h| f64::from(*h) * f64::from(*h)).sum::<f64>() / hidden as f64;
            let factor = 1.0 / (mean + 1e-6).sqrt();
            for (j, got) in got.iter().enumerate() {
                let expected = f64::from(h[j]) * factor * f64::from(weight[j]);
                prop_assert!((f64::from(*got) - expected).abs() < 1e-5 * (1.0 + expected.abs()), "{got}, expected {expected}");
                prop_assert_eq!(rounded.values()[i * hidden + j], bf16::from_f32(*got).to_bits());
            }
        }
        prop_assert_eq!(read(&device, h_there.view()), h);
    }

    #[test]
    fn logits_are_the_plain_products_and_keep_rule_1(
        hidden in 1..1300usize,
        experts in 1..40usize,
        rows in 1..20usize,
        seed in any::<u64>(),
    ) {
        let (mut random, device) = (Random::new(seed), device(4 << 20, seed));
        let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| random.unit()).collect() };
        let (x, weight) = (values(rows * hidden), values(experts * hidden));
        let weight_there = device.buffer_of(&weight).unwrap();
        let logits = |x: &[f32]| {
            let rows = x.len() / hidden;
            let (x, logits) = (device.buffer_of(x).unwrap(), device.buffer::<f32>(rows * experts).unwrap());
            gate(&device, rows, x.view(), weight_there.view(), hidden, logits.view()).unwrap();
            read(&device, logits.view())
        };
        let all = logits(&x);
        // On fewer blocks, and each row alone.
        let _lent = device.lend(random.below(100) as u32);
        for (x, got) in x.chunks_exact(hidden).zip(all.chunks_exact(experts)) {
            for (got, w) in got.iter().zip(weight.chunks_exact(hidden)) {
                let expected: f64 = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                prop_assert!((f64::from(*got) - expected).abs() < 1e-4, "{got}, expected {expected}");
            }
            prop_assert_eq!(&logits(x)[..], got);
        }
    }

    /// The processor's choices, ties and all: logits are of a few values, and whoever has equal ones is a tie.
    #[test]
    fn rows_go_to_the_experts_that_the_processor_chooses(
        (groups, members) in (1..9usize, 1..33usize),
        groups_kept in 1..9usize,
        top_k in 1..11usize,
        rows in 1..40usize,
        has_bias in any::<bool>(),
        scoring in prop_oneof![Just(Scoring::Softmax), Just(Scoring::Sigmoid)],
        group_score in prop_oneof![Just(GroupScore::Max), Just(GroupScore::TopTwoSum)],
        mask in prop_oneof![Just(0.0), Just(f32::NEG_INFINITY)],
        normalize in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (mut random, device) = (Random::new(seed), device(4 << 20, seed));
        let experts = groups * members;
        let params = GateParams { scoring, groups, groups_kept, top_k, group_score, mask, normalize, scale: 2.5 };
        let mut values = |len: usize, step: f32| -> Vec<f32> { (0..len).map(|_| random.below(9) as f32 * step).collect() };
        let (logits, bias) = (values(rows * experts, 0.75), has_bias.then(|| values(experts, 0.25)));
        let there = bias.as_ref().map(|bias| device.buffer_of(bias).unwrap());
        let of_row = top_k.min(experts);
        let choices = device.buffer::<Routed>(rows * of_row).unwrap();
        let logits_there = device.buffer_of(&logits).unwrap();
        let bias_there = there.as_ref().map(Buffer::view);
        cuda::route(&device, rows, logits_there.view(), bias_there, (&params, experts), choices.view()).unwrap();
        let mut got = device.returned::<Routed>(rows * of_row).unwrap();
        device.queue_return(choices.view(), &mut got, rows * of_row).unwrap();
        device.finish().unwrap();
        for (logits, got) in logits.chunks_exact(experts).zip(got.values().chunks_exact(of_row)) {
            let mut expected = Vec::new();
            route(logits, bias.as_deref(), &params, &mut expected);
            for (got, expected) in got.iter().map(|got| Choice::from(*got)).zip(&expected) {
                prop_assert_eq!(got.expert, expected.expert);
                prop_assert!((got.weight - expected.weight).abs() <= 1e-5 * expected.weight.abs(), "{got:?}, {expected:?}");
            }
        }
    }
}
