//! The feed-forward block, alone or many at once.
//!
//! ```text
//! h = silu(x gateᵀ) * (x upᵀ)      [rows, width]
//! y = h downᵀ                      [rows, out]
//! ```
//! Tricks:
//! 1. A call is two rounds of tasks, (expert, panels of width) and (expert, panels of out), over all experts together: threads meet twice in a layer,
//!    however many experts it has.
//! 2. x is brought into the kernel's form once, and each expert picks its rows from it by index: nothing is gathered.
//! 3. gate and up of a task have the same columns, so that h is finished while it is in the cache.

use std::cell::Cell;

use bytes::Bytes;

use crate::linear::{Cut, Form, Job, Linear, Place, Ready, RowsRef, To, UnfitBytes, with_rows, with_scratch};
use crate::math::{load_part, silu, store_part};
use crate::pool::{Pool, Shared};
use crate::simd::{Kernel, LANES, Simd};
use crate::{Matrix, Numerics};

/// y = down(silu(gate x) * up x). The same bits whether called alone or in a group.
#[derive(Debug)]
pub struct Ffn {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl Ffn {
    /// gate and up are [width, in], down is [out, width].
    pub fn pack(gate: &Matrix<'_>, up: &Matrix<'_>, down: &Matrix<'_>, n: Numerics) -> Self {
        Self::of(Linear::pack(gate, n), Linear::pack(up, n), Linear::pack(down, n))
    }

    /// The same without packing: `packed` is what [`Ffn::packed`] gave for the same matrices and numerics.
    pub fn mapped([gate, up, down]: [&Matrix<'_>; 3], n: Numerics, packed: [Bytes; 3]) -> Result<Self, UnfitBytes> {
        let [gate_packed, up_packed, down_packed] = packed;
        let gate = Linear::mapped(gate, n, gate_packed)?;
        Ok(Self::of(gate, Linear::mapped(up, n, up_packed)?, Linear::mapped(down, n, down_packed)?))
    }

    fn of(gate: Linear, up: Linear, down: Linear) -> Self {
        let shape = |linear: &Linear| [linear.out_features(), linear.in_features()];
        assert_eq!(shape(&gate), shape(&up), "gate and up differ in shape");
        assert_eq!(down.in_features(), gate.out_features(), "down does not take what gate gives");
        assert_eq!(gate.form(), up.form(), "gate and up are stored too differently to read the same rows");
        Self { gate, up, down }
    }

    /// The packed weights of gate, up and down, for [`Ffn::mapped`].
    pub fn packed(&self) -> [&[u8]; 3] {
        [self.gate.packed(), self.up.packed(), self.down.packed()]
    }

    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// x is [rows, in], y is [rows, out].
    pub fn forward(&self, pool: &Pool, x: RowsRef<'_>, y: &mut [f32]) {
        let rows = y.len().checked_div(self.down.out_features()).unwrap_or(0);
        assert_eq!(x.len(), rows * self.gate.in_features(), "x does not have as many rows as y");
        run(pool, &[Group { ffn: self, pick: None, rows, first: 0 }], x, y);
    }

    fn shape(&self) -> ([usize; 3], [Form; 3]) {
        let Self { gate, up, down } = self;
        ([gate.in_features(), gate.out_features(), down.out_features()], [gate.form(), up.form(), down.form()])
    }
}

/// One call for a layer: group i runs its expert on rows `groups[i].1` of x; y has one row for each (i, j), in that order.
/// All experts have the same shape.
pub fn grouped_experts<'a>(pool: &Pool, groups: &[(&'a Ffn, &'a [u32])], x: RowsRef<'_>, y: &mut [f32]) {
    let mut first = 0;
    let group = |(ffn, pick): &(&'a Ffn, &'a [u32])| {
        first += pick.len();
        Group { ffn, pick: Some(*pick), rows: pick.len(), first: first - pick.len() }
    };
    let groups: Vec<Group<'a>> = groups.iter().map(group).collect();
    run(pool, &groups, x, y);
}

/// `rows` rows of the call, from row `first` of h and y.
struct Group<'a> {
    ffn: &'a Ffn,
    pick: Option<&'a [u32]>,
    rows: usize,
    first: usize,
}

