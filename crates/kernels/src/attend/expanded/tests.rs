//! The expanded form against the plain loop, on every instruction set, and against the absorbed form.

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::{Samples, Stored, StoredMatrix, assert_bits, pools};
use crate::{Dtype, Numerics, Query, mla_attend};

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    latent: usize,
    rope: usize,
    nope: usize,
    v: usize,
}

/// One sequence in a cache of one layer, with NaN wherever no token is, and its tokens' queries.
struct Sequence {
    numerics: Numerics,
    shape: Shape,
    cache: LatentPages,
    pages: Vec<u32>,
    /// Each [latent + rope], exact in bf16.
    tokens: Vec<Vec<f32>>,
    /// Of each head [nope, latent] and [v, latent].
    weights: Vec<[StoredMatrix; 2]>,
    /// [tokens, heads, nope + rope]
    q: Vec<f32>,
}

impl Sequence {
    fn new(n: Numerics, shape: Shape, len: usize, magnitude: f32, s: &mut Samples) -> Self {
        let Shape { heads, latent, rope, nope, v } = shape;
        let count = len.div_ceil(PAGE_TOKENS) as u32;
        let mut cache = LatentPages::new(n, 1, count as usize, latent, rope);
        let pages: Vec<u32> = (0..count).rev().collect();
        let nan = vec![f32::NAN; latent + rope];
        let mut tokens = Vec::new();
        for t in 0..count as usize * PAGE_TOKENS {
            let values = s.values(latent + rope, magnitude);
            let token = if t < len { &values } else { &nan };
            cache.write(0, pages[t / PAGE_TOKENS], t % PAGE_TOKENS, &token[..latent], &token[latent..]);
            if t < len {
                tokens.push(values.iter().map(|x| kept(n, *x)).collect());
            }
        }
        let mut head = |out| s.matrix(out, latent, Stored::F32, 1.0);
        let weights = (0..heads).map(|_| [head(nope), head(v)]).collect();
        let q = s.values(len * heads * (nope + rope), magnitude);
        Self { numerics: n, shape, cache, pages, tokens, weights, q }
    }

    fn per_head(&self, n: Numerics, which: usize, out: usize) -> PerHead {
        let weights: Vec<f32> = self.weights.iter().flat_map(|w| w[which].matrix().to_f32()).collect();
        PerHead::pack_f32(self.shape.heads, out, self.shape.latent, &weights, n)
    }

    /// The rows cut into spans, each a call of its own with its rows at another place.
    fn attend(&self, n: Numerics, pool: &Pool, cuts: &[usize], scale: f32) -> Vec<f32> {
        let Shape { heads, rope, nope, v, .. } = self.shape;
        let (key, value) = (self.per_head(n, 0, nope), self.per_head(n, 1, v));
        let mut out = Vec::new();
        for cut in cuts.windows(2) {
            let (start, rows) = (cut[0], cut[1] - cut[0]);
            let padding = vec![f32::NAN; 2 * heads * (nope + rope)];
            let q = &self.q[cut[0] * heads * (nope + rope)..cut[1] * heads * (nope + rope)];
            let q = [&padding, q, &padding].concat();
            let span = Span { rows: 2..2 + rows, start, pages: &self.pages };
            let mut to = vec![7.0; (rows + 4) * heads * v];
            let expand = Expand { key: &key, value: &value };
            mla_attend_expanded(pool, &self.cache, 0, &[span], expand, &q, scale, &mut to);
            let (before, rest) = to.split_at(2 * heads * v);
            let (to, after) = rest.split_at(rows * heads * v);
            assert!(before.iter().chain(after).all(|x| *x == 7.0), "rows of others were written");
            out.extend_from_slice(to);
        }
        out
    }

    fn expected(&self, scale: f32) -> Vec<f32> {
        let Shape { heads, rope, nope, .. } = self.shape;
        let heads_of = self.q.chunks_exact(nope + rope).enumerate();
        let one = |(i, q): (usize, &[f32])| {
            let [key, value] = &self.weights[i % heads];
            let context = &self.tokens[..=i / heads];
            reference::attend_expanded(self.numerics, q, context, [&key.matrix(), &value.matrix()], scale)
        };
        heads_of.flat_map(one).collect()
    }

    /// In spans of any length, on every instruction set and pool: the plain loop's bits.
    fn check(&self, cuts: &[usize], scale: f32) {
        let expected = self.expected(scale);
        let same = |n: &Numerics| n.name() == self.numerics.name();
        for n in Numerics::all().into_iter().filter(same) {
            for pool in pools() {
                for cuts in [cuts, &[0, self.tokens.len()]] {
                    let out = self.attend(n, pool, cuts, scale);
                    assert_bits(&out, &expected, format_args!("{n:?}, {} threads, {cuts:?}", pool.threads()));
                }
            }
        }
    }
}

