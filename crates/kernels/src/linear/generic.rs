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

use bytemuck::Zeroable;

use super::panels::{View, Weight};
use super::tight::{GROUP_LINES, GROUP_STEPS, Group, TightTile};
use crate::pool::Shared;
use crate::simd::{Kernel, LANES, Line, Simd};

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
        let is_tight = self.weights.tight().is_some();
        let opens_in_registers = if is_tight { W::IS_BF16 && S::OPENS_TIGHT } else { S::WIDE };
        let widens = if is_tight {
            !opens_in_registers || self.rows.len() > OPENED_AGAIN_MAX * W::rows_max::<S>()
        } else {
            self.rows.len() >= W::WIDEN_ROWS_MIN
        };
        let group = if S::WIDE { 8 } else { 4 };
        let group = if widens { group.min(self.opened_together()) } else { group };
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
                let live = rows_of_tile(rows.len(), W::rows_max::<S>());
                let fetch = Fetch::own(self.weights, panels.clone());
                self.rows(s, Strip { row: rows.start, live, panels: panels.clone(), fetch });
                rows.start += live;
            }
            self.open(s, panels.clone(), &mut wide);
            let Self { weights, x, y, place, .. } = self;
            let weights = weights.of(&wide, first);
            Tiles { weights, x, y, place, rows, panels: panels.clone() }.pass(s, panels, Near::Opened, next);
        }
        W::give_back_wide(wide);
    }
}

/// What is opened in memory at a time, so that it stays in the second-level cache beside the rows.
const OPENED_BYTES_MAX: usize = 512 << 10;

