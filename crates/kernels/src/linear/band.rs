//! Many rows of x in a band, where a processor has registers for 24 sums: a tile of one panel, whose weights are read and opened once for all of them.
//!
//! ```text
//! band of R rows:  for each 4 elements of K, those of row 0, of row 1, ... of row R - 1
//! ```
//! Whatever a step needs of x then lies behind one address, so that a multiply-add can take its x from memory and a step is little else: of 24 rows
//! with a panel of bf16 48 multiply-adds, 2 operations to open 32 weights, and some 5 to go on. (What decides is how many instructions there are, as
//! soon as the core's other thread is at work, too. An address of two registers would count as an instruction of its own.)

use std::ops::Range;

use bytemuck::Pod;

use super::generic::{Place, rows_of_tile};
use super::panels::Weight;
use super::sums::{Fetch, Sums};
use super::tight::{GROUP_LINES, GROUP_STEPS, Group};
use crate::simd::{Kernel, Line, Simd};

/// Rows of the largest band.
pub(super) const ROWS_MAX: usize = 24;
/// So many rows or fewer are faster as they are.
pub(super) const ROWS_BELOW: usize = 8;
/// Bands have a multiple of so many rows; the last may be there several times.
const ROWS_EACH: usize = 4;
/// Elements of a row that lie together: as many as the step of any weights takes, or a multiple.
const TOGETHER: usize = 4;
/// So many of them are a cache line.
const LINE: usize = 4;
/// Rows that are brought into bands at a time.
const BYTES_MAX: usize = 8 << 20;

/// R rows.
#[derive(Clone, Copy)]
pub(super) struct Band<'a, X, const R: usize>(&'a [[[X; TOGETHER]; R]]);

/// The bands of some rows, from row `first` on.
#[derive(Clone, Copy)]
pub(crate) struct Bands<'a> {
    first: usize,
    /// Of a row.
    elements: usize,
    x: &'a [u32],
}

impl<'a> Bands<'a> {
    /// That of R rows from `row` on, where [`Fill`] began a band.
    #[inline(always)]
    pub fn band<X: Pod, const R: usize>(&self, row: usize) -> Band<'a, X, R> {
        let start = (row - self.first).next_multiple_of(ROWS_EACH) * self.elements;
        Band(bytemuck::cast_slice(&self.x[start..][..R * self.elements]).as_chunks().0.as_chunks().0)
    }
}

/// Brings rows of x into bands.
pub(super) struct Fill<'a, X> {
    pub x: &'a [X],
    pub place: Place<'a>,
    pub rows: Range<usize>,
    /// Of a row; a multiple of [`TOGETHER`].
    pub elements: usize,
    /// [`scratch_len`] of them.
    pub to: &'a mut [u32],
}

/// Elements of the bands of so many rows: the last two may each be filled up.
pub(super) fn scratch_len(rows: usize, elements: usize) -> usize {
    (rows + 2 * ROWS_EACH) * elements
}

impl<'a, X: Pod> Kernel for Fill<'a, X> {
    type Out = Bands<'a>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Bands<'a> {
        let Self { x, place, rows, elements, to: scratch } = self;
        let mut to = &mut bytemuck::cast_slice_mut::<u32, X>(scratch)[..];
        let mut at = rows.start;
        while at < rows.end {
            let live = rows_of_tile(rows.end - at, ROWS_MAX);
            let of_band = live.next_multiple_of(ROWS_EACH);
            let band = to.split_off_mut(..of_band * elements).unwrap_or_default();
            let band = band.as_chunks_mut::<TOGETHER>().0.as_chunks_mut::<ROWS_EACH>().0;
            let fours = of_band / ROWS_EACH;
            // A line of each row at a time, of some rows at a time: what is written is whole lines, and close together.
            let mut from: [[&[[X; TOGETHER]]; ROWS_EACH]; ROWS_MAX / ROWS_EACH] = Default::default();
            for (r, from) in from.as_flattened_mut().iter_mut().enumerate().take(of_band) {
                *from = place.row(x, at + r.min(live - 1), elements).as_chunks().0;
            }
            for (k, to) in band.chunks_mut(LINE * fours).enumerate() {
                for (i, [a, b, c, d]) in from.iter().take(fours).enumerate() {
                    let [a, b, c, d] = [a, b, c, d].map(|row| &row[k * LINE..]);
                    for ((((to, a), b), c), d) in to[i..].iter_mut().step_by(fours).zip(a).zip(b).zip(c).zip(d) {
                        to[0] = *a;
                        to[1] = *b;
                        to[2] = *c;
                        to[3] = *d;
                    }
                }
            }
            at += live;
        }
        Bands { first: rows.start, elements, x: scratch }
    }
}

/// How many of `rows` are brought into bands at a time; all of the parts are about as large.
pub(super) fn rows_together(rows: usize, elements: usize) -> usize {
    let max = (BYTES_MAX / (elements * size_of::<u32>()).max(1)).max(ROWS_MAX);
    rows.div_ceil(rows.div_ceil(max).max(1))
}

/// Whether rows of so many elements, or blocks of theirs that have a chain of their own, can be brought into bands.
pub(super) fn has_form(elements: usize) -> bool {
    elements > 0 && elements.is_multiple_of(TOGETHER)
}

