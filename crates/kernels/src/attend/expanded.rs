//! Attention in the expanded form: each head's own keys and values, made from the latents page by page. Fewer multiply-adds than the absorbed form
//! where many rows attend to the same page, as a prompt's do.
//!
//! ```text
//! m = -inf, l = 0, o = 0
//! for each page, ascending; t over its 64 tokens:
//!     k[t] = [Linear(W_UK, latent[t]), rope[t]],  v[t] = Linear(W_UV, latent[t])              of tokens that are there, else 0
//!     s[t] = scale * (chain over d ascending from 0 of fma(q[d], k[t][d], .))
//!     m'   = max(m, s[..]);  a = exp(m - m');  p[t] = exp(s[t] - m')                           s[t] = -inf from the context's end on
//!     l    = fma(l, a, p added up: token t into sum t % 16, then halves onto halves)
//!     o[d] = chain over t from fma(o[d], a, 0) of fma(p[t], v[t][d], .)
//!     m    = m'
//! out[d] = o[d] * (1 / l)
//! in bf16 q is rounded first; in bf16-dp k, v and p are, too, and the chains are `Simd::dot_pairs`
//! ```
//! A row's tokens beyond its context get p = 0, which changes no finite sum (nor its sign: after fma(., ., 0) none is -0): so rows of one page are
//! computed together, whatever their contexts.
//!
//! Tricks:
//! 1. Keys and values are laid out as a linear's panels, so scores and sums are its tiles: 6 rows by a page's 64 tokens, 6 rows by 64 values.
//! 2. A page's keys and values are in the first-level cache while all rows of the prompt pass over them, and forgotten then.

use std::cell::Cell;
use std::ops::Range;
use std::thread::LocalKey;

use crate::linear::{
    Bf16Pairs, F32Lanes, Job, Linear, Place, Ready, RowsRef, Sums, Tile, Weight, bf16_bits, pair, rows_of_tile,
    with_rows, with_scratch,
};
use crate::math::{exp, max_lanes, sum_lanes};
use crate::pages::{LatentPages, PAGE_TOKENS, Page};
use crate::per_head::PerHead;
use crate::pool::{Pool, Shared};
use crate::simd::{Kernel, LANES, Lanes, Simd};

/// Consecutive tokens of one sequence, from position `start`; each attends to positions up to its own.
#[derive(Clone, Debug)]
pub struct Span<'a> {
    /// Where they are in q and out.
    pub rows: Range<usize>,
    pub start: usize,
    pub pages: &'a [u32],
}

/// What makes keys and values of a latent: W_UK [nope, latent] and W_UV [v, latent] of each head.
#[derive(Clone, Copy, Debug)]
pub struct Expand<'a> {
    pub key: &'a PerHead,
    pub value: &'a PerHead,
}

/// q is [rows, heads, nope + rope], the rotated part last; out is [rows, heads, v], of which the spans' rows are written.
#[allow(clippy::too_many_arguments, reason = "each is another thing")]
pub fn mla_attend_expanded(
    pool: &Pool,
    cache: &LatentPages,
    layer: usize,
    spans: &[Span<'_>],
    expand: Expand<'_>,
    q: &[f32],
    scale: f32,
    out: &mut [f32],
) {
    let Expand { key, value } = expand;
    let (k_width, v) = (key.out_features() + cache.rope, value.out_features());
    let rows = q.len() / (key.heads() * k_width);
    assert_eq!(q.len(), rows * key.heads() * k_width, "q is not [rows, heads, nope + rope]");
    assert_eq!(out.len(), rows * key.heads() * v, "out is not [rows, heads, v]");
    for span in spans {
        let end = span.start + span.rows.len();
        assert!(span.rows.start < span.rows.end && span.rows.end <= rows, "rows {:?} of {rows}", span.rows);
        assert!(end <= span.pages.len() * PAGE_TOKENS, "context {end} of {} pages", span.pages.len());
    }
    let out = Shared::new(out);
    let scores: usize = spans.iter().map(|span| span.rows.len() * (span.start + span.rows.len())).sum();
    with_rows(pool, key.isa(), key.form(), RowsRef::F32(q), k_width, |q| {
        pool.each(spans.len() * key.heads(), scores * key.heads() * (k_width + v), |task| {
            let (span, head) = (&spans[task / key.heads()], task % key.heads());
            let head = Head { cache, layer, span, head, expand, scale, out };
            match q {
                Ready::F32(q) => head.run::<F32Lanes>(q),
                Ready::Pairs(q) => head.run::<Bf16Pairs>(q),
            }
        });
    });
}

/// One head of a span.
struct Head<'a> {
    cache: &'a LatentPages,
    layer: usize,
    span: &'a Span<'a>,
    head: usize,
    expand: Expand<'a>,
    scale: f32,
    out: Shared<'a, f32>,
}

