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
//! in bf16-dp q, k, v and p are rounded first, and the chains are `Simd::dot_pairs`
//! ```
//! A row's tokens beyond its context get p = 0, which changes no finite sum (nor its sign: after fma(., ., 0) none is -0): so rows of one page are
//! computed together, whatever their contexts.
//!
//! Tricks:
//! 1. Keys and values are laid out as a linear's panels, so scores and sums are its tiles: 6 rows by a page's 64 tokens, 6 rows by 64 values.
//! 2. A page's keys and values are in the first-level cache while all rows of the prompt pass over them, and forgotten then.

mod operand;
mod page;

use std::cell::Cell;
use std::ops::Range;

use operand::Operand;
use page::{Latents, PANELS, PageOf, State, Strided};

use crate::linear::{Bf16Pairs, F32Lanes, Job, Linear, Ready, RowsRef, To, with_rows, with_scratch};
use crate::pages::{LatentPages, PAGE_TOKENS};
use crate::per_head::PerHead;
use crate::pool::{Pool, Shared};
use crate::simd::LANES;

thread_local! {
    static F32: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

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
    if spans.is_empty() {
        // Else q, of whose rows none is wanted, would be brought into the kernel's form.
        return;
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
                Ready::Quads(_) => unreachable!("heads are not quantised"),
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
                        expand_page([expand.key, expand.value].map(|w| w.head(head)), W::ready(x), tokens, [k, values]);
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

/// The first `tokens` of a page's rows through each linear, to the heads of the page's rows of its y.
fn expand_page([key, value]: [&Linear; 2], x: Ready<'_>, tokens: usize, y: [&mut [f32]; 2]) {
    let [k, v] = y.map(|y| To { stride: y.len() / PAGE_TOKENS, y: Shared::new(y), offset: 0 });
    let panels = 0..key.panels().max(value.panels());
    Job { x, place: key.place(), linears: &[(key, k), (value, v)] }.run(0..tokens, panels);
}

#[cfg(test)]
mod tests;
