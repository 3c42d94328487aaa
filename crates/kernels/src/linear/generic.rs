//! y = x Wᵀ for a range of rows and a range of panels, on any instruction set.
//!
//! ```text
//! for some panels, for up to 24 rows of x:         a tile; its sums stay in registers
//!     for each block of K (one, where weights have no scales):
//!         part = 0;  for each step k ascending:  part[row][panel] = step(x[row][k], w[panel][k], part[row][panel])
//!         acc = part, or fma(part, scale, acc)
//!     y[row][panel] = acc
//! ```
//! Tricks:
//! 1. Lanes are outputs, so each output has one chain over K, as in the plain loop: rows, tiles, threads and instruction sets cannot change it.
//! 2. A step waits for the one before it (4 cycles), so a tile always has several chains: few rows take many panels, many rows few.
//! 3. Weights are read once for up to 24 rows (see [`band`]; where there are few registers, 6); a group of panels stays in the second-level cache while all
//!    rows pass over it, and while they do, the next group is fetched.
//! 4. FP8 weights are widened in registers for few rows, and once for many, to bf16.
//! 5. 3, 5 or 7 rows run as 4, 6 or 8 with the last row twice: cheaper than reading the weights twice, and less code.

use std::ops::Range;

use bytemuck::Zeroable;

use super::band::{self, Bands};
use super::panels::{View, Weight};
use super::quads;
use super::sums::{Fetch, Steps, Sums, zero};
use super::tight::TightTile;
use crate::pool::Shared;
use crate::simd::{Kernel, LANES, Line, Simd};

/// Where the rows of a call lie in x: row r of the call is its row `pick[r]` (or r).
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub pick: Option<&'a [u32]>,
    pub stride: usize,
    pub offset: usize,
}

impl Place<'_> {
    #[inline(always)]
    pub fn row<'x, X>(&self, x: &'x [X], row: usize, elements: usize) -> &'x [X] {
        let row = self.pick.map_or(row, |pick| pick[row] as usize);
        &x[row * self.stride + self.offset..][..elements]
    }
}

/// Where they go: row r to row r of y.
#[derive(Clone, Copy)]
pub(crate) struct To<'a> {
    pub y: Shared<'a, f32>,
    pub stride: usize,
    pub offset: usize,
}

/// One task: every row of `rows` with every panel of `panels`. Writes those columns of those rows of `y`.
pub(crate) struct Tiles<'a, W: Weight> {
    pub weights: View<'a, W>,
    pub x: &'a [W::X],
    pub place: Place<'a>,
    pub to: To<'a>,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
    /// The rows once more, for tiles of more than [`few_rows`], where [`Simd::WIDE`].
    pub bands: Option<Bands<'a>>,
}

impl<W: Weight> Kernel for Tiles<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let is_tight = self.weights.tight().is_some();
        let opens_in_registers = if is_tight { W::IS_BF16 && S::OPENS_TIGHT } else { S::WIDE };
        let has_many_rows = self.rows.len() > OPENED_AGAIN_MAX * self.rows_max::<S>();
        let widens = if is_tight { !opens_in_registers || has_many_rows } else { W::IS_WIDENED && has_many_rows };
        let group = self.group::<S>(widens);
        let mut wide = W::take_wide();
        for first in self.panels.clone().step_by(group) {
            let panels = first..self.panels.end.min(first + group);
            let next = self.weights.lines(panels.end..self.panels.end.min(panels.end + group));
            if !widens {
                let near = if first > self.panels.start { Near::Fetched } else { Near::No };
                self.pass(s, panels, near, next);
                continue;
            }
            let mut rows = self.rows.clone();
            if opens_in_registers && first == self.panels.start {
                // Nobody has fetched this group: the first rows do while they compute.
                let live = rows_of_tile(rows.len(), self.rows_max::<S>());
                let fetch = Fetch::own(self.weights, panels.clone());
                self.rows(s, Strip { row: rows.start, live, panels: panels.clone(), fetch });
                rows.start += live;
            }
            self.open(s, panels.clone(), &mut wide);
            let Self { weights, x, place, to, bands, .. } = self;
            let weights = weights.of(&wide, first);
            Tiles { weights, x, place, to, rows, panels: panels.clone(), bands }.pass(s, panels, Near::Opened, next);
        }
        W::give_back_wide(wide);
    }
}

