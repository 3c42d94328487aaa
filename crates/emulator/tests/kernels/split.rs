//! Rows that are split over those who have their experts.

use moesaic_kernels::cuda::{NOBODY, Routed, Split, split_rows};
use proptest::prelude::*;

use moesaic_emulator::test_device as device;

use crate::support::Random;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn each_taker_has_the_first_rows_that_choose_its_experts(
        width in 1..200usize,
        rows in prop_oneof![1..40usize, Just(Split::ROWS_MAX)],
        takers in 1..6usize,
        room in 1..40usize,
        top_k in 1..9usize,
        seed in any::<u64>(),
    ) {
        let (mut random, device, width, experts) = (Random::new(seed), device(64 << 20, seed), width * 2, 24);
        let x: Vec<u16> = (0..rows * width).map(|_| random.below(1 << 16) as u16).collect();
        let owners: Vec<u32> = (0..experts).map(|_| match random.below(takers + 1) {
            0 => NOBODY,
            taker => taker as u32 - 1,
        }).collect();
        let choices: Vec<Routed> = (0..rows * top_k)
            .map(|_| Routed { expert: random.below(experts) as u32, weight: random.unit() })
            .collect();
        let (x_there, choices_there) = (device.buffer_of(&x).unwrap(), device.buffer_of(&choices).unwrap());
        let split = Split { owners: &owners, takers, room, top_k, width };
        let mut list = None;
        let shares = split_rows(&device, rows, x_there.view(), choices_there.view(), &split, &mut list).unwrap();
        let of_row = |row: usize| &choices[row * top_k..][..top_k];
        for (taker, share) in shares.cut(std::iter::repeat_n(split.share_bytes(), takers)).enumerate() {
            let own = |row: &usize| of_row(*row).iter().any(|choice| owners[choice.expert as usize] == taker as u32);
            let expected: Vec<usize> = (0..rows).filter(own).take(room).collect();
            prop_assert_eq!(share.slice(0..4).read::<u32>().unwrap(), [expected.len() as u32]);
            // What is behind as many says nothing.
            let part = |start: usize, bytes: usize| share.slice(start..start + bytes);
            let choices_there = part(Split::CHOICES, expected.len() * top_k * size_of::<Routed>()).read::<Routed>();
            let chosen: Vec<Routed> = expected.iter().flat_map(|row| of_row(*row)).copied().collect();
            prop_assert_eq!(choices_there.unwrap(), chosen);
            let rows_there = part(Split::table_bytes(room, top_k), expected.len() * width * 2).read::<u16>();
            let taken: Vec<u16> = expected.iter().flat_map(|row| &x[row * width..][..width]).copied().collect();
            prop_assert_eq!(rows_there.unwrap(), taken);
        }
    }
}
