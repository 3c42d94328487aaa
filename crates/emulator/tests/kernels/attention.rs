//! Rows that go to their pages and attend to their contexts, against plain loops.

use half::bf16;
use moesaic_kernels::cuda::{Append, Attend, Device, Pages, Rotate, append, attend, room, rotate};
use moesaic_kernels::{PAGE_TOKENS, RopeParams, RopeTable};
use proptest::prelude::*;

use moesaic_emulator::test_device as device;

use crate::support::Random;

const LAYERS: usize = 2;
const LAYER: usize = 1;
const NOPE: usize = 16;
const SCALE: f32 = 0.2;

fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// A cache whose pages lie in no order, and what is in it.
struct Cache {
    device: Device,
    pages: Pages,
    rope: RopeTable,
    turns: moesaic_kernels::cuda::Buffer<f32>,
    /// Of each token of each sequence, as it should be in its page: [latent + rope].
    sequences: Vec<Vec<Vec<f32>>>,
    tables: Vec<Vec<u32>>,
}

impl Cache {
    fn fill(random: &mut Random, seed: u64, latent: usize, rope: usize, lengths: &[usize]) -> Self {
        let device = device(64 << 20, seed);
        let counts: Vec<usize> = lengths.iter().map(|len| len.div_ceil(PAGE_TOKENS)).collect();
        let total: usize = counts.iter().sum();
        let mut free: Vec<u32> = (0..total as u32).collect();
        for i in (1..total).rev() {
            free.swap(i, random.below(i + 1));
        }
        let tables: Vec<Vec<u32>> = counts.iter().map(|count| free.split_off(free.len() - count)).collect();
        let longest = lengths.iter().copied().max().unwrap();
        let table = RopeTable::new(&RopeParams { dim: rope, theta: 10_000.0, yarn: None }, longest);
        let norm: Vec<f32> = (0..latent).map(|_| 1.0 + 0.3 * random.unit()).collect();
        let width = latent + rope;
        let kv: Vec<f32> = (0..lengths.iter().sum::<usize>() * width).map(|_| random.unit()).collect();

        let positions: Vec<u32> = lengths.iter().flat_map(|len| 0..*len as u32).collect();
        let slot = |table: &Vec<u32>, position: usize| {
            table[position / PAGE_TOKENS] * PAGE_TOKENS as u32 + (position % PAGE_TOKENS) as u32
        };
        let slots: Vec<u32> =
            lengths.iter().zip(&tables).flat_map(|(len, table)| (0..*len).map(|p| slot(table, p))).collect();
        let pages = Pages::new(&device, LAYERS, total, latent, rope).unwrap();
        let turns = device.buffer_of(table.turns().as_flattened()).unwrap();
        let [kv_there, norm_there] = [&kv, &norm].map(|values| device.buffer_of(values).unwrap());
        let [positions_there, slots_there] = [&positions, &slots].map(|values| device.buffer_of(values).unwrap());
        let new = Append {
            kv: kv_there.view(),
            norm: norm_there.view(),
            eps: 1e-6,
            turns: turns.view(),
            positions: positions_there.view(),
            slots: slots_there.view(),
        };
        append(&device, &pages, LAYER, new).unwrap();
        device.finish().unwrap();

        let mut rows = kv.chunks_exact(width);
        let mut token = |position: usize| {
            let (of_latent, key) = rows.next().unwrap().split_at(latent);
            let mean = of_latent.iter().map(|x| x * x).sum::<f32>() / latent as f32;
            let factor = 1.0 / (mean + 1e-6).sqrt();
            let mut key = key.to_vec();
            table.apply(position, &mut key);
            of_latent.iter().zip(&norm).map(|(x, w)| x * factor * w).chain(key).map(rounded).collect::<Vec<f32>>()
        };
        let sequences = lengths.iter().map(|len| (0..*len).map(&mut token).collect()).collect();
        Self { device, pages, rope: table, turns, sequences, tables }
    }