/// What stays in the second-level cache beside rows. (Bands that pass over opened panels are many: they rather come back less often.)
const GROUP_BYTES_MAX: usize = 512 << 10;

/// How many times weights that take work to open are opened in registers, before it pays to open them in memory once for all rows.
const OPENED_AGAIN_MAX: usize = 2;

/// Rows of the largest tile of rows as they are.
fn few_rows<S: Simd>() -> usize {
    if S::WIDE { band::ROWS_BELOW } else { 6 }
}

/// Whether a group of panels has been brought near, or opened even.
#[derive(Clone, Copy, PartialEq)]
enum Near {
    No,
    Fetched,
    Opened,
}

/// Of `left` rows: `max` while there are many; fewer than twice as many are cut into halves, not into `max` and a small rest.
pub(crate) fn rows_of_tile(left: usize, max: usize) -> usize {
    if left > max && left < 2 * max { left.div_ceil(2) } else { left.min(max) }
}

/// `live` rows from `row`, for all `panels`.
struct Strip<'a> {
    row: usize,
    live: usize,
    panels: Range<usize>,
    fetch: Fetch<'a>,
}

impl<W: Weight> Tiles<'_, W> {
    /// Rows of the largest tile.
    fn rows_max<S: Simd>(&self) -> usize {
        if self.bands.is_some() { band::ROWS_MAX } else { few_rows::<S>() }
    }

    /// Panels over which all rows pass before the next.
    fn group<S: Simd>(&self, widens: bool) -> usize {
        let max = if S::WIDE { 8 } else { 4 };
        let opened = self.weights.steps * W::PER_STEP / W::Wide::PER_STEP * size_of::<W::Wide>();
        let panel = if widens { opened } else { self.weights.panel_lines() * size_of::<Line>() };
        match (self.bands.is_some(), widens) {
            (true, true) => (2 * GROUP_BYTES_MAX / panel.max(1)).clamp(1, max),
            (true, false) => (GROUP_BYTES_MAX / panel.max(1)).clamp(1, max),
            // For tiles of several.
            (false, true) => 1 << (GROUP_BYTES_MAX / panel.max(1)).clamp(2, max).ilog2(),
            (false, false) => max,
        }
    }

    /// Opens panels in memory: into the first steps of `wide`, one panel behind the other.
    #[inline(always)]
    fn open<S: Simd>(&self, s: S, panels: Range<usize>, wide: &mut Vec<W::Wide>) {
        let (steps, of_each) = (self.weights.steps, W::PER_STEP / W::Wide::PER_STEP);
        wide.resize(wide.len().max(panels.len() * steps * of_each), Zeroable::zeroed());
        if let Some(tight) = self.weights.tight() {
            for (panel, to) in panels.zip(wide.chunks_exact_mut(steps)) {
                tight.open(s, panel, 0, &mut tight.outliers(panel), bytemuck::cast_slice_mut(to));
            }
        } else {
            for (narrow, to) in self.weights.panels(panels).iter().zip(wide.chunks_exact_mut(of_each)) {
                narrow.widen(s, to);
            }
        }
    }

    /// All rows pass over a group of panels; meanwhile the `next` is fetched.
    #[inline(always)]
    fn pass<S: Simd>(&self, s: S, panels: Range<usize>, near: Near, mut next: &[Line]) {
        let max = self.rows_max::<S>();
        let mut row = self.rows.start;
        while row < self.rows.end {
            let live = rows_of_tile(self.rows.end - row, max);
            let strips = (self.rows.end - row).div_ceil(max);
            let is_first = row == self.rows.start && near != Near::Opened;
            let fetch = if is_first && strips == 1 {
                Fetch::own(self.weights, panels.start..self.panels.end)
            } else if is_first && near == Near::No {
                Fetch::own(self.weights, panels.clone())
            } else {
                Fetch { ahead: next.split_off(..next.len() / strips).unwrap_or_default(), ..Fetch::nothing() }
            };
            self.rows(s, Strip { row, live, panels: panels.clone(), fetch });
            row += live;
        }
    }

    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, mut strip: Strip<'_>) {
        // Not one `match` of all: each set of instructions would get the other's tiles, too.
        if S::WIDE
            && let Some(bands) = self.bands
        {
            let row = strip.row;
            match strip.live {
                ..=12 => self.across::<S, _, 12, 1>(s, bands.band(row), &mut strip),
                13..=16 => self.across::<S, _, 16, 1>(s, bands.band(row), &mut strip),
                17..=20 => self.across::<S, _, 20, 1>(s, bands.band(row), &mut strip),
                _ => self.across::<S, _, 24, 1>(s, bands.band(row), &mut strip),
            }
        } else if S::WIDE {
            match strip.live {
                1 => self.strip::<S, 1, 8>(s, strip),
                2 => self.strip::<S, 2, 4>(s, strip),
                3..=4 => self.strip::<S, 4, 4>(s, strip),
                5..=6 if W::IS_WIDENED || self.weights.tight().is_some() => self.strip::<S, 6, 2>(s, strip),
                5..=6 => self.strip::<S, 6, 4>(s, strip),
                _ => self.strip::<S, 8, 2>(s, strip),
            }
        } else {
            match strip.live {
                1 => self.strip::<S, 1, 4>(s, strip),
                2 => self.strip::<S, 2, 2>(s, strip),
                3..=4 => self.strip::<S, 4, 1>(s, strip),
                _ => self.strip::<S, 6, 1>(s, strip),
            }
        }
    }

    /// Rows as they are with P panels at a time, and then with fewer.
    #[inline(always)]
    fn strip<S: Simd, const R: usize, const P: usize>(&self, s: S, mut strip: Strip<'_>)
    where
        for<'x> [&'x [W::X]; R]: Sums<W::X, R, P> + Sums<W::X, R, 4> + Sums<W::X, R, 1>,
    {
        let mut x: [&[W::X]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = self.x_row(strip.row + r.min(strip.live - 1));
        }
        self.across::<S, _, R, P>(s, x, &mut strip);
        strip.fetch = Fetch::nothing();
        if P > 4 {
            self.across::<S, _, R, 4>(s, x, &mut strip);
        }
        self.across::<S, _, R, 1>(s, x, &mut strip);
    }

    /// As long as there are P panels.
    #[inline(always)]
    fn across<S: Simd, T: Sums<W::X, R, P>, const R: usize, const P: usize>(&self, s: S, x: T, strip: &mut Strip<'_>) {
        let Strip { row, live, panels, fetch } = strip;
        while panels.len() >= P {
            let tiles = panels.len() / P;
            let ahead = fetch.ahead.split_off(..fetch.ahead.len() / tiles).unwrap_or_default();
            let fetch_now = Fetch { ahead, ..*fetch };
            TileOf { tiles: self, x, row: *row, live: *live, panel: panels.start, fetch: fetch_now }.on(s);
            fetch.own = fetch.own.get(P * self.weights.panel_lines()..).unwrap_or_default();
            panels.start += P;
        }
    }

    #[inline(always)]
    fn x_row(&self, row: usize) -> &[W::X] {
        self.place.row(self.x, row, W::x_len(self.weights.steps))
    }

    #[inline(always)]
    fn store<S: Simd>(&self, s: S, row: usize, panel: usize, sum: S::F) {
        let column = panel * LANES;
        let live = LANES.min(self.weights.outputs - column);
        // SAFETY: no other task has these columns of these rows (`Job::run` cuts them into disjoint ranges), and this one holds one part at a time.
        let y = unsafe { self.to.y.part(row * self.to.stride + self.to.offset + column, live) };
        if let Ok(y) = <&mut [f32; LANES]>::try_from(&mut *y) {
            s.store(sum, y);
        } else {
            let mut lanes = [0.0; LANES];
            s.store(sum, &mut lanes);
            y.copy_from_slice(&lanes[..live]);
        }
    }
}

