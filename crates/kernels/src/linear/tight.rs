//! bf16 in 12 bits, without loss. Few rows wait for weights to come from memory, and the weights of a matrix use few of the exponents that a bf16 can tell,
//! and so few upper bytes (sign, and all but one bit of the exponent).
//!
//! ```text
//! group:    8 values of k for 16 outputs: 4 steps v, each 32 words of bf16 (16 pairs, a pair's lower k in its upper half)
//!   codes[b]          which of 16 upper bytes, in 4 bits: of steps 0 and 1 in the lower ones, of 2 and 3 in the upper ones
//!   lowers[v / 2][b]  the lower byte as it is
//!                     (word w of step v is byte b = w / 8 * 16 + v % 2 * 8 + w % 8: as registers of 64 bytes are interleaved)
//! outlier:  a pair with another upper byte: step * 16 + output within its panel, and the pair as it is, each a u32
//! matrix:   the groups of all panels; the 16 upper bytes, four times over; for each panel how many outliers are before it, and how many there are, as
//!           u32; the outliers
//! ```
//! A group is opened in registers. One that has outliers is opened in memory, where they are put in their places.

mod tile;

use std::cmp::Reverse;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::panels::AlignedBytes;
use crate::simd::{Isa, Kernel, LANES, Line, Simd, Words};

pub(super) use tile::TightTile;

/// Steps of a group; a panel has whole groups.
pub(crate) const GROUP_STEPS: usize = 4;
/// Lines of memory of a group.
pub(super) const GROUP_LINES: usize = size_of::<Group>() / size_of::<Line>();
/// Upper bytes that are not outliers.
const UPPERS: usize = 16;
/// With more outliers than one of so many pairs, a matrix is left as it is.
const PAIRS_OF_AN_OUTLIER_MIN: usize = 1024;

#[repr(C, align(64))]
#[derive(Clone, Copy, Zeroable, Pod)]
pub(crate) struct Group {
    pub codes: Line,
    pub lowers: [Line; 2],
}

impl Group {
    /// False where there are outliers: their codes are any.
    #[inline(always)]
    fn new<S: Simd>(s: S, steps: &[Words; GROUP_STEPS], uppers: &[u8; UPPERS]) -> (Self, bool) {
        let (first, first_lowers) = codes_and_lowers(s, &steps[0], &steps[1], uppers);
        let (second, second_lowers) = codes_and_lowers(s, &steps[2], &steps[3], uppers);
        let mut codes = [0; size_of::<Line>()];
        let mut found = 0;
        for (to, (first, second)) in codes.iter_mut().zip(first.iter().zip(&second)) {
            *to = first & 0xf | second << 4;
            found |= first | second;
        }
        (Self { codes, lowers: [first_lowers, second_lowers] }, found & OUTLIER == 0)
    }
}

/// Of two steps.
#[inline(always)]
fn codes_and_lowers<S: Simd>(s: S, even: &Words, odd: &Words, uppers: &[u8; UPPERS]) -> (Line, Line) {
    let ([even, even_lowers], [odd, odd_lowers]) = (uppers_and_lowers(even), uppers_and_lowers(odd));
    let of_words = s.interleave(&even, &odd);
    let mut codes = [OUTLIER; size_of::<Line>()];
    // No table by upper byte: comparing a whole line with one of sixteen is one operation on a vector.
    for (code, upper) in uppers.iter().enumerate() {
        for (to, of_word) in codes.iter_mut().zip(&of_words) {
            *to = if of_word == upper { code as u8 } else { *to };
        }
    }
    (codes, s.interleave(&even_lowers, &odd_lowers))
}

#[inline(always)]
fn uppers_and_lowers(step: &Words) -> [Words; 2] {
    let [mut uppers, mut lowers] = [[0; _]; 2];
    for ((upper, lower), word) in uppers.iter_mut().zip(&mut lowers).zip(step) {
        [*upper, *lower] = [word >> 8, word & 0xff];
    }
    [uppers, lowers]
}

fn upper_of(word: u16) -> u8 {
    (word >> 8) as u8
}

/// In place of a code.
const OUTLIER: u8 = 0x80;