    /// Rows that attend to so many tokens of a sequence each: [heads, rows, latent], q being [rows, heads, latent + rope].
    fn attend(&self, rows: &[(usize, usize)], heads: usize, q: &[f32], room_for: usize) -> Vec<f32> {
        let (device, latent) = (&self.device, self.pages.latent());
        let bits: Vec<u16> = q.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
        let mut first = 0;
        let begins: Vec<u32> = self
            .tables
            .iter()
            .map(|table| {
                first += table.len();
                (first - table.len()) as u32
            })
            .collect();
        let contexts: Vec<u32> = rows.iter().map(|(_, context)| *context as u32).collect();
        let firsts: Vec<u32> = rows.iter().map(|(sequence, _)| begins[*sequence]).collect();
        let [contexts, firsts, pages] =
            [&contexts, &firsts, &self.tables.concat()].map(|values| device.buffer_of(values).unwrap());
        let longest = rows.iter().map(|(_, context)| *context).max().unwrap();
        let [sums, weights] = room(heads, latent, longest).map(|len| device.buffer::<f32>(len.min(room_for)).unwrap());
        let q = device.buffer_of(&bits).unwrap();
        let len = heads * rows.len() * latent;
        let o = device.buffer::<u16>(len).unwrap();
        let call = Attend {
            heads,
            scale: SCALE,
            longest,
            q: q.view(),
            contexts: contexts.view(),
            firsts: firsts.view(),
            pages: pages.view(),
            sums: sums.view(),
            weights: weights.view(),
            o: o.view(),
        };
        attend(device, &self.pages, LAYER, call).unwrap();
        let mut returned = device.returned::<u16>(len).unwrap();
        device.queue_return(o.view(), &mut returned, len).unwrap();
        device.finish().unwrap();
        returned.values().iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn rows_attend_to_their_contexts_and_keep_rule_1(
        latent in prop_oneof![4 => (1..9usize).prop_map(|n| n * 16), 1 => Just(512usize)],
        rope in (1..9usize).prop_map(|n| n * 8),
        heads in prop_oneof![1..5usize, 15..20usize, 60..70usize],
        lengths in prop::collection::vec(prop_oneof![3 => 1..200usize, 1 => 1000..1200usize], 1..3),
        row_count in 1..4usize,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let cache = Cache::fill(&mut random, seed, latent, rope, &lengths);
        let width = latent + rope;
        let row = |random: &mut Random| {
            let sequence = random.below(lengths.len());
            (sequence, 1 + random.below(lengths[sequence]))
        };
        let rows: Vec<(usize, usize)> = (0..row_count).map(|_| row(&mut random)).collect();
        let q: Vec<f32> = (0..row_count * heads * width).map(|_| rounded(random.unit())).collect();
        // Room for all of them at a time: contexts have two parts at most.
        let room_for_all = row_count * 2 * heads * latent;
        let o = cache.attend(&rows, heads, &q, room_for_all);

        for (i, (sequence, context)) in rows.iter().enumerate() {
            let tokens = &cache.sequences[*sequence][..*context];
            for head in 0..heads {
                let q = &q[(i * heads + head) * width..][..width];
                let scores: Vec<f32> =
                    tokens.iter().map(|kv| SCALE * kv.iter().zip(q).map(|(kv, q)| kv * q).sum::<f32>()).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f32 = weights.iter().sum();
                let got = &o[(head * row_count + i) * latent..][..latent];
                for (d, got) in got.iter().enumerate() {
                    let sum: f32 = tokens.iter().zip(&weights).map(|(kv, w)| kv[d] * w).sum();
                    prop_assert!((got - sum / total).abs() < 0.02, "row {i}, head {head}, {d}: {got}, expected {}", sum / total);
                }
            }
        }

        // The same rows alone, and in a room that holds few of them at a time.
        let room_for = heads * latent * 2;
        let crowded = cache.attend(&rows, heads, &q, room_for);
        prop_assert_eq!(&crowded, &o);
        let i = random.below(row_count);
        let alone = cache.attend(&rows[i..=i], heads, &q[i * heads * width..][..heads * width], room_for_all);
        for head in 0..heads {
            let beside = &o[(head * row_count + i) * latent..][..latent];
            prop_assert_eq!(&alone[head * latent..][..latent], beside);
        }
    }

    #[test]
    fn queries_are_rotated_at_their_ends(
        rope in (1..9usize).prop_map(|n| n * 8),
        heads in 1..5usize,
        rows in 1..6usize,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let (latent, positions_max) = (16, 50);
        let cache = Cache::fill(&mut random, seed, latent, rope, &[positions_max]);
        let device = &cache.device;
        let q: Vec<f32> = (0..rows * heads * (NOPE + rope)).map(|_| random.unit()).collect();
        let positions: Vec<u32> = (0..rows).map(|_| random.below(positions_max) as u32).collect();
        let (q_there, positions_there) = (device.buffer_of(&q).unwrap(), device.buffer_of(&positions).unwrap());
        let plain = device.buffer::<u16>(heads * rows * NOPE).unwrap();
        let absorbed = device.buffer_of(&vec![0u16; rows * heads * (latent + rope)]).unwrap();
        let call = Rotate {
            q: q_there.view(),
            turns: cache.turns.view(),
            positions: positions_there.view(),
            plain: plain.view(),
            absorbed: absorbed.view(),
        };
        rotate(device, &cache.pages, heads, NOPE, call).unwrap();
        let read = |from: &moesaic_kernels::cuda::Buffer<u16>| {
            let mut returned = device.returned::<u16>(from.len()).unwrap();
            device.queue_return(from.view(), &mut returned, from.len()).unwrap();
            device.finish().unwrap();
            returned.values().to_vec()
        };
        let (plain, absorbed) = (read(&plain), read(&absorbed));
        let bits = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<_>>();
        for (i, q) in q.chunks_exact(NOPE + rope).enumerate() {
            let (row, head) = (i / heads, i % heads);
            prop_assert_eq!(&plain[(head * rows + row) * NOPE..][..NOPE], bits(&q[..NOPE]));
            let mut end = q[NOPE..].to_vec();
            cache.rope.apply(positions[row] as usize, &mut end);
            let to = &absorbed[i * (latent + rope)..][..latent + rope];
            prop_assert!(to[..latent].iter().all(|x| *x == 0), "a write to what the heads' linear makes");
            prop_assert_eq!(&to[latent..], bits(&end));
        }
    }
}
