//! y = x Wᵀ for a range of rows and a range of panels, on any instruction set.
//!
//! ```text
//! for 8 (or 4) panels, for up to 8 rows of x:         a tile; its sums stay in registers
//!     for each block of K (one, where weights have no scales):
//!         part = 0;  for each step k ascending:  part[row][panel] = step(x[row][k], w[panel][k], part[row][panel])
//!         acc = part, or fma(part, scale, acc)
//!     y[row][panel] = acc
//! ```
//! Tricks:
//! 1. Lanes are outputs, so each output has one chain over K, as in the plain loop: rows, tiles, threads and instruction sets cannot change it.
//! 2. A step waits for the one before it (4 cycles), so a tile always has several chains: few rows take many panels, many rows few.
//! 3. Weights are read once for up to 8 rows; a group of panels stays in the second-level cache while all rows pass over it,
//!    and while they do, the next group is fetched.
//! 4. FP8 weights are widened in registers for few rows, and once for many, to bf16.
//! 5. 3, 5 or 7 rows run as 4, 6 or 8 with the last row twice: cheaper than reading the weights twice, and less code.

use std::ops::Range;

use super::panels::{View, Weight};
use crate::pool::Shared;
use crate::simd::{Kernel, LANES, Simd};

/// Where the rows of a call lie: row r of the call is row `pick[r]` (or r) of x, and row r of y.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub pick: Option<&'a [u32]>,
    pub x_stride: usize,
    pub x_offset: usize,
    pub y_stride: usize,
    pub y_offset: usize,
}

/// One task: every row of `rows` with every panel of `panels`. Writes those columns of those rows of `y`.
pub(crate) struct Tiles<'a, W: Weight> {
    pub weights: View<'a, W>,
    pub x: &'a [W::X],
    pub y: Shared<'a, f32>,
    pub place: Place<'a>,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
}

impl<W: Weight> Kernel for Tiles<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let widens = self.rows.len() >= W::WIDEN_ROWS_MIN;
        let group = if S::WIDE && !widens { 8 } else { 4 };
        let mut wide = W::take_wide();
        for first in self.panels.clone().step_by(group) {
            let panels = first..self.panels.end.min(first + group);
            let next = lines(self.weights.panels(panels.end..self.panels.end.min(panels.end + group)));
            if !widens {
                self.pass(s, panels, first > self.panels.start, next);
                continue;
            }
            let narrow = self.weights.panels(panels.clone());
            wide.clear();
            for narrow in narrow {
                wide.push(narrow.widen(s));
            }
            let Self { weights, x, y, place, ref rows, .. } = self;
            let weights = weights.of(&wide, first);
            Tiles { weights, x, y, place, rows: rows.clone(), panels: panels.clone() }.pass(s, panels, true, next);
        }
        W::give_back_wide(wide);
    }
}

/// A line of the processor's caches.
type Line = [u8; 64];

fn lines<W: Weight>(weights: &[W]) -> &[Line] {
    bytemuck::cast_slice::<W, u8>(weights).as_chunks().0
}

/// Of `left` rows: `max` while there are many; fewer than twice as many are cut into halves, not into `max` and a small rest.
pub(crate) fn rows_of_tile(left: usize, max: usize) -> usize {
    if left > max && left < 2 * max { left.div_ceil(2) } else { left.min(max) }
}

/// `live` rows from `row`, for all `panels`.
struct Strip<'a, W> {
    row: usize,
    live: usize,
    panels: Range<usize>,
    fetch: Fetch<'a, W>,
}

