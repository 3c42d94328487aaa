//! One page: its keys and values laid out as panels, and the rows that pass over them, a few at a time.

use super::operand::Operand;
use crate::linear::{F32Lanes, Fetch, Sums, rows_of_tile};
use crate::math::{exp, max_lanes, sum_lanes};
use crate::pages::{PAGE_TOKENS, Page};
use crate::simd::{Kernel, LANES, Lanes, Simd};

/// Panels of a page's keys: its tokens are their outputs.
pub(super) const PANELS: usize = PAGE_TOKENS / LANES;

/// A page's latents as rows of x, and its rotated parts as the ends of its keys.
pub(super) struct Latents<'a, W: Operand> {
    pub page: Page<'a>,
    pub latent: usize,
    pub rope: usize,
    pub tokens: usize,
    /// [PAGE_TOKENS, steps]
    pub x: &'a mut [W::X],
    /// [PAGE_TOKENS, nope + rope]
    pub k: &'a mut [f32],
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
pub(super) struct Strided<'a, X> {
    pub values: &'a [X],
    pub stride: usize,
}

/// What rows have summed up so far.
pub(super) struct State<'a> {
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    /// [rows, v_width]
    pub o: &'a mut [f32],
}

/// A page, and all rows that see something of it.
pub(super) struct PageOf<'a, W: Operand> {
    /// [PAGE_TOKENS, nope + rope]
    pub k: &'a [f32],
    /// [PAGE_TOKENS, v_width], zeros where no token is.
    pub values: &'a [f32],
    pub tokens: usize,
    /// For a row of `k` as steps.
    pub row: &'a mut [W::X],
    /// For the keys' panels and the values'.
    pub panels: &'a mut [W],
    pub q: Strided<'a, W::X>,
    /// Tokens that the first row sees. Each row sees one more than the row before, up to all.
    pub seen: usize,
    pub state: State<'a>,
    pub scale: f32,
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
            let live = rows_of_tile(max.len(), 6);
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
    for<'x> [&'x [W::X]; R]: Sums<W::X, R, 4> + Sums<W::X, R, 1>,
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
    for<'x> [&'x [W::X]; R]: Sums<W::X, R, P>,
{
    let steps = k.len() / PANELS;
    let zero = [[s.splat(0.0); P]; R];
    let acc = q.sums::<S, W, false>(s, panels(k, steps, panel), 0..steps, zero, Fetch::nothing());
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
    for<'x> [&'x [W::X]; R]: Sums<W::X, R, P>,
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
    let acc = p.sums::<S, W, false>(s, panels(v, steps, panel), 0..steps, acc, Fetch::nothing());
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
