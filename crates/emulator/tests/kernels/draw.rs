//! Tokens that are drawn where the logits are: the same that the processor draws.

use moesaic_emulator::test_device as device;
use moesaic_kernels::cuda::{self, Drawn};
use moesaic_kernels::{Draw, Edit, draw};
use proptest::prelude::*;

use crate::support::Random;

/// Logits of many kinds: few values and many equals, some that are no numbers, some rows of nothing else.
fn logits(random: &mut Random, len: usize, spread: f32, is_coarse: bool) -> Vec<f32> {
    let is_lost = random.below(10) == 0;
    let value = |random: &mut Random| match random.below(40) {
        0 => f32::NAN,
        1 => f32::NEG_INFINITY,
        2 => -0.0,
        3 if is_lost => f32::INFINITY,
        _ if is_lost => f32::NEG_INFINITY,
        _ if is_coarse => (random.unit() * spread).round(),
        _ => random.unit() * spread,
    };
    (0..len).map(|_| value(random)).collect()
}

fn any_draw(random: &mut Random, vocabulary: usize) -> Draw {
    let mut one_of = |values: &[f32]| values[random.below(values.len())];
    let (temperature, top_p, min_p) =
        (one_of(&[0.0, 0.3, 1.0, 2.0]), one_of(&[1.0, 1.0, 0.0, 0.2, 0.9, 0.999]), one_of(&[0.0, 0.0, 0.1, 1.0]));
    let top_k = [0, 0, 1, 7, 50, vocabulary, usize::MAX][random.below(7)];
    let bits = (random.below(1 << 32) as u64) << 32 | random.below(1 << 32) as u64;
    let random_bits = [0, u64::MAX, bits, bits][random.below(4)];
    let step = 1 + random.below(2 * vocabulary);
    let edits = (0..vocabulary as u32).step_by(step).skip(random.below(2));
    let edit = |token| Edit {
        token,
        bias: random.unit() * 3.0,
        repetition: 1.0 + random.unit().abs(),
        penalty: random.unit(),
    };
    Draw { temperature, top_k, top_p, min_p, random: random_bits, edits: edits.map(edit).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn draws_what_the_processor_draws(
        vocabulary in prop_oneof![1..70usize, 900..1200usize, 2000..5000usize],
        rows in 1..6usize,
        spread in prop_oneof![Just(1.0f32), Just(12.0), Just(1000.0)],
        is_coarse in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (mut random, device) = (Random::new(seed), device(1 << 20, seed));
        let logits: Vec<Vec<f32>> = (0..rows).map(|_| logits(&mut random, vocabulary, spread, is_coarse)).collect();
        let draws: Vec<Draw> = (0..rows).map(|_| any_draw(&mut random, vocabulary)).collect();
        let mut edits = Vec::new();
        let mut there = Vec::new();
        for draw in &draws {
            there.push(Drawn::new(draw, edits.len()));
            edits.extend(draw.edits.iter().copied());
        }
        let logits_there = device.buffer_of(&logits.concat()).unwrap();
        let (draws_there, edits_there) = (device.buffer_of(&there).unwrap(), device.buffer_of(&edits).unwrap());
        let tokens = device.buffer::<u32>(rows).unwrap();
        cuda::draw(
            &device,
            vocabulary,
            logits_there.view(),
            draws_there.view(),
            edits_there.view(),
            tokens.view(),
        )
        .unwrap();
        let mut got = device.returned::<u32>(rows).unwrap();
        device.queue_return(tokens.view(), &mut got, rows).unwrap();
        device.finish().unwrap();
        for ((logits, how), got) in logits.iter().zip(&draws).zip(got.values()) {
            prop_assert_eq!(*got, draw(logits, how), "{:?} {:?}", how, logits);
        }
    }
}
