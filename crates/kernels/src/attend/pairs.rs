//! The same attention in bf16-dp: products by pairs of bf16, at twice the rate of f32.
//!
//! ```text
//! q, and p of a page, are rounded to bf16
//! s[t] = scale * (dot_pairs over (q[2i+1], q[2i]) and (kv[t][2i+1], kv[t][2i]), i ascending from 0)
//! l    = fma(l, a, sum of the rounded p[t] from 0)
//! o[d] = dot_pairs over (p[2j], p[2j+1]) and (kv[2j][d], kv[2j+1][d]), j ascending from o[d] * a
//! ```
//! Tricks:
//! 1. Two values of a token are a pair as they lie in the page, so scores read it as it is; that is why the odd one goes
//!    first.
//! 2. Two tokens' values are laid side by side once for a page and task.
//! 3. Pages lie anywhere in memory: the next tokens are fetched while these are scored.

use std::cell::Cell;

use super::{Call, Query, tokens_of, whole};
use crate::linear::{bf16_bits, with_scratch};
use crate::math::exp;
use crate::pages::{PAGE_TOKENS, Page};
use crate::simd::{Isa, Kernel, LANES, Lanes, Simd};

/// Sixteen pairs.
#[repr(align(64))]
#[derive(Clone, Copy, Default, Debug)]
struct PairLanes([u32; LANES]);

thread_local! {
    static PAIRS: Cell<Vec<PairLanes>> = const { Cell::new(Vec::new()) };
    static LANES_SCRATCH: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
    static TOKENS: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Up to sixteen heads of one row: `query` and `out` are only theirs.
pub(super) fn heads(isa: Isa, call: Call<'_>, query: Query<'_>, out: &mut [f32]) {
    let (width, latent) = (call.cache.width(), call.cache.latent);
    with_scratch(&PAIRS, width / 2 + PAGE_TOKENS / 2, |pairs| {
        let (q, p) = pairs.split_at_mut(width / 2);
        with_scratch(&LANES_SCRATCH, PAGE_TOKENS + latent, |lanes| {
            let (s, o) = lanes.split_at_mut(PAGE_TOKENS);
            with_scratch(&TOKENS, PAGE_TOKENS / 2 * latent + LANES * width / 2, |tokens| {
                let (tokens, rest) = tokens.split_at_mut(PAGE_TOKENS / 2 * latent);
                let rest = bytemuck::cast_slice_mut(rest);
                isa.run(PairHeads { call, query, q, p, s, o, tokens, rest, out });
            });
        });
    });
}

struct PairHeads<'a> {
    call: Call<'a>,
    query: Query<'a>,
    /// [width / 2][head]
    q: &'a mut [PairLanes],
    /// Probabilities of a page: [PAGE_TOKENS / 2][head]
    p: &'a mut [PairLanes],
    /// Scores of a page: [t][head]
    s: &'a mut [Lanes],
    /// [d][head]
    o: &'a mut [Lanes],
    /// A page, two tokens side by side: [PAGE_TOKENS / 2][latent]
    tokens: &'a mut [u32],
    /// Some tokens: [LANES, width]
    rest: &'a mut [u16],
    out: &'a mut [f32],
}

impl Kernel for PairHeads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, query, q, p, s: scores, o, tokens, rest, out } = self;
        let (width, latent) = (call.cache.width(), call.cache.latent);
        turn(query.q, q);
        o.fill(Lanes::default());
        let (mut max, mut sum) = (s.splat(f32::NEG_INFINITY), Lanes::default());
        let page = |i| tokens_of(call, query, i, Page::bf16);
        for i in 0..query.context.div_ceil(PAGE_TOKENS) {
            let (kv, next) = (page(i), page(i + 1));
            let live = kv.len() / width;
            let factor;
            if S::WIDE {
                score::<S, 16>(s, q, [kv, next], rest, &mut scores[..live], call.scale);
            } else {
                score::<S, 4>(s, q, [kv, next], rest, &mut scores[..live], call.scale);
            }
            (max, factor) = probabilities(s, &mut scores[..live], max, &mut sum, p);
            side_by_side(kv, width, latent, tokens);
            let pairs = live.div_ceil(2);
            if S::WIDE {
                values::<S, 16>(s, &p[..pairs], tokens, latent, factor, o);
            } else {
                values::<S, 4>(s, &p[..pairs], tokens, latent, factor, o);
            }
        }
        let inverse = s.div(s.splat(1.0), s.load(&sum.0));
        for o in o.iter_mut() {
            s.store(s.mul(s.load(&o.0), inverse), &mut o.0);
        }
        turn_back(o, out);
    }
}

/// [head][d] to pairs [d / 2][head], the lower d in the low half; zeros for the heads that are not there.
#[inline(always)]
fn turn(rows: &[f32], to: &mut [PairLanes]) {
    to.fill(PairLanes::default());
    for (head, row) in rows.chunks_exact(2 * to.len()).enumerate() {
        for (to, [low, high]) in to.iter_mut().zip(row.as_chunks::<2>().0) {
            to.0[head] = bf16_bits(*high) << 16 | bf16_bits(*low);
        }
    }
}