fn kept(n: Numerics, x: f32) -> f32 {
    if n.activations() == Dtype::F32 { x } else { crate::bf16::from_f32(x).to_f32() }
}

/// f32, bf16, and bf16-dp.
fn all_numerics() -> [Numerics; 3] {
    let by_pairs = Numerics::all().into_iter().find(|n| n.name() == "bf16-dp").unwrap();
    [Numerics::portable(Dtype::F32), Numerics::portable(Dtype::Bf16), by_pairs]
}

fn any_shape() -> impl Strategy<Value = Shape> {
    (1..=3usize, 1..40usize, 0..12usize, 1..40usize, 1..90usize).prop_map(|(heads, latent, rope, nope, v)| Shape {
        heads,
        latent,
        rope,
        nope,
        v,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn equals_the_plain_loop(
        shape in any_shape(),
        len in 1..=150usize,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        (magnitude, seed) in (prop_oneof![Just(1.0f32), Just(6.0), Just(1e-20)], any::<u64>()),
    ) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(len)).chain([0, len]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        for n in all_numerics() {
            Sequence::new(n, shape, len, magnitude, &mut Samples::new(seed)).check(&cuts, 0.3);
        }
    }

    /// Both forms are the same formula, so in f32 they differ by rounding alone.
    #[test]
    fn agrees_with_the_absorbed_form(shape in any_shape(), len in 1..=150usize, seed in any::<u64>()) {
        let n = Numerics::detect(Dtype::F32);
        let sequence = Sequence::new(n, shape, len, 1.0, &mut Samples::new(seed));
        let expanded = sequence.attend(n, &pools()[1], &[0, len], 0.2);
        for (out, exact) in expanded.iter().zip(absorbed(&sequence, 0.2)) {
            prop_assert!((out - exact).abs() < 2e-3, "{out} {exact}");
        }
    }
}

/// Scores of q absorbed into W_UK, values made of the attended latents.
fn absorbed(sequence: &Sequence, scale: f32) -> Vec<f32> {
    let Shape { heads, latent, rope, nope, v } = sequence.shape;
    let len = sequence.tokens.len();
    let turned = |w: &[StoredMatrix; 2]| {
        let key = w[0].matrix().to_f32();
        (0..latent * nope).map(move |i| key[i % nope * latent + i / nope]).collect::<Vec<f32>>()
    };
    let n = sequence.numerics;
    let key_up: Vec<f32> = sequence.weights.iter().flat_map(turned).collect();
    let key_up = PerHead::pack_f32(heads, latent, nope, &key_up, n);
    let mut q = vec![0.0; len * heads * (latent + rope)];
    key_up.forward(&pools()[0], &sequence.q, nope + rope, &mut q, latent + rope);
    for (to, from) in q.chunks_exact_mut(latent + rope).zip(sequence.q.chunks_exact(nope + rope)) {
        to[latent..].copy_from_slice(&from[nope..]);
    }
    let rows = q.chunks_exact(heads * (latent + rope)).enumerate();
    let queries: Vec<Query<'_>> = rows.map(|(t, q)| Query { q, pages: &sequence.pages, context: t + 1 }).collect();
    let mut o = vec![0.0; len * heads * latent];
    mla_attend(&pools()[0], &sequence.cache, 0, &queries, heads, scale, &mut o);
    let mut out = vec![0.0; len * heads * v];
    sequence.per_head(n, 1, v).forward(&pools()[0], &o, latent, &mut out, v);
    out
}

#[test]
fn every_context_about_the_ends_of_pages() {
    let shape = Shape { heads: 2, latent: 19, rope: 6, nope: 10, v: 130 };
    for n in all_numerics() {
        let sequence = Sequence::new(n, shape, 195, 1.0, &mut Samples::new(2));
        sequence.check(&[0, 1, 63, 64, 65, 127, 130, 191, 192, 193, 195], 0.3);
    }
}

#[test]
fn scores_as_far_apart_as_can_be() {
    let shape = Shape { heads: 1, latent: 10, rope: 2, nope: 4, v: 16 };
    for n in all_numerics() {
        let sequence = Sequence::new(n, shape, 140, 1.0, &mut Samples::new(3));
        for scale in [0.0, 1e4, 1e30] {
            sequence.check(&[0, 70, 140], scale);
        }
    }
}

#[test]
#[should_panic(expected = "context 66 of 1 pages")]
fn a_context_is_within_its_pages() {
    let shape = Shape { heads: 1, latent: 4, rope: 2, nope: 2, v: 2 };
    let n = all_numerics()[0];
    let mut sequence = Sequence::new(n, shape, 66, 1.0, &mut Samples::new(3));
    sequence.pages.pop();
    sequence.attend(n, &pools()[0], &[0, 66], 1.0);
}
