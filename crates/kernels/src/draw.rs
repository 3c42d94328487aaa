//! The next token of a row of logits. The order is: edits, temperature, top-k, top-p, min-p, draw.
//!
//! Probabilities are whole numbers, so that their sums are the same in any order and on any processor; `cuda/draw.cu` draws the
//! same tokens from the same logits.
//! ```text
//! w = floor(2^40 exp((x - max x) / temperature))
//! order: the larger x first, of equals the lower token; a logit that is not a number is the lowest
//! top-k: the first k are kept
//! top-p: of those, with a sum of W, as few of the first as sum up to floor(p W) at least
//! min-p: of those, the ones with w >= floor(p 2^40)
//! draw:  of those, with a sum of W, by ascending token, the first up to which the sum exceeds floor(u W)
//! ```

use std::cell::Cell;

use bytemuck::{Pod, Zeroable};

use crate::linear::with_scratch;
use crate::simd::Isa;
use crate::softmax::{exponentials, largest};

/// What is done to one logit first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Edit {
    pub token: u32,
    /// Added.
    pub bias: f32,
    /// Then a logit above 0 is divided by this, and others are multiplied.
    pub repetition: f32,
    /// Then subtracted.
    pub penalty: f32,
}

impl Edit {
    /// Changes nothing.
    pub fn none(token: u32) -> Self {
        Self { token, bias: 0.0, repetition: 1.0, penalty: 0.0 }
    }

    fn of(&self, logit: f32) -> f32 {
        let logit = logit + self.bias;
        let logit = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
        logit - self.penalty
    }
}

/// How a token is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// 0: the first in order.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    pub min_p: f32,
    /// u, as a share of 2^64.
    pub random: u64,
    /// Of tokens of the vocabulary, each once at most.
    pub edits: Vec<Edit>,
}

/// 2^40: the likeliest token's.
const WEIGHT_MAX: f32 = (1u64 << 40) as f32;

impl Draw {
    /// p of top-p, as a share of 2^64, if it takes anything away.
    pub(crate) fn nucleus(&self) -> Option<u64> {
        (self.top_p < 1.0).then(|| (f64::from(self.top_p) * 2f64.powi(64)) as u64)
    }

    /// The least weight that min-p keeps.
    pub(crate) fn least(&self) -> u64 {
        (f64::from(self.min_p) * f64::from(WEIGHT_MAX)) as u64
    }
}

