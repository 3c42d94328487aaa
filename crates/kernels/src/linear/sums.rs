//! The sums of a tile: R rows of x with P panels of weights, all in registers, over some steps of K.

use std::ops::Range;

use super::panels::{View, Weight};
use super::tight::{GROUP_LINES, GROUP_STEPS, Group};
use crate::simd::{Kernel, Line, Simd};

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

    pub fn own<W: Weight>(weights: View<'a, W>, panels: Range<usize>) -> Self {
        let from = OWN_STEPS * size_of::<W>() / size_of::<Line>();
        Self { own: weights.lines(panels), panel: weights.panel_lines(), from, ..Self::nothing() }
    }
}

impl Fetch<'_> {
    /// Fetches a line of `own`, the last one instead of any behind it. (No question whether it is there: that would be a branch for each.)
    ///
    /// # Safety
    /// * `own` must not be empty.
    #[inline(always)]
    pub unsafe fn own_line<S: Simd>(&self, s: S, line: usize) {
        // SAFETY: that is within `own`, which the caller knows not to be empty.
        s.prefetch(unsafe { self.own.get_unchecked(line.min(self.own.len() - 1)) });
    }
}

/// How many steps ahead a tile's own panels are fetched.
const OWN_STEPS: usize = 48;

/// R rows of x, in the form that tiles with P panels read. Written out for each shape: a compiler that meets an index before it has unrolled
/// the loop around it keeps all sums in memory.
pub(crate) trait Sums<X, const R: usize, const P: usize>: Copy {
    /// Sums over `steps`, which must be within every row and panel, from `acc`.
    fn sums<S: Simd, W: Weight<X = X>, const FETCH_OWN: bool>(
        self,
        s: S,
        panels: [&[W]; P],
        steps: Range<usize>,
        acc: [[S::F; P]; R],
        fetch: Fetch<'_>,
    ) -> [[S::F; P]; R];

    /// The same over some groups of panels of a tight matrix, and with its table of upper bytes.
    fn tight_sums<S: Simd, W: Weight<X = X>, const FETCH_OWN: bool>(
        self,
        s: S,
        panels: ([&[Group]; P], &Line),
        groups: Range<usize>,
        acc: [[S::F; P]; R],
        fetch: Fetch<'_>,
    ) -> [[S::F; P]; R];

    /// What is behind the first `elements` of each row.
    fn skip(self, elements: usize) -> Self;

    /// One of a row's elements.
    fn element(&self, row: usize, at: usize) -> X;
}

/// [`Sums::sums`] as a function of its own: beside other code, some sums would live in memory.
pub(super) struct Steps<'a, I: Simd, W, T, const R: usize, const P: usize> {
    pub s: I,
    pub x: T,
    pub panels: [&'a [W]; P],
    pub steps: Range<usize>,
    pub acc: [[I::F; P]; R],
    pub fetch: Fetch<'a>,
}

impl<I: Simd, W: Weight, T: Sums<W::X, R, P>, const R: usize, const P: usize> Kernel for Steps<'_, I, W, T, R, P> {
    type Out = [[I::F; P]; R];

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Out {
        let Self { s, x, panels, steps, acc, fetch } = self;
        if fetch.own.is_empty() {
            x.sums::<I, W, false>(s, panels, steps, acc, fetch)
        } else {
            x.sums::<I, W, true>(s, panels, steps, acc, fetch)
        }
    }
}

macro_rules! tile {
    ($R:literal: $rows:tt, $($P:literal: $panels:tt),*) => {
        $(tile!(@shape $R, $rows, $P, $panels);)*
    };
    (@shape $R:literal, [$($r:literal)*], $P:literal, $panels:tt) => {
        impl<X: Copy> Sums<X, $R, $P> for [&[X]; $R] {
            #[inline(always)]
            fn sums<S: Simd, W: Weight<X = X>, const FETCH_OWN: bool>(
                self,
                s: S,
                panels: [&[W]; $P],
                steps: Range<usize>,
                mut acc: [[S::F; $P]; $R],
                fetch: Fetch<'_>,
            ) -> [[S::F; $P]; $R] {
                let x = self;
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
            fn tight_sums<S: Simd, W: Weight<X = X>, const FETCH_OWN: bool>(
                self,
                s: S,
                (panels, uppers): ([&[Group]; $P], &Line),
                groups: Range<usize>,
                mut acc: [[S::F; $P]; $R],
                fetch: Fetch<'_>,
            ) -> [[S::F; $P]; $R] {
                let parts = GROUP_STEPS * W::PARTS;
                let x = self;
                assert!(x.iter().all(|x| groups.end * parts <= x.len()) && panels.iter().all(|g| groups.end <= g.len()));
                let Fetch { panel, from, ahead, .. } = fetch;
                let pace = ahead.len().div_ceil(groups.len().max(1));
                let mut ahead = ahead.iter();
                assert!(!FETCH_OWN || !fetch.own.is_empty());
                for group in groups {
                    if FETCH_OWN {
                        for line in 0..GROUP_LINES {
                            let at = from + group * GROUP_LINES + line;
                            let at = if at < panel { at } else { at + ($P - 1) * panel };
                            // SAFETY: `own` is not empty.
                            unsafe { tile!(@fetch_own s, fetch, at, panel, $panels) }
                        }
                    }
                    tile!(@of_group 0, W, s, x, panels, group, uppers, acc, [$($r)*], $panels);
                    tile!(@of_group 1, W, s, x, panels, group, uppers, acc, [$($r)*], $panels);
                    tile!(@of_group 2, W, s, x, panels, group, uppers, acc, [$($r)*], $panels);
                    tile!(@of_group 3, W, s, x, panels, group, uppers, acc, [$($r)*], $panels);
                    if !FETCH_OWN && $R > 2 {
                        for line in ahead.by_ref().take(pace) {
                            s.prefetch(line);
                        }
                    }
                }
                acc
            }

            #[inline(always)]
            fn skip(self, elements: usize) -> Self {
                self.map(|x| &x[elements..])
            }

            #[inline(always)]
            fn element(&self, row: usize, at: usize) -> X {
                self[row][at]
            }
        }
    };
    (@fetch_own $s:ident, $fetch:ident, $at:ident, $panel:ident, [$($p:literal)*]) => {{
        $($fetch.own_line($s, $at + $p * $panel);)*
    }};
    (
        @of_group $v:literal, $W:ident, $s:ident, $x:ident, $of:ident, $group:ident, $uppers:ident,
        $acc:ident, [$($r:literal)*], $panels:tt
    ) => {
        // SAFETY: `group` is below the length of every panel.
        let pairs = unsafe { tile!(@pairs $s, $of, $group, $v, $uppers, $panels) };
        for part in 0..$W::PARTS {
            let w = tile!(@parts $s, $W, pairs, part, $panels);
            $(
                // SAFETY: `group` is below the length of every row in groups.
                let value = unsafe { *$x[$r].get_unchecked(($group * GROUP_STEPS + $v) * $W::PARTS + part) };
                tile!(@step $s, value, w, $acc, $r, $panels);
            )*
        }
    };
    (@pairs $s:ident, $w:ident, $group:ident, $v:literal, $uppers:ident, [$($p:literal)*]) => {
        [$({
            let group = $w[$p].get_unchecked($group);
            $s.pairs_tight::<$v>(&group.codes, &group.lowers[$v / 2], $uppers)
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
