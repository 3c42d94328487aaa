//! A tile of a tight matrix: from outlier to outlier of its panels.

use std::marker::PhantomData;
use std::ops::Range;

use super::{GROUP_STEPS, Group, Outlier, Tight};
use crate::linear::generic::TileOf;
use crate::linear::panels::Weight;
use crate::linear::sums::{Fetch, Steps, Sums, zero};
use crate::simd::{Kernel, Line, Simd};

pub(in crate::linear) struct TightTile<'a, W: Weight, T, const R: usize, const P: usize> {
    pub tile: TileOf<'a, W, T, R, P>,
    pub tight: Tight<'a>,
}

impl<W: Weight, T: Sums<W::X, R, P>, const R: usize, const P: usize> Kernel for TightTile<'_, W, T, R, P> {
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
            let (x, panels) = (tile.x, (panels, tight.uppers));
            acc =
                s.apart(Groups::<S, W, T, R, P> { s, x, panels, groups: first..end, acc, fetch, weights: PhantomData });
            if end == tight.panel_groups {
                break;
            }
            let mut near = [[W::zeroed(); GROUP_STEPS]; P];
            for (p, (near, outliers)) in near.iter_mut().zip(&mut outliers).enumerate() {
                tight.open(s, tile.panel + p, end, outliers, bytemuck::cast_slice_mut(near));
            }
            let near = near.each_ref().map(|near| &near[..]);
            let x = x.skip(end * GROUP_STEPS * W::PARTS);
            acc = s.apart(Steps { s, x, panels: near, steps: 0..GROUP_STEPS, acc, fetch: Fetch::nothing() });
            first = end + 1;
        }
        tile.store(s, acc);
    }
}

/// Groups without outliers.
struct Groups<'a, I: Simd, W, T, const R: usize, const P: usize> {
    s: I,
    x: T,
    panels: ([&'a [Group]; P], &'a Line),
    groups: Range<usize>,
    acc: [[I::F; P]; R],
    fetch: Fetch<'a>,
    weights: PhantomData<W>,
}

impl<I: Simd, W: Weight, T: Sums<W::X, R, P>, const R: usize, const P: usize> Kernel for Groups<'_, I, W, T, R, P> {
    type Out = [[I::F; P]; R];

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Out {
        let Self { s, x, panels, groups, acc, fetch, .. } = self;
        if fetch.own.is_empty() {
            x.tight_sums::<I, W, false>(s, panels, groups, acc, fetch)
        } else {
            x.tight_sums::<I, W, true>(s, panels, groups, acc, fetch)
        }
    }
}