/// [d][head] to [head][d].
#[inline(always)]
fn turn_back(from: &[Lanes], rows: &mut [f32]) {
    for (head, row) in rows.chunks_exact_mut(from.len()).enumerate() {
        for (x, from) in row.iter_mut().zip(from) {
            *x = from.0[head];
        }
    }
}

/// T tokens at a time; meanwhile those after them are fetched, from the `next` page too.
#[inline(always)]
fn score<S: Simd, const T: usize>(
    s: S,
    q: &[PairLanes],
    [kv, next]: [&[u16]; 2],
    rest: &mut [u16],
    scores: &mut [Lanes],
    scale: f32,
) {
    let width = 2 * q.len();
    let mut blocks = kv.chunks(T * width);
    for scores in scores.chunks_mut(T) {
        let block = whole(blocks.next().unwrap_or_default(), T * width, rest);
        let mut ahead = blocks.clone().next().unwrap_or(next).iter().step_by(2 * T);
        let mut tokens: [&[[u16; 2]]; T] = [&[]; T];
        for (t, token) in tokens.iter_mut().enumerate() {
            *token = block[t * width..][..width].as_chunks().0;
        }
        let mut acc = [s.splat(0.0); T];
        for (i, q) in q.iter().enumerate() {
            let q = s.pairs_bf16(&q.0);
            if let Some(line) = ahead.next() {
                s.prefetch(line);
            }
            for t in 0..T {
                // SAFETY: i is below q.len(), which is the number of every token's pairs.
                let [low, high] = unsafe { *tokens[t].get_unchecked(i) };
                acc[t] = s.dot_pairs(u32::from(high) << 16 | u32::from(low), q, acc[t]);
            }
        }
        for (score, acc) in scores.iter_mut().zip(acc) {
            s.store(s.mul(acc, s.splat(scale)), &mut score.0);
        }
    }
}

/// Scores to rounded probabilities under the new maximum, two tokens a pair. Returns it, and the factor that what was
/// summed before has to take.
#[inline(always)]
fn probabilities<S: Simd>(s: S, scores: &mut [Lanes], max: S::F, sum: &mut Lanes, p: &mut [PairLanes]) -> (S::F, S::F) {
    let mut new = max;
    for score in scores.iter() {
        new = s.max(s.load(&score.0), new);
    }
    let factor = exp(s, s.sub(max, new));
    for score in scores.iter_mut() {
        s.store(exp(s, s.sub(s.load(&score.0), new)), &mut score.0);
    }
    let mut page_sum = [0.0f32; LANES];
    for (two, p) in scores.chunks(2).zip(p) {
        let none = Lanes::default();
        let (first, second) = (&two[0].0, &two.get(1).unwrap_or(&none).0);
        for lane in 0..LANES {
            let (first, second) = (bf16_bits(first[lane]), bf16_bits(second[lane]));
            p.0[lane] = first << 16 | second;
            page_sum[lane] = page_sum[lane] + f32::from_bits(first << 16) + f32::from_bits(second << 16);
        }
    }
    s.store(s.fma(s.load(&sum.0), factor, s.load(&page_sum)), &mut sum.0);
    (new, factor)
}

/// Latents of tokens 2j and 2j + 1, the first in the high half; a zero where there is no second.
#[inline(always)]
fn side_by_side(kv: &[u16], width: usize, latent: usize, to: &mut [u32]) {
    for (two, to) in kv.chunks(2 * width).zip(to.chunks_exact_mut(latent)) {
        let (first, second) = two.split_at(width);
        if second.is_empty() {
            to.iter_mut().zip(first).for_each(|(to, first)| *to = u32::from(*first) << 16);
        } else {
            for ((to, first), second) in to.iter_mut().zip(first).zip(second) {
                *to = u32::from(*first) << 16 | u32::from(*second);
            }
        }
    }
}

/// o[d] = o[d] * factor + p · tokens[..][d], D of d at a time.
#[inline(always)]
fn values<S: Simd, const D: usize>(
    s: S,
    p: &[PairLanes],
    tokens: &[u32],
    latent: usize,
    factor: S::F,
    o: &mut [Lanes],
) {
    let (blocks, rest) = o.as_chunks_mut::<D>();
    let done = blocks.len() * D;
    for (block, o) in blocks.iter_mut().enumerate() {
        values_block(s, p, &tokens[block * D..], latent, factor, o);
    }
    for (i, o) in rest.iter_mut().enumerate() {
        values_block::<S, 1>(s, p, &tokens[done + i..], latent, factor, std::array::from_mut(o));
    }
}

#[inline(always)]
fn values_block<S: Simd, const D: usize>(
    s: S,
    p: &[PairLanes],
    tokens: &[u32],
    latent: usize,
    factor: S::F,
    o: &mut [Lanes; D],
) {
    let mut acc = [factor; D];
    for d in 0..D {
        acc[d] = s.mul(s.load(&o[d].0), factor);
    }
    for (j, p) in p.iter().enumerate() {
        let p = s.pairs_bf16(&p.0);
        let tokens = &tokens[j * latent..][..D];
        for d in 0..D {
            acc[d] = s.dot_pairs(tokens[d], p, acc[d]);
        }
    }
    for d in 0..D {
        s.store(acc[d], &mut o[d].0);
    }
}
