//! Attention over pages against the plain loop and against a softmax in f64.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::{Samples, assert_bits, pools};
use crate::{Dtype, Numerics};

/// Dimensions of a model's attention.
#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    latent: usize,
    rope: usize,
}

/// A cache with sequences in it: two layers, of which the second is attended to, pages in no order, NaN wherever no token is.
struct Cached {
    numerics: Numerics,
    shape: Shape,
    cache: LatentPages,
    sequences: Vec<Sequence>,
}

struct Sequence {
    pages: Vec<u32>,
    /// Each [latent + rope] as the cache keeps it.
    tokens: Vec<Vec<f32>>,
}

/// A query: of which sequence, over how many of its tokens, with which q.
struct Row {
    sequence: usize,
    context: usize,
    q: Vec<f32>,
}

const LAYER: usize = 1;

impl Cached {
    fn new(n: Numerics, shape: Shape, lengths: &[usize], magnitude: f32, s: &mut Samples) -> Self {
        let Shape { latent, rope, .. } = shape;
        let needed: usize = lengths.iter().map(|len| len.div_ceil(PAGE_TOKENS)).sum();
        let mut free: Vec<u32> = (0..needed as u32 + 2).collect();
        let mut cache = LatentPages::new(n, 2, free.len(), latent, rope);
        let nan = vec![f32::NAN; latent + rope];
        for place in 0..2 * free.len() * PAGE_TOKENS {
            let (layer, page) = (place % 2, (place / 2 / PAGE_TOKENS) as u32);
            cache.write(layer, page, place / 2 % PAGE_TOKENS, &nan[..latent], &nan[latent..]);
        }
        let mut sequences = Vec::new();
        for len in lengths {
            let mut sequence = Sequence { pages: Vec::new(), tokens: Vec::new() };
            for t in 0..*len {
                if t % PAGE_TOKENS == 0 {
                    sequence.pages.push(free.swap_remove(s.below(free.len())));
                }
                let token = s.values(latent + rope, magnitude);
                cache.write(
                    LAYER,
                    sequence.pages[t / PAGE_TOKENS],
                    t % PAGE_TOKENS,
                    &token[..latent],
                    &token[latent..],
                );
                sequence.tokens.push(token.into_iter().map(|x| kept(n, x)).collect());
            }
            sequences.push(sequence);
        }
        Self { numerics: n, shape, cache, sequences }
    }

    fn query<'a>(&'a self, row: &'a Row) -> Query<'a> {
        Query { q: &row.q, pages: &self.sequences[row.sequence].pages, context: row.context }
    }

    fn attend(&self, isa: Isa, pool: &Pool, rows: &[Row], scale: f32) -> Vec<f32> {
        let queries: Vec<Query<'_>> = rows.iter().map(|row| self.query(row)).collect();
        let Shape { heads, latent, .. } = self.shape;
        let mut out = vec![f32::NAN; rows.len() * heads * latent];
        let call = super::Call { cache: &self.cache, layer: LAYER, queries: &queries, heads, scale };
        mla_attend_on(isa, pool, call, &mut out);
        out
    }

    fn context(&self, row: &Row) -> &[Vec<f32>] {
        &self.sequences[row.sequence].tokens[..row.context]
    }

    fn expected(&self, rows: &[Row], scale: f32) -> Vec<f32> {
        let Shape { latent, rope, .. } = self.shape;
        let head = |row: &Row, q: &[f32]| reference::attend(self.numerics, q, self.context(row), latent, scale);
        rows.iter().flat_map(|row| row.q.chunks_exact(latent + rope).flat_map(move |q| head(row, q))).collect()
    }

    /// Together on every instruction set and pool, and one row at a time: always the plain loop's bits.
    fn check(&self, rows: &[Row], scale: f32) -> Vec<f32> {
        let expected = self.expected(rows, scale);
        for isa in Isa::available() {
            for pool in pools() {
                let out = self.attend(isa, pool, rows, scale);
                assert_bits(&out, &expected, format_args!("{isa:?}, {} threads", pool.threads()));
            }
            let alone: Vec<f32> = rows.chunks(1).flat_map(|row| self.attend(isa, &pools()[0], row, scale)).collect();
            assert_bits(&alone, &expected, format_args!("{isa:?}, rows alone"));
        }
        expected
    }
}

/// What the cache makes of a value.
fn kept(n: Numerics, x: f32) -> f32 {
    if n.activations() == Dtype::F32 { x } else { bf16::from_f32(x).to_f32() }
}

