//! Attention over the latent cache, in the absorbed form: every head reads the same key (latent and rotated part) and the same value (the latent).
//!
//! ```text
//! m = -inf, l = 0, o = 0
//! for each page, ascending; t over its tokens within the context, ascending:
//!     s[t] = scale * (chain over d ascending from 0 of fma(q[d], kv[t][d], .))            d < latent + rope
//!     m'   = max(m, s[..]);  a = exp(m - m');  p[t] = exp(s[t] - m')
//!     l    = fma(l, a, sum of p[t] from 0)
//!     o[d] = chain over t from o[d] * a of fma(p[t], kv[t][d], .)                         d < latent
//!     m    = m'
//! out[d] = o[d] * (1 / l)
//! ```
//! Tricks:
//! 1. Lanes are heads: sixteen heads read one key, so a token's value is one broadcast for all of them, nothing is ever added across lanes, and every
//!    sum is the plain loop's. Fewer heads than lanes waste the rest.
//! 2. q is turned to [d][head] once for a task, and o back; a bf16 page is widened once for a task.
//! 3. Tokens are scored 16 (or 4) at a time, o is updated 16 (or 4) d at a time, so that many chains are on their way.

mod expanded;
mod pairs;

use std::cell::Cell;

pub use expanded::{Expand, Span, mla_attend_expanded};

use crate::linear::with_scratch;
use crate::math::exp;
use crate::pages::{LatentPages, PAGE_TOKENS, Page};
use crate::pool::{Pool, Shared};
use crate::simd::{Isa, Kernel, LANES, Lanes, Simd};

/// One query row: `q` is [heads, latent + rope] (absorbed nope part, then roped part); attends to positions 0..context (at least one) of `pages`.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    pub q: &'a [f32],
    pub pages: &'a [u32],
    pub context: usize,
}

thread_local! {
    static LANES_SCRATCH: Cell<Vec<Lanes>> = const { Cell::new(Vec::new()) };
    static PAGE_SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// out is [rows, heads, latent].
pub fn mla_attend(
    pool: &Pool,
    cache: &LatentPages,
    layer: usize,
    queries: &[Query<'_>],
    heads: usize,
    scale: f32,
    out: &mut [f32],
) {
    mla_attend_on(Isa::best(), pool, Call { cache, layer, queries, heads, scale }, out);
}

/// The arguments of [`mla_attend`].
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub cache: &'a LatentPages,
    pub layer: usize,
    pub queries: &'a [Query<'a>],
    pub heads: usize,
    pub scale: f32,
}

pub(crate) fn mla_attend_on(isa: Isa, pool: &Pool, call: Call<'_>, out: &mut [f32]) {
    let Call { cache, queries, heads, .. } = call;
    let (width, latent) = (cache.width(), cache.latent);
    for query in queries {
        assert_eq!(query.q.len(), heads * width, "q is not [heads, latent + rope]");
        assert!(query.context > 0, "a query without a context");
        assert!(
            query.context <= query.pages.len() * PAGE_TOKENS,
            "context {} of {} pages",
            query.context,
            query.pages.len()
        );
    }
    assert_eq!(out.len(), queries.len() * heads * latent, "out is not [rows, heads, latent]");
    let blocks = heads.div_ceil(LANES);
    let work = queries.iter().map(|q| q.context).sum::<usize>() * heads * (width + latent);
    let out = Shared::new(out);
    pool.each(queries.len() * blocks, work, |task| {
        let (row, first) = (task / blocks, task % blocks * LANES);
        let live = LANES.min(heads - first);
        // SAFETY: these heads of this row are this task's own.
        let out = unsafe { out.part((row * heads + first) * latent, live * latent) };
        let query = Query { q: &queries[row].q[first * width..][..live * width], ..queries[row] };
        if cache.by_pairs() {
            return pairs::heads(isa, call, query, out);
        }
        with_scratch(&LANES_SCRATCH, width + PAGE_TOKENS + latent, |lanes| {
            let (q, rest) = lanes.split_at_mut(width);
            let (p, o) = rest.split_at_mut(PAGE_TOKENS);
            with_scratch(&PAGE_SCRATCH, PAGE_TOKENS * width, |page| isa.run(Heads { call, query, q, p, o, page, out }));
        });
    });
}

/// Up to sixteen heads of one row.
struct Heads<'a> {
    call: Call<'a>,
    /// Only these heads' q.
    query: Query<'a>,
    /// q as [d][head].
    q: &'a mut [Lanes],
    /// Scores, then probabilities of a page: [t][head].
    p: &'a mut [Lanes],
    /// [d][head]
    o: &'a mut [Lanes],
    /// A page, widened.
    page: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Heads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, query, q, p, o, page, out } = self;
        let width = call.cache.width();
        turn(query.q, q);
        o.fill(Lanes::default());
        let (mut max, mut sum) = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
        for (i, id) in query.pages.iter().enumerate().take(query.context.div_ceil(PAGE_TOKENS)) {
            let live = PAGE_TOKENS.min(query.context - i * PAGE_TOKENS);
            let kv = widened(s, call.cache.page(call.layer, *id), live * width, page);
            scores(s, q, kv, &mut p[..live], call.scale);
            let factor;
            (max, sum, factor) = probabilities(s, &mut p[..live], max, sum);
            if S::WIDE {
                values::<S, 16>(s, &p[..live], kv, width, factor, o);
            } else {
                values::<S, 4>(s, &p[..live], kv, width, factor, o);
            }
        }
        let inverse = s.div(s.splat(1.0), sum);
        for o in o.iter_mut() {
            s.store(s.mul(s.load(&o.0), inverse), &mut o.0);
        }
        turn_back(o, out);
    }
}