impl<W: Weight> Tiles<'_, W> {
    /// All rows pass over a group of panels, which may be near already; meanwhile the `next` is fetched.
    #[inline(always)]
    fn pass<S: Simd>(&self, s: S, panels: Range<usize>, near: bool, mut next: &[Line]) {
        // Weights that take work to open are opened for more rows.
        let max = if S::WIDE && W::PARTS > 1 { 8 } else { 6 };
        let mut row = self.rows.start;
        while row < self.rows.end {
            let rows = rows_of_tile(self.rows.end - row, max);
            let strips = (self.rows.end - row).div_ceil(max);
            // The first rows fetch their own, unless others have.
            let fetch = if row == self.rows.start && (strips == 1 || !near) {
                let end = if strips == 1 { self.panels.end } else { panels.end };
                Fetch { own: self.weights.panels(panels.start..end), ahead: &[] }
            } else {
                Fetch { own: &[], ahead: next.split_off(..next.len() / strips).unwrap_or_default() }
            };
            let strip = Strip { row, live: rows, panels: panels.clone(), fetch };
            match (rows, S::WIDE) {
                (1, true) => self.strip::<S, 1, 8>(s, strip),
                (1, false) => self.strip::<S, 1, 4>(s, strip),
                (2, true) => self.strip::<S, 2, 4>(s, strip),
                (2, false) => self.strip::<S, 2, 2>(s, strip),
                (3..=4, true) => self.strip::<S, 4, 4>(s, strip),
                (3..=4, false) => self.strip::<S, 4, 1>(s, strip),
                (5..=6, true) => self.strip::<S, 6, 4>(s, strip),
                (_, true) => self.strip::<S, 8, 2>(s, strip),
                (_, false) => self.strip::<S, 6, 1>(s, strip),
            }
            row += rows;
        }
    }

    #[inline(always)]
    fn strip<S: Simd, const R: usize, const P: usize>(&self, s: S, strip: Strip<'_, W>)
    where
        Tile: Sums<R, P> + Sums<R, 4> + Sums<R, 1>,
    {
        let Strip { row, live, mut panels, fetch: Fetch { mut own, mut ahead } } = strip;
        let mut x: [&[W::X]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = self.x_row(row + r.min(live - 1));
        }
        while panels.len() >= P {
            let tiles = panels.len() / P;
            let part = ahead.split_off(..ahead.len() / tiles).unwrap_or_default();
            let fetch = Fetch { own, ahead: part };
            s.apart(TileOf::<W, R, P> { tiles: self, x, row, live, panel: panels.start, fetch });
            own = own.get(P * self.weights.steps..).unwrap_or_default();
            panels.start += P;
        }
        if P > 4 && panels.len() >= 4 {
            s.apart(TileOf::<W, R, 4> { tiles: self, x, row, live, panel: panels.start, fetch: Fetch::nothing() });
            panels.start += 4;
        }
        for panel in panels {
            s.apart(TileOf::<W, R, 1> { tiles: self, x, row, live, panel, fetch: Fetch::nothing() });
        }
    }

    #[inline(always)]
    fn x_row(&self, row: usize) -> &[W::X] {
        let row = self.place.pick.map_or(row, |pick| pick[row] as usize);
        &self.x[row * self.place.x_stride + self.place.x_offset..][..self.weights.steps * W::PARTS]
    }

    #[inline(always)]
    fn store<S: Simd>(&self, s: S, row: usize, panel: usize, sum: S::F) {
        let column = panel * LANES;
        let live = LANES.min(self.weights.outputs - column);
        // SAFETY: no other task has these columns of these rows (`Job::run` cuts them into disjoint ranges), and this one holds one part at a time.
        let y = unsafe { self.y.part(row * self.place.y_stride + self.place.y_offset + column, live) };
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
struct TileOf<'a, W: Weight, const R: usize, const P: usize> {
    tiles: &'a Tiles<'a, W>,
    /// The last of `live` rows again where there are fewer than R.
    x: [&'a [W::X]; R],
    row: usize,
    live: usize,
    panel: usize,
    fetch: Fetch<'a, W>,
}

impl<W: Weight, const R: usize, const P: usize> Kernel for TileOf<'_, W, R, P>
where
    Tile: Sums<R, P>,
{
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let weights = self.tiles.weights;
        let mut panels: [&[W]; P] = [&[]; P];
        for (p, w) in panels.iter_mut().enumerate() {
            *w = weights.panel(self.panel + p);
        }
        let acc = if weights.scales(self.panel).is_empty() {
            chain::<S, W, R, P>(s, self.x, panels, 0..weights.steps, self.fetch)
        } else {
            self.scaled(s, panels)
        };
        // Every index is known to the compiler: sums that are indexed by anything else live in memory.
        for (r, acc) in acc.into_iter().enumerate() {
            for (p, sum) in acc.into_iter().enumerate() {
                self.tiles.store(s, self.row + r.min(self.live - 1), self.panel + p, sum);
            }
        }
    }
}

impl<W: Weight, const R: usize, const P: usize> TileOf<'_, W, R, P>
where
    Tile: Sums<R, P>,
{
    /// A chain for each block of K, then one chain over the blocks.
    #[inline(always)]
    fn scaled<S: Simd>(&self, s: S, panels: [&[W]; P]) -> [[S::F; P]; R] {
        let weights = self.tiles.weights;
        let mut ahead = self.fetch.ahead;
        let mut acc = [[s.splat(0.0); P]; R];
        let blocks = weights.scales(self.panel).len();
        for block in 0..blocks {
            let first = block * weights.block_steps;
            let now = ahead.split_off(..ahead.len() / (blocks - block)).unwrap_or_default();
            let fetch = Fetch { ahead: now, ..self.fetch };
            let steps = first..weights.steps.min(first + weights.block_steps);
            let part = chain::<S, W, R, P>(s, self.x, panels, steps, fetch);
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

/// What is brought near while a tile is computed.
#[derive(Clone, Copy)]
pub(crate) struct Fetch<'a, W> {
    /// For the first rows, which find their panels in memory: those from the tile's first on, of which the tile fetches its own some steps ahead,
    /// and near its end the first steps of the next one's.
    own: &'a [W],
    /// Evenly over the steps.
    ahead: &'a [Line],
}

impl<W> Fetch<'_, W> {
    pub fn nothing() -> Self {
        Self { own: &[], ahead: &[] }
    }
}

/// How many steps ahead a tile's own panels are fetched.
const OWN_STEPS: usize = 48;

/// Sums of R rows and P panels over `steps`, from zero.
#[inline(always)]
fn chain<S: Simd, W: Weight, const R: usize, const P: usize>(
    s: S,
    x: [&[W::X]; R],
    panels: [&[W]; P],
    steps: Range<usize>,
    fetch: Fetch<'_, W>,
) -> [[S::F; P]; R]
where
    Tile: Sums<R, P>,
{
    let zero = [[s.splat(0.0); P]; R];
    if fetch.own.is_empty() {
        Tile::sums::<S, W, false>(s, x, panels, steps, zero, fetch)
    } else {
        Tile::sums::<S, W, true>(s, x, panels, steps, zero, fetch)
    }
}

/// The sums of a tile of R rows and P panels. Written out for each shape: a compiler that meets an index before it has unrolled
/// the loop around it keeps all sums in memory.
pub(crate) trait Sums<const R: usize, const P: usize> {
    /// Over `steps`, which must be within every row and panel, from `acc`.
    fn sums<S: Simd, W: Weight, const FETCH_OWN: bool>(
        s: S,
        x: [&[W::X]; R],
        panels: [&[W]; P],
        steps: Range<usize>,
        acc: [[S::F; P]; R],
        fetch: Fetch<'_, W>,
    ) -> [[S::F; P]; R];
}

/// See [`Sums`].
pub(crate) struct Tile;

macro_rules! tile {
    ($R:literal: $rows:tt, $($P:literal: $panels:tt),*) => {
        $(tile!(@shape $R, $rows, $P, $panels);)*
    };
    (@shape $R:literal, [$($r:literal)*], $P:literal, $panels:tt) => {
        impl Sums<$R, $P> for Tile {
            #[inline(always)]
            fn sums<S: Simd, W: Weight, const FETCH_OWN: bool>(
                s: S,
                x: [&[W::X]; $R],
                panels: [&[W]; $P],
                steps: Range<usize>,
                mut acc: [[S::F; $P]; $R],
                fetch: Fetch<'_, W>,
            ) -> [[S::F; $P]; $R] {
                assert!(x.iter().all(|x| steps.end * W::PARTS <= x.len()) && panels.iter().all(|w| steps.end <= w.len()));
                let Fetch { own, ahead } = fetch;
                let len = panels[0].len();
                let pace = ahead.len().div_ceil(steps.len().max(1));
                let mut ahead = ahead.iter();
                for k in steps {
                    if FETCH_OWN {
                        let at = k + OWN_STEPS;
                        let at = if at < len { at } else { at + ($P - 1) * len };
                        tile!(@fetch s, own, at, len, $panels);
                    } else if $R > 2 {
                        for line in ahead.by_ref().take(pace) {
                            s.prefetch(line);
                        }
                    }
                    for part in 0..W::PARTS {
                        // SAFETY: `k` is below the length of every panel, and of every row in steps.
                        let w = unsafe { tile!(@open s, panels, k, part, $panels) };
                        $(
                            // SAFETY: as above.
                            let value = unsafe { *x[$r].get_unchecked(k * W::PARTS + part) };
                            tile!(@step s, value, w, acc, $r, $panels);
                        )*
                    }
                }
                acc
            }
        }
    };
    (@fetch $s:ident, $own:ident, $at:ident, $len:ident, [$($p:literal)*]) => {
        $(if let Some(line) = $own.get($at + $p * $len) {
            $s.prefetch(line);
        })*
    };
    (@open $s:ident, $w:ident, $k:ident, $part:ident, [$($p:literal)*]) => {
        [$($w[$p].get_unchecked($k).open($s, $part)),*]
    };
    (@step $s:ident, $x:ident, $w:ident, $acc:ident, $r:literal, [$($p:literal)*]) => {
        $($acc[$r][$p] = W::step($s, $x, $w[$p], $acc[$r][$p]);)*
    };
}

tile!(1: [0], 1: [0], 4: [0 1 2 3], 8: [0 1 2 3 4 5 6 7]);
tile!(2: [0 1], 1: [0], 2: [0 1], 4: [0 1 2 3]);
tile!(4: [0 1 2 3], 1: [0], 4: [0 1 2 3]);
tile!(6: [0 1 2 3 4 5], 1: [0], 4: [0 1 2 3]);
tile!(8: [0 1 2 3 4 5 6 7], 1: [0], 2: [0 1], 4: [0 1 2 3]);