/// Panels of a page's keys: its tokens are their outputs.
const PANELS: usize = PAGE_TOKENS / LANES;

impl Head<'_> {
    /// `q` is [rows, heads, steps].
    fn run<W: Operand>(self, q: &[W::X]) {
        let Self { cache, layer, span, head, expand, scale, out } = self;
        let (isa, heads, v) = (expand.key.isa(), expand.key.heads(), expand.value.out_features());
        let (latent, rope) = (cache.latent, cache.rope);
        let (k_width, v_width) = (expand.key.out_features() + rope, v.next_multiple_of(LANES));
        let (x_steps, k_steps) = (latent.div_ceil(W::PER_STEP), k_width.div_ceil(W::PER_STEP));
        let (rows, end) = (span.rows.len(), span.start + span.rows.len());
        let q = Strided { values: &q[(span.rows.start * heads + head) * k_steps..], stride: heads * k_steps };
        let f32s = rows * (2 + v_width) + PAGE_TOKENS * (k_width + v_width);
        let panels = PANELS * k_steps + v_width / LANES * (PAGE_TOKENS / W::PER_STEP);
        with_scratch(&F32, f32s, |scratch| {
            let (max, scratch) = scratch.split_at_mut(rows);
            let (sum, scratch) = scratch.split_at_mut(rows);
            let (o, scratch) = scratch.split_at_mut(rows * v_width);
            let (k, values) = scratch.split_at_mut(PAGE_TOKENS * k_width);
            max.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            o.fill(0.0);
            values.fill(0.0);
            with_scratch(W::x_scratch(), PAGE_TOKENS * x_steps + k_steps, |x| {
                let (x, row) = x.split_at_mut(PAGE_TOKENS * x_steps);
                with_scratch(W::scratch(), panels, |panels| {
                    for (i, id) in span.pages.iter().enumerate().take(end.div_ceil(PAGE_TOKENS)) {
                        let first = i * PAGE_TOKENS;
                        let tokens = PAGE_TOKENS.min(end - first);
                        isa.run(Latents::<W> { page: cache.page(layer, *id), latent, rope, tokens, x, k });
                        expand_page(expand.key.head(head), W::ready(x), tokens, k);
                        expand_page(expand.value.head(head), W::ready(x), tokens, values);
                        values[tokens * v_width..].fill(0.0);
                        // Rows before the page see nothing of it.
                        let hidden = first.saturating_sub(span.start);
                        isa.run(PageOf::<W> {
                            k,
                            values,
                            tokens,
                            row,
                            panels,
                            q: Strided { values: &q.values[hidden * q.stride..], ..q },
                            seen: span.start + hidden + 1 - first,
                            state: State {
                                max: &mut max[hidden..],
                                sum: &mut sum[hidden..],
                                o: &mut o[hidden * v_width..],
                            },
                            scale,
                        });
                    }
                });
            });
            for ((row, o), sum) in span.rows.clone().zip(o.chunks_exact(v_width)).zip(sum) {
                // SAFETY: this head of these rows is this task's own.
                let out = unsafe { out.part((row * heads + head) * v, v) };
                let inverse = 1.0 / *sum;
                out.iter_mut().zip(o).for_each(|(out, o)| *out = o * inverse);
            }
        });
    }
}

/// The first `tokens` of a page's rows through a linear, to the heads of the page's rows of y.
fn expand_page(linear: &Linear, x: Ready<'_>, tokens: usize, y: &mut [f32]) {
    let place = Place { y_stride: y.len() / PAGE_TOKENS, ..linear.place() };
    Job { linear, x, y: Shared::new(y), place, rows: tokens }.run(0..tokens, 0..linear.panels());
}

