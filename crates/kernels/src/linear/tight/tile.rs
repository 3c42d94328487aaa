//! A tile of a tight matrix: from outlier to outlier of its panels.

use std::ops::Range;

use super::{GROUP_STEPS, Group, Outlier, Tight};
use crate::linear::generic::{Fetch, Sums, Tile, TileOf, chain, zero};
use crate::linear::panels::Weight;
use crate::simd::{Kernel, Line, Simd};

pub(in crate::linear) struct TightTile<'a, W: Weight, const R: usize, const P: usize> {
    pub tile: TileOf<'a, W, R, P>,
    pub tight: Tight<'a>,
}

impl<W: Weight, const R: usize, const P: usize> Kernel for TightTile<'_, W, R, P>
where
    Tile: Sums<R, P>,
{
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { tile, tight } = self;
        let mut panels: [&[Group]; P] = [&[]; P];
        let mut outliers: [&[Outlier]; P] = [&[]; P];
        for (p, (panel, outliers)) in panels.iter_mut().zip(&mut outliers).enumerate() {
            let at = tile.panel + p;
            (*panel, *outliers) = (tight.groups(at..at + 1), tight.outliers(at));
        }
        let mut ahead = tile.fetch.ahead;
        let pace = ahead.len().div_ceil(tight.panel_groups);
        let mut acc = zero(s);
        let mut first = 0;
        loop {
            let next = outliers.iter().filter_map(|outliers| outliers.first()).map(Outlier::group).min();
            let end = next.unwrap_or(tight.panel_groups);
            let now = ahead.split_off(..ahead.len().min(pace * (end - first))).unwrap_or_default();
            let fetch = Fetch { ahead: now, ..tile.fetch };
            let (x, panels) = (tile.x, (panels, tight.exponents));
            acc = s.apart(Groups::<S, W, R, P> { s, x, panels, groups: first..end, acc, fetch });
            if end == tight.panel_groups {
                break;
            }
            let mut near = [[W::zeroed(); GROUP_STEPS]; P];
            for (p, (near, outliers)) in near.iter_mut().zip(&mut outliers).enumerate() {
                tight.open(s, tile.panel + p, end, outliers, bytemuck::cast_slice_mut(near));
            }
            let x = tile.x.map(|x| &x[end * GROUP_STEPS * W::PARTS..]);
            let near = near.each_ref().map(|near| &near[..]);
            acc = chain::<S, W, R, P>(s, x, near, 0..GROUP_STEPS, acc, Fetch::nothing());
            first = end + 1;
        }
        tile.store(s, acc);
    }
}

/// Groups without outliers.
struct Groups<'a, T: Simd, W: Weight, const R: usize, const P: usize> {
    s: T,
    x: [&'a [W::X]; R],
    panels: ([&'a [Group]; P], &'a Line),
    groups: Range<usize>,
    acc: [[T::F; P]; R],
    fetch: Fetch<'a>,
}

impl<T: Simd, W: Weight, const R: usize, const P: usize> Kernel for Groups<'_, T, W, R, P>
where
    Tile: Sums<R, P>,
{
    type Out = [[T::F; P]; R];

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Out {
        let Self { s, x, panels, groups, acc, fetch } = self;
        if fetch.own.is_empty() {
            Tile::tight_sums::<T, W, false>(s, x, panels, groups, acc, fetch)
        } else {
            Tile::tight_sums::<T, W, true>(s, x, panels, groups, acc, fetch)
        }
    }
}