/// Fetches a line. (Not several in a loop: a compiler would keep sums in memory for its sake. Two bands or more share what is to be fetched,
/// so that a line for each line that is read is more than enough.)
#[inline(always)]
fn next<S: Simd>(s: S, ahead: &mut std::slice::Iter<'_, Line>) {
    if let Some(line) = ahead.next() {
        s.prefetch(line);
    }
}

macro_rules! band {
    ($($R:literal: $rows:tt),*) => {
        $(band!(@band $R, $rows);)*
    };
    (@band $R:literal, $rows:tt) => {
        impl<X: Copy> Sums<X, $R, 1> for Band<'_, X, $R> {
            #[inline(always)]
            fn sums<S: Simd, W: Weight<X = X>, const FETCH_OWN: bool>(
                self,
                s: S,
                [panel]: [&[W]; 1],
                steps: Range<usize>,
                mut acc: [[S::F; 1]; $R],
                fetch: Fetch<'_>,
            ) -> [[S::F; 1]; $R] {
                let each = TOGETHER / W::PARTS;
                assert!(steps.start.is_multiple_of(each) && steps.end.is_multiple_of(each));
                let (first, x) = (steps.start / each, &self.0[steps.start / each..steps.end / each]);
                let (panel, lines) = (&panel[steps], each * size_of::<W>() / size_of::<Line>());
                assert!(!FETCH_OWN || !fetch.own.is_empty());
                let mut ahead = fetch.ahead.iter();
                for (i, x) in x.iter().enumerate() {
                    if FETCH_OWN {
                        for line in 0..lines {
                            // SAFETY: `own` is not empty.
                            unsafe { fetch.own_line(s, fetch.from + (first + i) * lines + line) };
                        }
                    } else {
                        next(s, &mut ahead);
                    }
                    let x = s.by_itself(x);
                    band!(@element 0, W, s, x, panel, i, acc, $rows);
                    band!(@element 1, W, s, x, panel, i, acc, $rows);
                    band!(@element 2, W, s, x, panel, i, acc, $rows);
                    band!(@element 3, W, s, x, panel, i, acc, $rows);
                }
                acc
            }

            #[inline(always)]
            fn tight_sums<S: Simd, W: Weight<X = X>, const FETCH_OWN: bool>(
                self,
                s: S,
                ([panel], uppers): ([&[Group]; 1], &Line),
                groups: Range<usize>,
                mut acc: [[S::F; 1]; $R],
                fetch: Fetch<'_>,
            ) -> [[S::F; 1]; $R] {
                let first = groups.start;
                let (x, panel) = (&self.0[first * GROUP_STEPS * W::PARTS / TOGETHER..], &panel[groups]);
                assert!(panel.len() * GROUP_STEPS * W::PARTS / TOGETHER <= x.len());
                assert!(!FETCH_OWN || !fetch.own.is_empty());
                let mut ahead = fetch.ahead.iter();
                for (i, group) in panel.iter().enumerate() {
                    if FETCH_OWN {
                        for line in 0..GROUP_LINES {
                            // SAFETY: `own` is not empty.
                            unsafe { fetch.own_line(s, fetch.from + (first + i) * GROUP_LINES + line) };
                        }
                    } else {
                        next(s, &mut ahead);
                        next(s, &mut ahead);
                    }
                    band!(@of_group 0, W, s, x, group, i, uppers, acc, $rows);
                    band!(@of_group 1, W, s, x, group, i, uppers, acc, $rows);
                    band!(@of_group 2, W, s, x, group, i, uppers, acc, $rows);
                    band!(@of_group 3, W, s, x, group, i, uppers, acc, $rows);
                }
                acc
            }

            #[inline(always)]
            fn skip(self, elements: usize) -> Self {
                Self(&self.0[elements / TOGETHER..])
            }

            #[inline(always)]
            fn element(&self, row: usize, at: usize) -> X {
                self.0[at / TOGETHER][row][at % TOGETHER]
            }
        }
    };
    (@element $e:literal, $W:ident, $s:ident, $x:ident, $panel:ident, $i:ident, $acc:ident, $rows:tt) => {
        // SAFETY: there are as many steps as x has elements.
        let step = unsafe { $panel.get_unchecked($i * (TOGETHER / $W::PARTS) + $e / $W::PARTS) };
        let w = step.open($s, $e % $W::PARTS);
        band!(@step $e, $W, $s, $x, w, $acc, $rows);
    };
    (
        @of_group $v:literal, $W:ident, $s:ident, $x:ident, $group:ident, $i:ident, $uppers:ident, $acc:ident, $rows:tt
    ) => {
        let pairs = $s.pairs_tight::<$v>(&$group.codes, &$group.lowers[$v / 2], $uppers);
        // SAFETY: x has as many elements as there are steps.
        let x = unsafe { $x.get_unchecked(($i * GROUP_STEPS + $v) * $W::PARTS / TOGETHER) };
        let x = $s.by_itself(x);
        for part in 0..$W::PARTS {
            let w = $W::of_pairs($s, pairs, part);
            let e = $v * $W::PARTS % TOGETHER + part;
            band!(@step e, $W, $s, x, w, $acc, $rows);
        }
    };
    (@step $e:expr, $W:ident, $s:ident, $x:ident, $w:ident, $acc:ident, [$($r:literal)*]) => {
        $($acc[$r][0] = $W::step($s, $x[$r][$e], $w, $acc[$r][0]);)*
    };
}

band!(
    12: [0 1 2 3 4 5 6 7 8 9 10 11],
    16: [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15],
    20: [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19],
    24: [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23]
);