/// How many times a tight matrix is opened in registers, before it pays to open it in memory once for all rows.
const OPENED_AGAIN_MAX: usize = 2;

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
    /// Panels that are opened in memory at a time: a power of two, for tiles of several.
    fn opened_together(&self) -> usize {
        let panel = self.weights.steps * W::PER_STEP / W::Wide::PER_STEP * size_of::<W::Wide>();
        1 << (OPENED_BYTES_MAX / panel.max(1)).max(2).ilog2()
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
        let max = W::rows_max::<S>();
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
    fn rows<S: Simd>(&self, s: S, strip: Strip<'_>) {
        // Not one `match` of both: each set of instructions would get the other's tiles, too.
        if S::WIDE {
            match strip.live {
                1 => self.strip::<S, 1, 8>(s, strip),
                2 => self.strip::<S, 2, 4>(s, strip),
                3..=4 => self.strip::<S, 4, 4>(s, strip),
                5..=6 if W::WIDEN_ROWS_MIN < usize::MAX || self.weights.tight().is_some() => {
                    self.strip::<S, 6, 2>(s, strip)
                }
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

    #[inline(always)]
    fn strip<S: Simd, const R: usize, const P: usize>(&self, s: S, strip: Strip<'_>)
    where
        Tile: Sums<R, P> + Sums<R, 4> + Sums<R, 1>,
    {
        let Strip { row, live, mut panels, mut fetch } = strip;
        let mut x: [&[W::X]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = self.x_row(row + r.min(live - 1));
        }
        while panels.len() >= P {
            let tiles = panels.len() / P;
            let ahead = fetch.ahead.split_off(..fetch.ahead.len() / tiles).unwrap_or_default();
            let now = Fetch { ahead, ..fetch };
            TileOf::<W, R, P> { tiles: self, x, row, live, panel: panels.start, fetch: now }.on(s);
            fetch.own = fetch.own.get(P * self.weights.panel_lines()..).unwrap_or_default();
            panels.start += P;
        }
        let fetch = Fetch::nothing();
        if P > 4 && panels.len() >= 4 {
            TileOf::<W, R, 4> { tiles: self, x, row, live, panel: panels.start, fetch }.on(s);
            panels.start += 4;
        }
        for panel in panels {
            TileOf::<W, R, 1> { tiles: self, x, row, live, panel, fetch }.on(s);
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
pub(super) struct TileOf<'a, W: Weight, const R: usize, const P: usize> {
    tiles: &'a Tiles<'a, W>,
    /// The last of `live` rows again where there are fewer than R.
    pub x: [&'a [W::X]; R],
    row: usize,
    live: usize,
    pub panel: usize,
    pub fetch: Fetch<'a>,
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
            chain::<S, W, R, P>(s, self.x, panels, 0..weights.steps, zero(s), self.fetch)
        } else {
            self.scaled(s, panels)
        };
        self.store(s, acc);
    }
}

impl<W: Weight, const R: usize, const P: usize> TileOf<'_, W, R, P>
where
    Tile: Sums<R, P>,
{
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
            let part = chain::<S, W, R, P>(s, self.x, panels, steps, zero(s), fetch);
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

#[inline(always)]
pub(super) fn zero<S: Simd, const R: usize, const P: usize>(s: S) -> [[S::F; P]; R] {
    [[s.splat(0.0); P]; R]
}

/// What is brought near while a tile is computed.
#[derive(Clone, Copy)]
pub(crate) struct Fetch<'a> {
    /// For the first rows, which find their panels in memory: those from the tile's first on, of which the tile fetches its own some steps ahead,
    /// and near its end the first steps of the next one's.
    pub own: &'a [Line],
    /// Lines of each.
    pub panel: usize,
    /// The line of each panel that step 0 fetches.
    pub from: usize,
    /// Evenly over the steps.
    pub ahead: &'a [Line],
}

impl<'a> Fetch<'a> {
    pub fn nothing() -> Self {
        Self { own: &[], panel: 0, from: 0, ahead: &[] }
    }

    fn own<W: Weight>(weights: View<'a, W>, panels: Range<usize>) -> Self {
        let from = OWN_STEPS * size_of::<W>() / size_of::<Line>();
        Self { own: weights.lines(panels), panel: weights.panel_lines(), from, ..Self::nothing() }
    }
}

/// How many steps ahead a tile's own panels are fetched.
const OWN_STEPS: usize = 48;

/// Sums of R rows and P panels over `steps`, from `acc`.
#[inline(always)]
pub(super) fn chain<S: Simd, W: Weight, const R: usize, const P: usize>(
    s: S,
    x: [&[W::X]; R],
    panels: [&[W]; P],
    steps: Range<usize>,
    acc: [[S::F; P]; R],
    fetch: Fetch<'_>,
) -> [[S::F; P]; R]
where
    Tile: Sums<R, P>,
{
    if fetch.own.is_empty() {
        Tile::sums::<S, W, false>(s, x, panels, steps, acc, fetch)
    } else {
        Tile::sums::<S, W, true>(s, x, panels, steps, acc, fetch)
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
        fetch: Fetch<'_>,
    ) -> [[S::F; P]; R];

    /// The same over some groups of panels of a tight matrix, and with its table of exponents.
    fn tight_sums<S: Simd, W: Weight, const FETCH_OWN: bool>(
        s: S,
        x: [&[W::X]; R],
        panels: ([&[Group]; P], &Line),
        groups: Range<usize>,
        acc: [[S::F; P]; R],
        fetch: Fetch<'_>,
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
                fetch: Fetch<'_>,
            ) -> [[S::F; $P]; $R] {
                assert!(x.iter().all(|x| steps.end * W::PARTS <= x.len()) && panels.iter().all(|w| steps.end <= w.len()));
                let Fetch { own, panel, from, ahead } = fetch;
                let pace = ahead.len().div_ceil(steps.len().max(1));
                let mut ahead = ahead.iter();
                for k in steps {
                    if FETCH_OWN {
                        let at = from + k * size_of::<W>() / size_of::<Line>();
                        let at = if at < panel { at } else { at + ($P - 1) * panel };
                        tile!(@fetch s, own, at, panel, $panels);
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

            #[inline(always)]
            fn tight_sums<S: Simd, W: Weight, const FETCH_OWN: bool>(
                s: S,
                x: [&[W::X]; $R],
                (panels, exponents): ([&[Group]; $P], &Line),
                groups: Range<usize>,
                mut acc: [[S::F; $P]; $R],
                fetch: Fetch<'_>,
            ) -> [[S::F; $P]; $R] {
                let parts = GROUP_STEPS * W::PARTS;
                assert!(x.iter().all(|x| groups.end * parts <= x.len()) && panels.iter().all(|g| groups.end <= g.len()));
                let Fetch { own, panel, from, ahead } = fetch;
                let pace = ahead.len().div_ceil(groups.len().max(1));
                assert!(!FETCH_OWN || !own.is_empty());
                let last = own.len().saturating_sub(1);
                let mut ahead = ahead.iter();
                for group in groups {
                    if FETCH_OWN {
                        for line in 0..GROUP_LINES {
                            let at = from + group * GROUP_LINES + line;
                            let at = if at < panel { at } else { at + ($P - 1) * panel };
                            // SAFETY: `last` is below the length of `own`, which is not empty.
                            unsafe { tile!(@fetch_up_to last, s, own, at, panel, $panels) }
                        }
                    }
                    tile!(@of_group 0, W, s, x, panels, group, exponents, acc, [$($r)*], $panels);
                    tile!(@of_group 1, W, s, x, panels, group, exponents, acc, [$($r)*], $panels);
                    tile!(@of_group 2, W, s, x, panels, group, exponents, acc, [$($r)*], $panels);
                    tile!(@of_group 3, W, s, x, panels, group, exponents, acc, [$($r)*], $panels);
                    if !FETCH_OWN && $R > 2 {
                        for line in ahead.by_ref().take(pace) {
                            s.prefetch(line);
                        }
                    }
                }
                acc
            }
        }
    };
    (@fetch_up_to $last:ident, $s:ident, $own:ident, $at:ident, $panel:ident, [$($p:literal)*]) => {{
        $($s.prefetch($own.get_unchecked($last.min($at + $p * $panel)));)*
    }};
    (
        @of_group $v:literal, $W:ident, $s:ident, $x:ident, $of:ident, $group:ident, $exponents:ident,
        $acc:ident, [$($r:literal)*], $panels:tt
    ) => {
        // SAFETY: `group` is below the length of every panel.
        let pairs = unsafe { tile!(@pairs $s, $of, $group, $v, $exponents, $panels) };
        for part in 0..$W::PARTS {
            let w = tile!(@parts $s, $W, pairs, part, $panels);
            $(
                // SAFETY: `group` is below the length of every row in groups.
                let value = unsafe { *$x[$r].get_unchecked(($group * GROUP_STEPS + $v) * $W::PARTS + part) };
                tile!(@step $s, value, w, $acc, $r, $panels);
            )*
        }
    };
    (@pairs $s:ident, $w:ident, $group:ident, $v:literal, $exponents:ident, [$($p:literal)*]) => {
        [$({
            let group = $w[$p].get_unchecked($group);
            $s.pairs_tight::<$v>(&group.codes, &group.rests[$v / 2], $exponents)
        }),*]
    };
    (@parts $s:ident, $W:ident, $pairs:ident, $part:ident, [$($p:literal)*]) => {
        [$($W::of_pairs($s, $pairs[$p], $part)),*]
    };
    (@fetch $s:ident, $own:ident, $at:ident, $panel:ident, [$($p:literal)*]) => {
        $(if let Some(line) = $own.get($at + $p * $panel) {
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
tile!(6: [0 1 2 3 4 5], 1: [0], 2: [0 1], 4: [0 1 2 3]);
tile!(8: [0 1 2 3 4 5 6 7], 1: [0], 2: [0 1], 4: [0 1 2 3]);