/// A weight that keys and values can be made into.
trait Operand: Weight<X: Default + 'static> + Default + 'static {
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>>;
    fn x_scratch() -> &'static LocalKey<Cell<Vec<Self::X>>>;
    fn ready(x: &[Self::X]) -> Ready<'_>;
    /// A row of x, with a zero behind an odd end.
    fn steps(row: &[f32], to: &mut [Self::X]);
    /// The same of what a page holds.
    fn page_steps(page: Page<'_>, at: Range<usize>, to: &mut [Self::X]);
    fn set_step(&mut self, lane: usize, x: Self::X);
    /// A step of sixteen outputs: of each PER_STEP rows, `stride` apart.
    fn stack(rows: &[f32], stride: usize) -> Self;
    /// What a step makes of a value.
    fn rounded(x: f32) -> f32;
}

thread_local! {
    static F32: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static F32_X: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static PAIRS_X: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    static F32_PANELS: Cell<Vec<F32Lanes>> = const { Cell::new(Vec::new()) };
    static PAIRS_PANELS: Cell<Vec<Bf16Pairs>> = const { Cell::new(Vec::new()) };
}

impl Operand for F32Lanes {
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>> {
        &F32_PANELS
    }
    fn x_scratch() -> &'static LocalKey<Cell<Vec<f32>>> {
        &F32_X
    }
    fn ready(x: &[f32]) -> Ready<'_> {
        Ready::F32(x)
    }
    #[inline(always)]
    fn steps(row: &[f32], to: &mut [f32]) {
        to.copy_from_slice(row);
    }
    #[inline(always)]
    fn page_steps(page: Page<'_>, at: Range<usize>, to: &mut [f32]) {
        match page {
            Page::F32(values) => to.copy_from_slice(&values[at]),
            Page::Bf16(values) => {
                to.iter_mut().zip(&values[at]).for_each(|(to, x)| *to = f32::from_bits(u32::from(*x) << 16))
            }
        }
    }
    #[inline(always)]
    fn set_step(&mut self, lane: usize, x: f32) {
        self.0[lane] = x;
    }
    #[inline(always)]
    fn stack(rows: &[f32], _: usize) -> Self {
        let mut step = Self::default();
        step.0.copy_from_slice(&rows[..LANES]);
        step
    }
    #[inline(always)]
    fn rounded(x: f32) -> f32 {
        x
    }
}

impl Operand for Bf16Pairs {
    fn scratch() -> &'static LocalKey<Cell<Vec<Self>>> {
        &PAIRS_PANELS
    }
    fn x_scratch() -> &'static LocalKey<Cell<Vec<u32>>> {
        &PAIRS_X
    }
    fn ready(x: &[u32]) -> Ready<'_> {
        Ready::Pairs(x)
    }
    #[inline(always)]
    fn steps(row: &[f32], to: &mut [u32]) {
        pair(row, to, |x| bf16_bits(*x));
    }
    #[inline(always)]
    fn page_steps(page: Page<'_>, at: Range<usize>, to: &mut [u32]) {
        match page {
            Page::F32(values) => pair(&values[at], to, |x| bf16_bits(*x)),
            Page::Bf16(values) => pair(&values[at], to, |x| u32::from(*x)),
        }
    }
    #[inline(always)]
    fn set_step(&mut self, lane: usize, x: u32) {
        self.0[lane] = x;
    }
    #[inline(always)]
    fn stack(rows: &[f32], stride: usize) -> Self {
        let mut step = Self::default();
        let (first, second) = (&rows[..LANES], &rows[stride..][..LANES]);
        for ((to, first), second) in step.0.iter_mut().zip(first).zip(second) {
            *to = bf16_bits(*first) << 16 | bf16_bits(*second);
        }
        step
    }
    #[inline(always)]
    fn rounded(x: f32) -> f32 {
        f32::from_bits(bf16_bits(x) << 16)
    }
}

/// A page's latents as rows of x, and its rotated parts as the ends of its keys.
struct Latents<'a, W: Operand> {
    page: Page<'a>,
    latent: usize,
    rope: usize,
    tokens: usize,
    /// [PAGE_TOKENS, steps]
    x: &'a mut [W::X],
    /// [PAGE_TOKENS, nope + rope]
    k: &'a mut [f32],
}

impl<W: Operand> Kernel for Latents<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { page, latent, rope, tokens, x, k } = self;
        let (x_steps, k_width) = (x.len() / PAGE_TOKENS, k.len() / PAGE_TOKENS);
        for t in 0..tokens {
            let at = t * (latent + rope);
            W::page_steps(page, at..at + latent, &mut x[t * x_steps..][..x_steps]);
            F32Lanes::page_steps(page, at + latent..at + latent + rope, &mut k[(t + 1) * k_width - rope..][..rope]);
        }
    }
}

/// Rows that lie `stride` apart.
#[derive(Clone, Copy)]
struct Strided<'a, X> {
    values: &'a [X],
    stride: usize,
}

/// What rows have summed up so far.
struct State<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// [rows, v_width]
    o: &'a mut [f32],
}