thread_local! {
    static EDITED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static EXPS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Draws a token; there has to be one.
pub fn draw(logits: &[f32], draw: &Draw) -> u32 {
    with_scratch(&EDITED, logits.len(), |x| {
        for (to, x) in x.iter_mut().zip(logits) {
            *to = if x.is_nan() { f32::NEG_INFINITY } else { *x };
        }
        for edit in &draw.edits {
            let x = &mut x[edit.token as usize];
            *x = edit.of(*x);
        }
        let largest = largest(Isa::best(), x);
        if draw.temperature == 0.0 || !largest.is_finite() {
            return first(x, largest);
        }
        with_scratch(&EXPS, x.len(), |exps| {
            exps.iter_mut().zip(&*x).for_each(|(to, x)| *to = (x - largest) / draw.temperature);
            exponentials(exps);
            draw_of(x, exps, draw)
        })
    })
}

/// `exps` are exp((x - max x) / temperature).
fn draw_of(x: &[f32], exps: &[f32], draw: &Draw) -> u32 {
    // SAFETY: exp of what is not above 0 is at most 1, and a number.
    let weight = |token: u32| unsafe { (exps[token as usize] * WEIGHT_MAX).to_int_unchecked::<i64>() } as u64;
    if draw.top_k == 0 && draw.nucleus().is_none() && draw.min_p == 0.0 {
        return pick(0..x.len() as u32, weight, draw.random);
    }
    pick(keep(x, weight, draw).into_iter(), weight, draw.random)
}

/// The first token of this value.
fn first(x: &[f32], value: f32) -> u32 {
    const SOME: usize = 64;
    // Some at a time, without looking which.
    let has_it = |some: &[f32]| some.iter().fold(false, |found, x| found | (*x == value));
    let some = x.chunks(SOME).position(has_it).map_or(0, |chunk| chunk * SOME);
    x[some..].iter().position(|x| *x == value).map_or(0, |i| (some + i) as u32)
}

/// The tokens that top-k, top-p and min-p keep, ascending: one at least.
fn keep(x: &[f32], weight: impl Fn(u32) -> u64, draw: &Draw) -> Vec<u32> {
    let mut tokens: Vec<(u32, f32)> = (0..).zip(x.iter().copied()).collect();
    if draw.top_k > 0 {
        let kept = best_first(&mut tokens, draw.top_k).len();
        tokens.truncate(kept);
    }
    if let Some(share) = draw.nucleus() {
        let total = tokens.iter().map(|&(token, _)| weight(token)).sum();
        let kept = nucleus(&mut tokens, &weight, product_high(total, share));
        tokens.truncate(kept);
    }
    let mut kept: Vec<u32> = tokens.into_iter().map(|(token, _)| token).collect();
    kept.retain(|token| weight(*token) >= draw.least());
    kept.sort_unstable();
    kept
}

/// How many of the first, which are put first, sum up to `need`, which is not more than all do.
fn nucleus(tokens: &mut [(u32, f32)], weight: impl Fn(u32) -> u64, need: u64) -> usize {
    // Mostly few are enough: not all are put in order.
    const FIRST: usize = 64;
    let mut sorted = FIRST;
    loop {
        let mut sum = 0;
        let is_last = |&(token, _): &(u32, f32)| {
            sum += weight(token);
            sum >= need
        };
        match best_first(tokens, sorted).iter().position(is_last) {
            Some(last) => return last + 1,
            None if sorted >= tokens.len() => return tokens.len(),
            None => sorted *= 8,
        }
    }
}

/// The token at u of the total weight.
fn pick(tokens: impl Iterator<Item = u32> + Clone, weight: impl Fn(u32) -> u64, u: u64) -> u32 {
    let target = product_high(tokens.clone().map(&weight).sum(), u);
    let mut sum = 0;
    let is_at = |token: &u32| {
        sum += weight(*token);
        sum > target
    };
    tokens.into_iter().find(is_at).expect("the first in order is kept, and weighs something")
}

/// floor(a b / 2^64)
fn product_high(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// The first `count` tokens in order (a larger value first, of equals the lower token), as the slice's head.
pub fn best_first(tokens: &mut [(u32, f32)], count: usize) -> &[(u32, f32)] {
    // Adding 0 makes both zeros equal.
    let key = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x + 0.0 };
    let order = |a: &(u32, f32), b: &(u32, f32)| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0));
    let count = count.min(tokens.len());
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count, order);
    }
    let head = &mut tokens[..count];
    head.sort_unstable_by(order);
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::Samples;

    /// By the rule, word for word.
    fn plain(logits: &[f32], draw: &Draw) -> u32 {
        let mut x: Vec<f32> = logits.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x }).collect();
        for edit in &draw.edits {
            x[edit.token as usize] = edit.of(x[edit.token as usize]);
        }
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(|a, b| x[*b].partial_cmp(&x[*a]).unwrap().then(a.cmp(b)));
        let largest = x[order[0]];
        if draw.temperature == 0.0 || !largest.is_finite() {
            return order[0] as u32;
        }
        let mut exps: Vec<f32> = x.iter().map(|x| (x - largest) / draw.temperature).collect();
        exponentials(&mut exps);
        let w = |token: usize| u128::from((f64::from(exps[token]) * 2f64.powi(40)) as u64);
        let total = |tokens: &[usize]| tokens.iter().map(|token| w(*token)).sum::<u128>();
        if draw.top_k > 0 {
            order.truncate(draw.top_k);
        }
        if draw.top_p < 1.0 {
            let need = (total(&order) * (f64::from(draw.top_p) * 2f64.powi(64)) as u128) >> 64;
            let enough = (1..=order.len()).find(|count| total(&order[..*count]) >= need).unwrap();
            order.truncate(enough);
        }
        order.retain(|token| w(*token) >= (f64::from(draw.min_p) * 2f64.powi(40)) as u128);
        order.sort_unstable();
        let target = (total(&order) * u128::from(draw.random)) >> 64;
        let at = (1..=order.len()).find(|count| total(&order[..*count]) > target).unwrap();
        order[at - 1] as u32
    }

    #[test]
    fn equals_the_rule() {
        let mut s = Samples::new(7);
        for case in 0..3000 {
            // Few values, so that there are many equals.
            let spread = [1.0, 8.0, 100.0][case % 3];
            let len = 1 + s.below(300);
            let mut x = s.values(len, spread);
            x.iter_mut().filter(|_| case % 2 == 0).for_each(|x| *x = x.round());
            if case % 7 == 0 {
                x[s.below(len)] = f32::NAN;
                x[s.below(len)] = f32::NEG_INFINITY;
            }
            let draw_of = Draw {
                temperature: [0.0, 0.1, 1.0, 1.7][s.below(4)],
                top_k: [0, 1, 5, 1000][s.below(4)],
                top_p: [1.0, 0.0, 0.3, 0.95][s.below(4)],
                min_p: [0.0, 0.05, 1.0][s.below(3)],
                random: [0, u64::MAX, s.below(usize::MAX) as u64][s.below(3)],
                edits: (0..len as u32)
                    .step_by(3)
                    .map(|token| Edit { token, bias: 1.5, repetition: 1.25, penalty: 0.5 })
                    .collect(),
            };
            assert_eq!(draw(&x, &draw_of), plain(&x, &draw_of), "{x:?} {draw_of:?}");
        }
    }
}