/// Puts the groups of a panel behind those of `to`. Gives the numbers of those that have outliers.
struct TightenPanel<'a> {
    panel: &'a [[Words; GROUP_STEPS]],
    uppers: &'a [u8; UPPERS],
    to: &'a mut Vec<Group>,
}

impl Kernel for TightenPanel<'_> {
    type Out = Vec<usize>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<usize> {
        let mut with_outliers = Vec::new();
        for (index, steps) in self.panel.iter().enumerate() {
            let (group, is_whole) = Group::new(s, steps, self.uppers);
            self.to.push(group);
            if !is_whole {
                with_outliers.push(index);
            }
        }
        with_outliers
    }
}

#[repr(C)]
#[derive(Clone, Copy, Zeroable, Pod)]
pub(super) struct Outlier {
    at: u32,
    pair: u32,
}

impl Outlier {
    /// In its panel.
    pub fn group(&self) -> usize {
        self.at as usize / (GROUP_STEPS * LANES)
    }
}

/// A matrix that is being made tight, panel by panel.
pub(super) struct Tightening {
    groups: Vec<Group>,
    uppers: [u8; UPPERS],
    before: Vec<u32>,
    outliers: Vec<Outlier>,
    outliers_max: usize,
}

impl Tightening {
    /// For so many panels, of which one is `like`. Zeros are none of the outliers where outputs are missing.
    pub fn new(panels: usize, like: &[Words], are_outputs_missing: bool) -> Self {
        // A few more for what follows the groups.
        let groups = Vec::with_capacity(panels * like.len() / GROUP_STEPS * 65 / 64);
        let outliers_max = panels * like.len() * LANES / PAIRS_OF_AN_OUTLIER_MIN;
        let uppers = common_uppers(like, are_outputs_missing);
        Self { groups, uppers, before: vec![0], outliers: Vec::new(), outliers_max }
    }

    /// False where there are too many outliers.
    #[must_use]
    pub fn push(&mut self, panel: &[Words]) -> bool {
        let (panel, _) = panel.as_chunks();
        for index in Isa::best().run(TightenPanel { panel, uppers: &self.uppers, to: &mut self.groups }) {
            let pairs = panel[index].as_flattened().as_chunks::<2>().0;
            let is_known = |word: &u16| self.uppers.contains(&upper_of(*word));
            for (i, pair) in pairs.iter().enumerate().filter(|(_, pair)| !pair.iter().all(is_known)) {
                let at = (index * pairs.len() + i) as u32;
                self.outliers.push(Outlier { at, pair: bytemuck::cast(*pair) });
            }
        }
        self.before.push(self.outliers.len() as u32);
        self.outliers.len() <= self.outliers_max
    }

    pub fn finish(self) -> AlignedBytes {
        let Self { mut groups, uppers, before, outliers, .. } = self;
        let uppers: [u32; size_of::<Line>() / 4] = bytemuck::cast([uppers; 4]);
        let rest = [&uppers[..], &before, bytemuck::cast_slice(&outliers)].concat();
        for part in rest.chunks(size_of::<Group>() / size_of::<u32>()) {
            let mut group = Group::zeroed();
            bytemuck::cast_slice_mut(std::slice::from_mut(&mut group))[..part.len()].copy_from_slice(part);
            groups.push(group);
        }
        AlignedBytes::new(groups)
    }
}

/// Those that would be too many outliers, by how many words of a panel have them, and that of zeros if need be; then those up to 4 times the commonest,
/// then downwards. (Of rarer ones a panel tells nothing: one of a matrix's outliers may be there twice, and one of its smallest weights not at all.)
fn common_uppers(panel: &[Words], needs_zero: bool) -> [u8; UPPERS] {
    let words = panel.as_flattened();
    let mut counts = [0usize; 256];
    for word in words {
        counts[usize::from(upper_of(*word))] += 1;
    }
    if needs_zero {
        counts[0] = usize::MAX;
    }
    let magnitude = |upper: u8| upper & 0x7f;
    let count = |upper: &u8| counts[usize::from(*upper)];
    let commonest: u8 = (0..=u8::MAX).filter(|upper| magnitude(*upper) > 0).max_by_key(count).unwrap_or_default();
    let too_many = (words.len() / PAIRS_OF_AN_OUTLIER_MIN).max(2);
    let told = |upper: &u8| Some(count(upper)).filter(|count| *count >= too_many);
    let below = |upper: u8| (magnitude(commonest) + 1).wrapping_sub(magnitude(upper));
    let mut all: [u8; 256] = std::array::from_fn(|upper| upper as u8);
    all.sort_by_key(|upper| (Reverse(told(upper)), below(*upper)));
    std::array::from_fn(|code| all[code])
}