/// [head][d] to [d][head], zeros for the heads that are not there.
#[inline(always)]
fn turn(rows: &[f32], to: &mut [Lanes]) {
    to.fill(Lanes::default());
    for (head, row) in rows.chunks_exact(to.len()).enumerate() {
        for (to, x) in to.iter_mut().zip(row) {
            to.0[head] = *x;
        }
    }
}

#[inline(always)]
fn turn_back(from: &[Lanes], rows: &mut [f32]) {
    for (head, row) in rows.chunks_exact_mut(from.len()).enumerate() {
        for (x, from) in row.iter_mut().zip(from) {
            *x = from.0[head];
        }
    }
}

/// The page in f32; of a bf16 page only the first `live` values.
#[inline(always)]
fn widened<'a, S: Simd>(s: S, page: Page<'a>, live: usize, to: &'a mut [f32]) -> &'a [f32] {
    match page {
        Page::F32(values) => values,
        Page::Bf16(values) => {
            let (x, x_rest) = values[..live].as_chunks::<LANES>();
            let (to_whole, to_rest) = to[..live].as_chunks_mut::<LANES>();
            for (to, x) in to_whole.iter_mut().zip(x) {
                s.store(s.widen_bf16(x), to);
            }
            for (to, x) in to_rest.iter_mut().zip(x_rest) {
                *to = f32::from_bits(u32::from(*x) << 16);
            }
            to
        }
    }
}

/// p[t] = scale * (q · kv[t])
#[inline(always)]
fn scores<S: Simd>(s: S, q: &[Lanes], kv: &[f32], p: &mut [Lanes], scale: f32) {
    if S::WIDE {
        scores_by::<S, 16>(s, q, kv, p, scale);
    } else {
        scores_by::<S, 4>(s, q, kv, p, scale);
    }
}

/// T tokens at a time. A last block that is not whole reads what lies behind in the page, and forgets it.
#[inline(always)]
fn scores_by<S: Simd, const T: usize>(s: S, q: &[Lanes], kv: &[f32], p: &mut [Lanes], scale: f32) {
    let width = q.len();
    for (block, p) in p.chunks_mut(T).enumerate() {
        let mut tokens: [&[f32]; T] = [&[]; T];
        for (t, token) in tokens.iter_mut().enumerate() {
            *token = &kv[(block * T + t) * width..][..width];
        }
        let mut acc = [s.splat(0.0); T];
        for (d, q) in q.iter().enumerate() {
            let q = s.load(&q.0);
            for t in 0..T {
                // SAFETY: d is below q.len(), which is the length of every token.
                acc[t] = s.fma(q, s.splat(unsafe { *tokens[t].get_unchecked(d) }), acc[t]);
            }
        }
        for (p, acc) in p.iter_mut().zip(acc) {
            s.store(s.mul(acc, s.splat(scale)), &mut p.0);
        }
    }
}

/// Scores to probabilities under the new maximum. Returns it, the new sum, and the factor that what was summed before has to take.
#[inline(always)]
fn probabilities<S: Simd>(s: S, p: &mut [Lanes], max: S::F, sum: S::F) -> (S::F, S::F, S::F) {
    let mut new = max;
    for p in p.iter() {
        new = s.max(s.load(&p.0), new);
    }
    let factor = exp(s, s.sub(max, new));
    let mut page_sum = s.splat(0.0);
    for p in p {
        let e = exp(s, s.sub(s.load(&p.0), new));
        page_sum = s.add(page_sum, e);
        s.store(e, &mut p.0);
    }
    (new, s.fma(sum, factor, page_sum), factor)
}

/// o[d] = o[d] * factor + p · kv[..][d], D of d at a time.
#[inline(always)]
fn values<S: Simd, const D: usize>(s: S, p: &[Lanes], kv: &[f32], width: usize, factor: S::F, o: &mut [Lanes]) {
    let (blocks, rest) = o.as_chunks_mut::<D>();
    let done = blocks.len() * D;
    for (block, o) in blocks.iter_mut().enumerate() {
        values_block(s, p, &kv[block * D..], width, factor, o);
    }
    for (i, o) in rest.iter_mut().enumerate() {
        values_block::<S, 1>(s, p, &kv[done + i..], width, factor, std::array::from_mut(o));
    }
}

#[inline(always)]
fn values_block<S: Simd, const D: usize>(
    s: S,
    p: &[Lanes],
    kv: &[f32],
    width: usize,
    factor: S::F,
    o: &mut [Lanes; D],
) {
    let mut acc = [factor; D];
    for d in 0..D {
        acc[d] = s.mul(s.load(&o[d].0), factor);
    }
    for (t, p) in p.iter().enumerate() {
        let p = s.load(&p.0);
        let kv = &kv[t * width..][..D];
        for d in 0..D {
            acc[d] = s.fma(p, s.splat(kv[d]), acc[d]);
        }
    }
    for d in 0..D {
        s.store(acc[d], &mut o[d].0);
    }
}

#[cfg(test)]
mod tests;