/// A page, and all rows that see something of it.
struct PageOf<'a, W: Operand> {
    /// [PAGE_TOKENS, nope + rope]
    k: &'a [f32],
    /// [PAGE_TOKENS, v_width], zeros where no token is.
    values: &'a [f32],
    tokens: usize,
    /// For a row of `k` as steps.
    row: &'a mut [W::X],
    /// For the keys' panels and the values'.
    panels: &'a mut [W],
    q: Strided<'a, W::X>,
    /// Tokens that the first row sees. Each row sees one more than the row before, up to all.
    seen: usize,
    state: State<'a>,
    scale: f32,
}

impl<W: Operand> Kernel for PageOf<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { k, values, tokens, row: steps, panels, q, seen, state, scale } = self;
        let State { mut max, mut sum, mut o } = state;
        let (k_width, v_width) = (k.len() / PAGE_TOKENS, values.len() / PAGE_TOKENS);
        let (k_panels, v_panels) = panels.split_at_mut(PANELS * steps.len());
        if tokens < PAGE_TOKENS {
            k_panels.fill(W::default());
        }
        for (t, k) in k.chunks_exact(k_width).enumerate().take(tokens) {
            W::steps(k, steps);
            for (w, x) in k_panels[t / LANES * steps.len()..].iter_mut().zip(steps.iter()) {
                w.set_step(t % LANES, *x);
            }
        }
        for (p, panel) in v_panels.chunks_exact_mut(PAGE_TOKENS / W::PER_STEP).enumerate() {
            for (w, rows) in panel.iter_mut().zip(values.chunks_exact(W::PER_STEP * v_width)) {
                *w = W::stack(&rows[p * LANES..], v_width);
            }
        }
        let mut row = 0;
        while !max.is_empty() {
            let live = rows_of_tile(max.len());
            let state = State {
                max: max.split_off_mut(..live).unwrap_or_default(),
                sum: sum.split_off_mut(..live).unwrap_or_default(),
                o: o.split_off_mut(..live * v_width).unwrap_or_default(),
            };
            let strip = Strip { k: k_panels, v: v_panels, q, row, seen, state, scale };
            match live {
                1 => s.apart(StripOf::<W, 1>(strip)),
                2 => s.apart(StripOf::<W, 2>(strip)),
                3..=4 => s.apart(StripOf::<W, 4>(strip)),
                _ => s.apart(StripOf::<W, 6>(strip)),
            }
            row += live;
        }
    }
}

/// A few rows from `row` on.
struct Strip<'a, W: Operand> {
    k: &'a [W],
    v: &'a [W],
    q: Strided<'a, W::X>,
    row: usize,
    /// As in `PageOf`.
    seen: usize,
    /// Only theirs.
    state: State<'a>,
    scale: f32,
}

/// The strip as R rows, the last one again where there are fewer.
struct StripOf<'a, W: Operand, const R: usize>(Strip<'a, W>);

/// `BOUNDS[PAGE_TOKENS - seen..]` bounds a page's scores from above: by minus infinity those that are not seen.
static BOUNDS: [f32; 2 * PAGE_TOKENS] = {
    let mut bounds = [f32::INFINITY; 2 * PAGE_TOKENS];
    let mut t = PAGE_TOKENS;
    while t < bounds.len() {
        bounds[t] = f32::NEG_INFINITY;
        t += 1;
    }
    bounds
};