/// f32, bf16, and bf16-dp.
fn all_numerics() -> [Numerics; 3] {
    let by_pairs = Numerics::all().into_iter().find(|n| n.name() == "bf16-dp").unwrap();
    [Numerics::portable(Dtype::F32), Numerics::portable(Dtype::Bf16), by_pairs]
}

fn any_rows(cached: &Cached, count: usize, magnitude: f32, s: &mut Samples) -> Vec<Row> {
    let Shape { heads, latent, rope } = cached.shape;
    let row = |_| {
        let sequence = s.below(cached.sequences.len());
        let context = 1 + s.below(cached.sequences[sequence].tokens.len());
        Row { sequence, context, q: s.values(heads * (latent + rope), magnitude) }
    };
    (0..count).map(row).collect()
}

fn any_shape() -> impl Strategy<Value = Shape> {
    (1..=20usize, 1..80usize, 0..40usize).prop_map(|(heads, latent, rope)| Shape { heads, latent, rope })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn equals_the_plain_loop(
        shape in any_shape(),
        lengths in prop::collection::vec(1..=200usize, 1..4),
        count in 0..6usize,
        (magnitude, seed) in (prop_oneof![Just(1.0f32), Just(10.0), Just(1e-20)], any::<u64>()),
    ) {
        for n in all_numerics() {
            let mut s = Samples::new(seed);
            let cached = Cached::new(n, shape, &lengths, magnitude, &mut s);
            let rows = any_rows(&cached, count, magnitude, &mut s);
            cached.check(&rows, 0.3);
        }
    }

    #[test]
    fn agrees_with_a_softmax_in_f64(shape in any_shape(), len in 1..=200usize, seed in any::<u64>()) {
        for n in all_numerics() {
            let mut s = Samples::new(seed);
            let cached = Cached::new(n, shape, &[len], 1.0, &mut s);
            let rows = any_rows(&cached, 3, 1.0, &mut s);
            let out = cached.attend(Isa::best(), &pools()[0], &rows, 0.5);
            let heads = rows.iter().flat_map(|row| {
                row.q.chunks_exact(shape.latent + shape.rope).map(|q| exact(q, cached.context(row), shape.latent, 0.5))
            });
            for (out, exact) in out.iter().zip(heads.flatten()) {
                // Values are below 1; scores below 60 with errors below 1e-5 each, which cancel mostly. By pairs q and
                // p are rounded to 8 bits: the scores' errors are below 0.25.
                let tolerance = if n.name() == "bf16-dp" { 0.1 } else { 3e-6 };
                prop_assert!((f64::from(*out) - exact).abs() < tolerance, "{out} {exact}");
            }
        }
    }
}