/// A tight matrix, as a kernel reads it.
#[derive(Clone, Copy)]
pub(super) struct Tight<'a> {
    groups: &'a [Group],
    pub uppers: &'a Line,
    before: &'a [u32],
    outliers: &'a [Outlier],
    pub panel_groups: usize,
}

impl<'a> Tight<'a> {
    /// None where `bytes` are not of a matrix of so many panels of so many steps.
    pub fn of(bytes: &'a [u8], panels: usize, steps: usize) -> Option<Self> {
        let panel_groups = steps / GROUP_STEPS;
        let (groups, rest) = bytes.split_at_checked(panels * panel_groups * size_of::<Group>())?;
        let (uppers, rest) = rest.split_first_chunk()?;
        let rest: &[u32] = bytemuck::try_cast_slice(rest).ok()?;
        let (before, rest) = rest.split_at_checked(panels + 1)?;
        let outliers = rest.get(..2 * *before.last()? as usize)?;
        let (groups, outliers) = (bytemuck::try_cast_slice(groups).ok()?, bytemuck::try_cast_slice(outliers).ok()?);
        Some(Self { groups, uppers, before, outliers, panel_groups })
    }

    /// Whether every outlier has a place, in ascending order, and the upper bytes are the same four times.
    pub fn is_sound(&self) -> bool {
        let (sixteens, _) = self.uppers.as_chunks::<UPPERS>();
        let places = (self.panel_groups * GROUP_STEPS * LANES) as u32;
        sixteens.iter().all(|same| *same == sixteens[0])
            && self.before.is_sorted()
            && (0..self.before.len() - 1).all(|panel| {
                let outliers = self.outliers(panel);
                outliers.is_sorted_by(|a, b| a.at < b.at) && outliers.last().is_none_or(|last| last.at < places)
            })
    }

    #[inline(always)]
    pub fn outliers(&self, panel: usize) -> &'a [Outlier] {
        &self.outliers[self.before[panel] as usize..self.before[panel + 1] as usize]
    }

    /// Of some panels.
    #[inline(always)]
    pub fn groups(&self, panels: Range<usize>) -> &'a [Group] {
        &self.groups[panels.start * self.panel_groups..panels.end * self.panel_groups]
    }

    /// Opens the groups from `first` on of a panel, as many as `to` has room for. `outliers` are the panel's from that group on; those that are
    /// put in their places are taken away.
    #[inline(always)]
    pub fn open<S: Simd>(&self, s: S, panel: usize, first: usize, outliers: &mut &[Outlier], to: &mut [[u32; LANES]]) {
        let groups = &self.groups(panel..panel + 1)[first..];
        let (to, _) = to.as_chunks_mut::<GROUP_STEPS>();
        for (Group { codes, lowers: [first, second] }, to) in groups.iter().zip(&mut *to) {
            s.store_pairs(s.pairs_tight::<0>(codes, first, self.uppers), &mut to[0]);
            s.store_pairs(s.pairs_tight::<1>(codes, first, self.uppers), &mut to[1]);
            s.store_pairs(s.pairs_tight::<2>(codes, second, self.uppers), &mut to[2]);
            s.store_pairs(s.pairs_tight::<3>(codes, second, self.uppers), &mut to[3]);
        }
        let end = first + to.len();
        let pairs = to.as_flattened_mut().as_flattened_mut();
        while let Some((outlier, rest)) = outliers.split_first()
            && outlier.group() < end
        {
            pairs[outlier.at as usize - first * GROUP_STEPS * LANES] = outlier.pair;
            *outliers = rest;
        }
    }
}