impl<W: Operand, const R: usize> Kernel for StripOf<'_, W, R>
where
    Tile: Sums<R, 4> + Sums<R, 1>,
{
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Strip { k, v, q, row, seen, state, scale } = self.0;
        let State { max, sum, o } = state;
        let (live, steps, v_width) = (max.len(), k.len() / PANELS, o.len() / max.len());
        let row_of = |r: usize| r.min(live - 1);

        let mut x: [&[W::X]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &q.values[(row + row_of(r)) * q.stride..][..steps];
        }
        let mut p = [[Lanes::default(); PANELS]; R];
        if S::WIDE {
            scores::<S, W, R, 4>(s, x, k, 0, scale, &mut p);
        } else {
            for panel in 0..PANELS {
                scores::<S, W, R, 1>(s, x, k, panel, scale, &mut p);
            }
        }

        let (mut maxima, mut changes, mut page_sums) = ([0.0; R], Lanes::default(), [0.0; R]);
        for (r, p) in p.iter_mut().enumerate() {
            let old = max[row_of(r)];
            let bounds = BOUNDS[PAGE_TOKENS - (seen + row + row_of(r)).min(PAGE_TOKENS)..].as_chunks().0;
            let mut largest = s.splat(old);
            for (p, bound) in p.iter_mut().zip(bounds) {
                let score = s.min(s.load(&p.0), s.load(bound));
                s.store(score, &mut p.0);
                largest = s.max(score, largest);
            }
            let new = max_lanes(s, largest);
            let mut page_sum = s.splat(0.0);
            for p in p.iter_mut() {
                s.store(exp(s, s.sub(s.load(&p.0), s.splat(new))), &mut p.0);
                p.0.iter_mut().for_each(|p| *p = W::rounded(*p));
                page_sum = s.add(page_sum, s.load(&p.0));
            }
            (maxima[r], changes.0[r], page_sums[r]) = (new, old - new, sum_lanes(s, page_sum));
        }
        let mut factors = Lanes::default();
        s.store(exp(s, s.load(&changes.0)), &mut factors.0);
        for r in 0..live {
            max[r] = maxima[r];
            sum[r] = sum[r].mul_add(factors.0[r], page_sums[r]);
        }

        let mut weights = [[W::X::default(); PAGE_TOKENS]; R];
        for (weights, p) in weights.iter_mut().zip(&p) {
            for (to, p) in weights.chunks_exact_mut(LANES / W::PER_STEP).zip(p) {
                W::steps(&p.0, to);
            }
        }
        let mut x: [&[W::X]; R] = [&[]; R];
        for (x, weights) in x.iter_mut().zip(&weights) {
            *x = &weights[..PAGE_TOKENS / W::PER_STEP];
        }
        let panels = v_width / LANES;
        let mut panel = 0;
        while S::WIDE && panel + 4 <= panels {
            values::<S, W, R, 4>(s, x, v, panel, &factors.0, o, v_width);
            panel += 4;
        }
        for panel in panel..panels {
            values::<S, W, R, 1>(s, x, v, panel, &factors.0, o, v_width);
        }
    }
}

/// Scores of P panels of tokens from `panel` on.
#[inline(always)]
fn scores<S: Simd, W: Operand, const R: usize, const P: usize>(
    s: S,
    q: [&[W::X]; R],
    k: &[W],
    panel: usize,
    scale: f32,
    p: &mut [[Lanes; PANELS]; R],
) where
    Tile: Sums<R, P>,
{
    let steps = k.len() / PANELS;
    let zero = [[s.splat(0.0); P]; R];
    let acc = Tile::sums::<S, W, false>(s, q, panels(k, steps, panel), 0..steps, zero, &[]);
    for (p, acc) in p.iter_mut().zip(acc) {
        for (p, acc) in p[panel..].iter_mut().zip(acc) {
            s.store(s.mul(acc, s.splat(scale)), &mut p.0);
        }
    }
}

/// o = o * factor + p v, for P panels of v from `panel` on; rows of o beyond the last are the last again.
#[inline(always)]
fn values<S: Simd, W: Operand, const R: usize, const P: usize>(
    s: S,
    p: [&[W::X]; R],
    v: &[W],
    panel: usize,
    factors: &[f32; LANES],
    o: &mut [f32],
    v_width: usize,
) where
    Tile: Sums<R, P>,
{
    let last = o.len() / v_width - 1;
    let at = |r: usize, c: usize| r.min(last) * v_width + (panel + c) * LANES;
    let mut acc = [[s.splat(0.0); P]; R];
    for (r, acc) in acc.iter_mut().enumerate() {
        for (c, acc) in acc.iter_mut().enumerate() {
            let o = &o[at(r, c)..].as_chunks().0[0];
            *acc = s.fma(s.load(o), s.splat(factors[r]), s.splat(0.0));
        }
    }
    let steps = PAGE_TOKENS / W::PER_STEP;
    let acc = Tile::sums::<S, W, false>(s, p, panels(v, steps, panel), 0..steps, acc, &[]);
    for (r, acc) in acc.into_iter().enumerate() {
        for (c, acc) in acc.into_iter().enumerate() {
            s.store(acc, &mut o[at(r, c)..].as_chunks_mut().0[0]);
        }
    }
}

/// P panels of `steps` each.
#[inline(always)]
fn panels<W, const P: usize>(all: &[W], steps: usize, first: usize) -> [&[W]; P] {
    let mut panels: [&[W]; P] = [&[]; P];
    for (p, panel) in panels.iter_mut().enumerate() {
        *panel = &all[(first + p) * steps..][..steps];
    }
    panels
}

#[cfg(test)]
mod tests;