fn exact(q: &[f32], tokens: &[Vec<f32>], latent: usize, scale: f64) -> Vec<f64> {
    let dot = |kv: &[f32]| q.iter().zip(kv).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale;
    let scores: Vec<f64> = tokens.iter().map(|kv| dot(kv)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = p.iter().sum();
    (0..latent).map(|d| p.iter().zip(tokens).map(|(p, kv)| p * f64::from(kv[d])).sum::<f64>() / sum).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    /// Decode rows of several sequences and a chunk of prefill, enough of them for several threads.
    #[test]
    fn equals_the_plain_loop_on_threads(heads in 17..=33usize, rope in 1..20usize, seed in any::<u64>()) {
        let shape = Shape { heads, latent: 61, rope };
        for n in all_numerics() {
            let mut s = Samples::new(seed);
            let cached = Cached::new(n, shape, &[200, 64, 129], 1.0, &mut s);
            let mut rows = any_rows(&cached, 6, 1.0, &mut s);
            let q = |s: &mut Samples| s.values(heads * (61 + rope), 1.0);
            rows.extend((190..=200).map(|context| Row { sequence: 0, context, q: q(&mut s) }));
            let work = rows.iter().map(|row| row.context).sum::<usize>() * heads * (2 * 61 + rope);
            prop_assert!(!pools()[1].is_inline(work));
            cached.check(&rows, 0.3);
        }
    }
}

#[test]
fn every_context_about_the_ends_of_pages() {
    let shape = Shape { heads: 5, latent: 19, rope: 6 };
    for n in all_numerics() {
        let mut s = Samples::new(2);
        let cached = Cached::new(n, shape, &[195], 1.0, &mut s);
        let row = |context| Row { sequence: 0, context, q: s.values(5 * 25, 1.0) };
        let rows: Vec<Row> = [1..20, 45..83, 120..131, 190..196].into_iter().flatten().map(row).collect();
        cached.check(&rows, 0.3);
    }
}

#[test]
fn one_token_is_its_value() {
    for n in all_numerics() {
        let mut s = Samples::new(3);
        let cached = Cached::new(n, Shape { heads: 18, latent: 21, rope: 4 }, &[70], 1.0, &mut s);
        let rows = [Row { sequence: 0, context: 1, q: s.values(18 * 25, 9.0) }];
        let out = cached.check(&rows, 1.0);
        // But for the sign of zeros.
        out.chunks_exact(21).for_each(|head| assert_eq!(head, &cached.sequences[0].tokens[0][..21]));
    }
}

#[test]
fn equal_scores_give_the_mean() {
    let mut s = Samples::new(3);
    let cached = Cached::new(all_numerics()[0], Shape { heads: 3, latent: 10, rope: 2 }, &[150], 1.0, &mut s);
    let out = cached.check(&[Row { sequence: 0, context: 150, q: vec![0.0; 36] }], 1.0);
    for (i, out) in out.iter().enumerate() {
        let mean = cached.sequences[0].tokens.iter().map(|kv| f64::from(kv[i % 10])).sum::<f64>() / 150.0;
        assert!((f64::from(*out) - mean).abs() < 1e-6, "{out} {mean}");
    }
}

/// Scores as far apart as f32 allows: what is left is the token with the largest.
#[test]
fn one_score_far_above_the_others_takes_its_token() {
    for n in all_numerics() {
        for scale in [1.0, 1e4, 1e30, 1e37] {
            let mut s = Samples::new(3);
            let cached = Cached::new(n, Shape { heads: 1, latent: 10, rope: 2 }, &[150], 1.0, &mut s);
            let q = s.values(12, 1.0).into_iter().map(|q| q * 2.0).collect();
            let rows = [Row { sequence: 0, context: 150, q }];
            let out = cached.check(&rows, scale);
            assert!(out.iter().all(|x| x.is_finite() && x.abs() <= 1.0), "{out:?}");
            if scale > 1e20 {
                let score = |kv: &&Vec<f32>| rows[0].q.iter().zip(*kv).map(|(q, k)| q * k).sum::<f32>();
                let best = cached.sequences[0].tokens.iter().max_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
                assert_eq!(out, best[..10], "scale {scale:e}");
            }
        }
    }
}

#[test]
fn no_rows() {
    let cached =
        Cached::new(all_numerics()[0], Shape { heads: 3, latent: 10, rope: 2 }, &[5], 1.0, &mut Samples::new(3));
    assert_eq!(cached.check(&[], 1.0), [] as [f32; 0]);
}

#[test]
fn by_default_it_is_the_best_instruction_set() {
    let mut s = Samples::new(3);
    let cached = Cached::new(all_numerics()[1], Shape { heads: 3, latent: 10, rope: 2 }, &[90], 1.0, &mut s);
    let rows = any_rows(&cached, 1, 1.0, &mut s);
    let mut out = [f32::NAN; 30];
    mla_attend(&pools()[1], &cached.cache, LAYER, &[cached.query(&rows[0])], 3, 0.4, &mut out);
    assert_bits(&out, &cached.expected(&rows, 0.4), format_args!("mla_attend"));
}

fn attend_wrongly(q: usize, pages: &[u32], context: usize, out: usize) {
    let cache = LatentPages::new(all_numerics()[0], 1, 2, 3, 1);
    let query = Query { q: &vec![0.0; q], pages, context };
    mla_attend(&pools()[0], &cache, 0, &[query], 2, 1.0, &mut vec![0.0; out]);
}

#[test]
#[should_panic(expected = "q is not [heads, latent + rope]")]
fn q_has_to_be_whole() {
    attend_wrongly(7, &[0], 1, 6);
}

#[test]
#[should_panic(expected = "a query without a context")]
fn a_context_has_a_token() {
    attend_wrongly(8, &[0], 0, 6);
}

#[test]
#[should_panic(expected = "context 65 of 1 pages")]
fn a_context_is_within_its_pages() {
    attend_wrongly(8, &[0], 65, 6);
}

#[test]
#[should_panic(expected = "layer 0, page 2 of 1, 2")]
fn pages_have_to_be_there() {
    attend_wrongly(8, &[0, 2], 65, 6);
}

#[test]
#[should_panic(expected = "out is not [rows, heads, latent]")]
fn out_has_to_be_whole() {
    attend_wrongly(8, &[0], 1, 5);
}
