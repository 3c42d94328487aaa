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
//! 1. Of scores lanes are heads: sixteen heads read one key, so a token's value is one broadcast for all of them, nothing is ever added across lanes,
//!    and every sum is the plain loop's. Of o lanes are d, so that a page is read as it lies. Fewer heads than lanes waste the rest.
//! 2. q is turned to [d][head] once for a task.
//! 3. Tokens are scored 16 (or 4) at a time, o is updated for 16 (or 4) heads at a time, so that many chains are on their way.
//! 4. Pages lie anywhere in memory: the next one is fetched while this one is computed.
//! 5. What a step broadcasts lies behind one address (see `linear::band`): four values of a token, or its sixteen probabilities. Both loops are functions of
//!    their own.

mod expanded;
mod pairs;

use std::cell::Cell;

pub use expanded::{Expand, Span, mla_attend_expanded};

use crate::linear::with_scratch;
use crate::math::{exp, load_part};
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
    static F32_SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
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
        let padded = latent.next_multiple_of(LANES);
        with_scratch(&LANES_SCRATCH, width + PAGE_TOKENS, |lanes| {
            let (q, p) = lanes.split_at_mut(width);
            with_scratch(&F32_SCRATCH, LANES * (padded + width), |values| {
                let (o, rest) = values.split_at_mut(LANES * padded);
                isa.run(Heads { call, query, q, p, o, rest, out });
            });
        });
    });
}

/// Does something for each t below T, which is 16 at most. Written out: a compiler that meets an index before it has unrolled the loop around it keeps
/// all sums in memory.
macro_rules! each_below {
    ($T:ident, $t:ident => $do:block) => {
        each_below!(@ $T, $t, $do, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    };
    (@ $T:ident, $t:ident, $do:block, $($i:literal)*) => {
        $(if $i < $T {
            let $t: usize = $i;
            $do
        })*
    };
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
    /// [head][d], each padded to whole lanes.
    o: &'a mut [f32],
    /// Some tokens: [LANES, latent + rope].
    rest: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Heads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut state = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
        let (call, query) = (self.call, self.query);
        let page = |i| tokens_of(call, query, i, Page::f32);
        lines(page(0)).for_each(|line| s.prefetch(line));
        turn(query.q, self.q);
        self.o.fill(0.0);
        for i in 0..query.context.div_ceil(PAGE_TOKENS) {
            let tokens = Tokens { kv: page(i), width: call.cache.width(), next: lines(page(i + 1)) };
            state = if S::WIDE { self.page::<S, 16>(s, tokens, state) } else { self.page::<S, 4>(s, tokens, state) };
        }
        let mut inverse = Lanes::default();
        s.store(s.div(s.splat(1.0), state.1), &mut inverse.0);
        let latent = self.call.cache.latent;
        let heads = self.out.chunks_exact_mut(latent).zip(self.o.chunks_exact(latent.next_multiple_of(LANES)));
        for ((out, o), inverse) in heads.zip(inverse.0) {
            out.iter_mut().zip(o).for_each(|(out, o)| *out = o * inverse);
        }
    }
}

impl Heads<'_> {
    /// Adds a page's tokens, N tokens or heads at a time; takes and gives each head's maximum and sum.
    #[inline(always)]
    fn page<S: Simd, const N: usize>(
        &mut self,
        s: S,
        mut tokens: Tokens<'_>,
        (max, sum): (S::F, S::F),
    ) -> (S::F, S::F) {
        let p = &mut self.p[..tokens.kv.len() / tokens.width];
        s.apart(Scores::<N> { q: self.q, tokens: &mut tokens, rest: self.rest, p, scale: self.call.scale });
        let (max, sum, factor) = probabilities(s, p, max, sum);
        let mut factors = Lanes::default();
        s.store(factor, &mut factors.0);
        s.apart(Values::<N> { p, tokens, latent: self.call.cache.latent, factors, o: self.o });
        (max, sum)
    }
}

/// The query's tokens in its i-th page, [up to PAGE_TOKENS, width]; none behind its last page. What lies behind its last token may be memory that
/// nobody has written to: to read that first makes the write to it dear.
#[inline(always)]
fn tokens_of<'a, X>(call: Call<'a>, query: Query<'_>, i: usize, values: impl Fn(Page<'a>) -> &'a [X]) -> &'a [X] {
    let live = query.context.saturating_sub(i * PAGE_TOKENS).min(PAGE_TOKENS);
    if live == 0 {
        return &[];
    }
    &values(call.cache.page(call.layer, query.pages[i]))[..live * call.cache.width()]
}

