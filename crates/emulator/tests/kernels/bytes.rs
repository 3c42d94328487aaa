//! Rows that are picked out of others, and sums of rows that lie anywhere.

use moesaic_kernels::cuda::{Addend, GpuBytes, Kind, add_up, pick_rows};
use moesaic_kernels::{add, combine_first, combine_next};
use proptest::prelude::*;

use moesaic_emulator::test_device as device;

use crate::support::Random;

#[test]
fn what_is_queued_for_memory_is_through_before_others_have_it() {
    let (device, mut list) = (device(1 << 20, 1), None);
    let x = device.buffer_of(&[7u16; 64]).unwrap();
    let mut picked = |rows| pick_rows(&device, x.view(), 64, &vec![0; rows], &mut list).unwrap();
    let first = picked(1);
    let at = first.address();
    drop(first);
    let other = device.buffer_of(&[9u8; 128]).unwrap();
    assert_ne!(other.address(), at, "it may still be written to");
    device.finish().unwrap();
    assert_eq!(GpuBytes::new(&device, other).read::<u8>().unwrap(), [9; 128]);
    assert_eq!(device.buffer::<u8>(128).unwrap().address(), at);
    // Where there is no room beside it, it is waited for: more than half of the arena.
    let large = picked(4500).len();
    assert!(large > (1 << 20) / 2);
    device.buffer::<u8>(large).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn picked_rows_are_those_of_x(width in 1..1300usize, rows in 1..20usize, seed in any::<u64>()) {
        let (mut random, device, width) = (Random::new(seed), device(4 << 20, seed), width * 2);
        let x: Vec<u16> = (0..rows * width).map(|_| random.below(1 << 16) as u16).collect();
        let picks: Vec<u32> = (0..random.below(30) + 1).map(|_| random.below(rows) as u32).collect();
        let there = device.buffer_of(&x).unwrap();
        let picked = pick_rows(&device, there.view(), width, &picks, &mut None).unwrap();
        let expected: Vec<u16> = picks.iter().flat_map(|row| &x[*row as usize * width..][..width]).copied().collect();
        prop_assert_eq!(picked.read::<u16>().unwrap(), expected.clone());
        // Some of them.
        let (first, end) = (picks.len() / 3, picks.len() - picks.len() / 3);
        let part = picked.slice(first * width * 2..end * width * 2).read::<u16>().unwrap();
        prop_assert_eq!(part, &expected[first * width..end * width]);
    }

    /// The same bits as the processor's operations make.
    #[test]
    fn sums_are_the_processors(width in 1..1300usize, rows in 1..8usize, seed in any::<u64>()) {
        let (mut random, device) = (Random::new(seed), device(4 << 20, seed));
        let answers: Vec<Vec<f32>> = (0..random.below(3) + 1).map(|_| {
            let outputs = random.below(5) + 1;
            (0..outputs * width).map(|_| if random.below(9) == 0 { -0.0 } else { random.unit() }).collect()
        }).collect();
        let (mut addends, mut ends, mut expected) = (Vec::new(), Vec::new(), vec![f32::NAN; rows * width]);
        for y in expected.chunks_exact_mut(width) {
            for group in 0..random.below(4) + 1 {
                let mut sum = vec![f32::NAN; width];
                for single in 0..random.below(4) + 1 {
                    let answer = random.below(answers.len());
                    let output = random.below(answers[answer].len() / width);
                    let (value, weight) = (&answers[answer][output * width..][..width], random.unit());
                    let is_whole = single == 0 && random.below(2) == 0;
                    let kind = match single {
                        0 if is_whole => Kind::Whole,
                        0 => Kind::First(weight),
                        _ => Kind::Next(weight),
                    };
                    match kind {
                        Kind::Whole => sum.copy_from_slice(value),
                        Kind::First(weight) => combine_first(&mut sum, weight, value),
                        Kind::Next(weight) => combine_next(&mut sum, weight, value),
                    }
                    addends.push(Addend { answer, output, kind });
                    if is_whole {
                        break;
                    }
                }
                if group == 0 { y.copy_from_slice(&sum) } else { add(y, &sum) }
            }
            ends.push(addends.len());
        }
        let there: Vec<GpuBytes> = answers
            .iter()
            .map(|answer| GpuBytes::of(&device, bytemuck::cast_slice(answer)).unwrap())
            .collect();
        let (y, mut parcel) = (device.buffer::<f32>(rows * width).unwrap(), None);
        add_up(&device, &there, &addends, &ends, width, &mut parcel, y.view()).unwrap();
        let mut returned = device.returned::<f32>(rows * width).unwrap();
        device.queue_return(y.view(), &mut returned, rows * width).unwrap();
        device.finish().unwrap();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(returned.values()), bits(&expected));
    }
}