/// `live` rows from `row`, with P panels from `panel`.
pub(super) struct TileOf<'a, W: Weight, T, const R: usize, const P: usize> {
    tiles: &'a Tiles<'a, W>,
    /// The last of `live` rows again where there are fewer than R.
    pub x: T,
    row: usize,
    live: usize,
    pub panel: usize,
    pub fetch: Fetch<'a>,
}

impl<W: Weight, T: Sums<W::X, R, P>, const R: usize, const P: usize> Kernel for TileOf<'_, W, T, R, P> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let weights = self.tiles.weights;
        let mut panels: [&[W]; P] = [&[]; P];
        for (p, w) in panels.iter_mut().enumerate() {
            *w = weights.panel(self.panel + p);
        }
        let acc = if weights.scales(self.panel).is_empty() {
            let Self { x, fetch, .. } = self;
            s.apart(Steps { s, x, panels, steps: 0..weights.steps, acc: zero(s), fetch })
        } else {
            self.scaled(s, panels)
        };
        self.store(s, acc);
    }
}

impl<W: Weight, T: Sums<W::X, R, P>, const R: usize, const P: usize> TileOf<'_, W, T, R, P> {
    /// As a function of its own.
    #[inline(always)]
    fn on<S: Simd>(self, s: S) {
        if W::IS_BF16
            && S::OPENS_TIGHT
            && let Some(tight) = self.tiles.weights.tight()
        {
            return s.apart(TightTile { tile: self, tight });
        }
        s.apart(self);
    }

    #[inline(always)]
    pub fn store<S: Simd>(&self, s: S, acc: [[S::F; P]; R]) {
        // Every index is known to the compiler: sums that are indexed by anything else live in memory.
        for (r, acc) in acc.into_iter().enumerate() {
            for (p, sum) in acc.into_iter().enumerate() {
                self.tiles.store(s, self.row + r.min(self.live - 1), self.panel + p, sum);
            }
        }
    }

    /// The bits of one of a row's elements in all lanes.
    #[inline(always)]
    fn row_bits<S: Simd>(&self, s: S, row: usize, at: usize) -> S::F {
        s.splat(bytemuck::cast(self.x.element(row, at)))
    }

    /// A chain for each block of K, then one chain over the blocks.
    #[inline(always)]
    fn scaled<S: Simd>(&self, s: S, panels: [&[W]; P]) -> [[S::F; P]; R] {
        let weights = self.tiles.weights;
        let mut ahead = self.fetch.ahead;
        let mut acc = zero(s);
        let blocks = weights.scales(self.panel).len();
        for block in 0..blocks {
            let first = block * weights.block_steps;
            let now = ahead.split_off(..ahead.len() / (blocks - block)).unwrap_or_default();
            let fetch = Fetch { ahead: now, ..self.fetch };
            let steps = first..weights.steps.min(first + weights.block_steps);
            let row_scale = quads::scale_at(weights.steps, block);
            let mut start = zero(s);
            if W::ROW_BLOCK_STEPS.is_some() {
                for (r, start) in start.iter_mut().enumerate() {
                    *start = [self.row_bits(s, r, row_scale + 1); P];
                }
            }
            let steps = Steps { s, x: self.x, panels, steps, acc: start, fetch };
            // A block of INT8 is too short for a function of its own.
            let mut part = if W::ROW_BLOCK_STEPS.is_some() { steps.run(s) } else { s.apart(steps) };
            if W::ROW_BLOCK_STEPS.is_some() {
                for (r, part) in part.iter_mut().enumerate() {
                    for sum in part {
                        *sum = s.mul(s.integers(*sum), self.row_bits(s, r, row_scale));
                    }
                }
            }
            for p in 0..P {
                let scale = weights.scales(self.panel + p)[block].open(s, 0);
                for r in 0..R {
                    acc[r][p] = s.fma(part[r][p], scale, acc[r][p]);
                }
            }
        }
        acc
    }
}