thread_local! {
    static GATE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static UP: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

fn run(pool: &Pool, groups: &[Group<'_>], x: RowsRef<'_>, y: &mut [f32]) {
    let Some(model) = groups.first().map(|g| g.ffn) else {
        return assert!(y.is_empty(), "y has rows, but there are no groups");
    };
    assert!(groups.iter().all(|g| g.ffn.shape() == model.shape()), "experts of one call differ in shape");
    let ([in_, width, out], _) = model.shape();
    let rows: usize = groups.iter().map(|g| g.rows).sum();
    assert_eq!(y.len(), rows * out, "y does not have one row for each row of each group");
    let isa = model.gate.numerics().kernels();
    with_scratch(&GATE, rows * width, |gate| {
        with_scratch(&UP, rows * width, |up| {
            with_rows(pool, isa, model.gate.form(), x, in_, |x| hidden(pool, groups, x, gate, up));
        });
        with_rows(pool, isa, model.down.form(), RowsRef::F32(gate), width, |h| {
            let y = Shared::new(y);
            each_part(
                pool,
                groups,
                rows * width * out,
                |g| &g.ffn.down,
                |g, cut, task| {
                    let down = &g.ffn.down;
                    let place = Place { offset: g.first * down.x_len(), ..down.place() };
                    let to = To { y, stride: out, offset: g.first * out };
                    Job { x: h, place, linears: &[(down, to)] }.run(cut.rows(task), cut.panels(task));
                },
            );
        });
    });
}

/// silu(x gateᵀ) * (x upᵀ), left in `gate`: a row for each row of each group.
fn hidden(pool: &Pool, groups: &[Group<'_>], x: Ready<'_>, gate: &mut [f32], up: &mut [f32]) {
    let work = gate.len() * groups[0].ffn.gate.in_features() * 2;
    let (gate, up) = (Shared::new(gate), Shared::new(up));
    each_part(
        pool,
        groups,
        work,
        |g| &g.ffn.gate,
        |g, cut, task| {
            let width = g.ffn.gate.out_features();
            let place = Place { pick: g.pick, ..g.ffn.gate.place() };
            let [gate_to, up_to] = [gate, up].map(|y| To { y, stride: width, offset: g.first * width });
            let linears = &[(&g.ffn.gate, gate_to), (&g.ffn.up, up_to)];
            Job { x, place, linears }.run(cut.rows(task), cut.panels(task));
            let (from, to) = (cut.panels(task).start * LANES, width.min(cut.panels(task).end * LANES));
            for row in cut.rows(task) {
                let start = (g.first + row) * width + from;
                // SAFETY: these columns of this row are this task's own, in both; no other part is held.
                let (gate, up) = unsafe { (gate.part(start, to - from), up.part(start, to - from)) };
                g.ffn.gate.numerics().kernels().run(SiluTimes { gate, up });
            }
        },
    );
}

/// Cuts the linear that `of` names of every group into tasks, and runs them all.
fn each_part<'a>(
    pool: &Pool,
    groups: &[Group<'a>],
    work: usize,
    of: impl Fn(&Group<'a>) -> &'a Linear,
    run: impl Fn(&Group<'a>, Cut, usize) + Sync,
) {
    let rows: usize = groups.iter().map(|g| g.rows).sum::<usize>().max(1);
    // About as much work in each task: a hot expert is cut, a cold one stays whole.
    let parts = |g: &Group<'a>| (pool.parts(work) * g.rows).div_ceil(rows).max(1);
    let cut = |g: &Group<'a>| Cut::into(parts(g), g.rows, of(g).panels());
    if pool.is_inline(work) {
        return groups.iter().for_each(|g| (0..cut(g).tasks()).for_each(|task| run(g, cut(g), task)));
    }
    let tasks: Vec<(&Group<'a>, Cut, usize)> =
        groups.iter().flat_map(|g| (0..cut(g).tasks()).map(move |task| (g, cut(g), task))).collect();
    pool.each(tasks.len(), work, |i| run(tasks[i].0, tasks[i].1, tasks[i].2));
}

struct SiluTimes<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for SiluTimes<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (gate, up) in self.gate.chunks_mut(LANES).zip(self.up.chunks(LANES)) {
            store_part(s, s.mul(silu(s, load_part(s, gate, 0.0)), load_part(s, up, 0.0)), gate);
        }
    }
}

#[cfg(test)]
mod tests;