/// A block of `len` values. One that is not whole is copied to `rest`, where anything lies behind it.
#[inline(always)]
fn whole<'a, X: Copy>(block: &'a [X], len: usize, rest: &'a mut [X]) -> &'a [X] {
    if block.len() == len {
        return block;
    }
    rest[..block.len()].copy_from_slice(block);
    rest
}

/// A page's tokens [up to PAGE_TOKENS, width], and the lines of the next page, which are fetched meanwhile.
struct Tokens<'a> {
    kv: &'a [f32],
    width: usize,
    next: Lines<'a>,
}

impl Tokens<'_> {
    #[inline(always)]
    fn fetch_next<S: Simd>(&mut self, s: S) {
        if let Some(line) = self.next.next() {
            s.prefetch(line);
        }
    }
}

/// Of the processor's caches.
type Lines<'a> = std::slice::Iter<'a, [f32; LANES]>;

fn lines(kv: &[f32]) -> Lines<'_> {
    kv.as_chunks().0.iter()
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

/// p[t] = scale * (q · kv[t]), T tokens at a time.
struct Scores<'a, 'kv, const T: usize> {
    q: &'a [Lanes],
    tokens: &'a mut Tokens<'kv>,
    rest: &'a mut [f32],
    p: &'a mut [Lanes],
    scale: f32,
}

impl<const T: usize> Kernel for Scores<'_, '_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { q, tokens, rest, p, scale } = self;
        let width = tokens.width;
        let (steps, last) = q.as_chunks::<4>();
        for (p, kv) in p.chunks_mut(T).zip(tokens.kv.chunks(T * width)) {
            let kv = whole(kv, T * width, rest);
            let mut acc = [s.splat(0.0); T];
            for (i, q) in steps.iter().enumerate() {
                tokens.fetch_next(s);
                tokens.fetch_next(s);
                step(s, q, kv, width, 4 * i, &mut acc);
            }
            for (i, q) in last.iter().enumerate() {
                step(s, std::array::from_ref(q), kv, width, width - last.len() + i, &mut acc);
            }
            for (p, acc) in p.iter_mut().zip(acc) {
                s.store(s.mul(acc, s.splat(scale)), &mut p.0);
            }
        }
    }
}

/// acc[t] = fma(q[d], kv[t][first + d], acc[t]), d ascending.
#[inline(always)]
fn step<S: Simd, const T: usize, const D: usize>(
    s: S,
    q: &[Lanes; D],
    kv: &[f32],
    width: usize,
    first: usize,
    acc: &mut [S::F; T],
) {
    assert!(T * width <= kv.len() && first + D <= width);
    let q: [S::F; D] = std::array::from_fn(|d| s.load(&q[d].0));
    each_below!(T, t => {
        let at = t * width + first;
        // SAFETY: t < T and first + D <= width, so that the D values end within T * width, which is kv's length at most; D of them are one chunk of D.
        let x: &[f32; D] = unsafe { &kv.get_unchecked(at..at + D).as_chunks_unchecked()[0] };
        let x = s.by_itself(x);
        for d in 0..D {
            acc[t] = s.fma(q[d], s.splat(x[d]), acc[t]);
        }
    });
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

/// o[d] = o[d] * factor + p · kv[..][d], for H heads at a time.
struct Values<'a, const H: usize> {
    p: &'a [Lanes],
    tokens: Tokens<'a>,
    latent: usize,
    factors: Lanes,
    o: &'a mut [f32],
}

impl<const H: usize> Kernel for Values<'_, H> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { p, mut tokens, latent, factors, o } = self;
        let padded = o.len() / LANES;
        for d in (0..latent).step_by(LANES) {
            for first in (0..LANES).step_by(H) {
                let mut acc = [s.splat(0.0); H];
                for (h, acc) in acc.iter_mut().enumerate() {
                    let o = &o[(first + h) * padded + d..].as_chunks().0[0];
                    *acc = s.mul(s.load(o), s.splat(factors.0[first + h]));
                }
                for (t, (p, kv)) in p.iter().zip(tokens.kv.chunks_exact(tokens.width)).enumerate() {
                    if t % 2 == 0 {
                        tokens.fetch_next(s);
                    }
                    let kv = load_part(s, &kv[d..latent.min(d + LANES)], 0.0);
                    let p = &p.0[first..][..H];
                    for h in 0..H {
                        acc[h] = s.fma(s.splat(p[h]), kv, acc[h]);
                    }
                }
                for (h, acc) in acc.into_iter().enumerate() {
                    s.store(acc, &mut o[(first + h) * padded + d..].as_chunks_mut().0[0]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
