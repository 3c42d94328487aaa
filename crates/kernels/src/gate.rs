//! The gate: which experts a row goes to, with what weights.
//!
//! ```text
//! s = softmax(logits) over all experts, or sigmoid(logits)
//! c = s + bias                                              chooses only; weights are made of s
//! a group's score = max of its c, or the sum of its two largest; the best `groups_kept` groups keep their c, the others get `mask`
//! the `top_k` largest c; of equals the lower expert first; NaN counts as -infinity
//! w = s; normalize: w / (sum of chosen s + 1e-20); then w * scale
//! ```

use std::cell::Cell;

use crate::linear::with_scratch;
use crate::math::{load_part, sigmoid, store_part};
use crate::simd::{Isa, Kernel, LANES, Simd};
use crate::softmax::softmax_on;

/// How a logit becomes a score.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scoring {
    Sigmoid,
    Softmax,
}

/// How a group of experts is scored from its members.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GroupScore {
    Max,
    TopTwoSum,
}

/// `scale` is always applied. V3: `normalize` with its routed_scaling_factor. V2: its routed_scaling_factor without norm_topk_prob, 1 with it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GateParams {
    pub scoring: Scoring,
    /// Divides the number of experts; 1 where there are no groups.
    pub groups: usize,
    pub groups_kept: usize,
    pub top_k: usize,
    pub group_score: GroupScore,
    /// What choosing sees of experts in groups that were not kept: 0 in V2, negative infinity in V3.
    pub mask: f32,
    pub normalize: bool,
    pub scale: f32,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    pub expert: u16,
    pub weight: f32,
}

/// One row: pushes `top_k` choices (all experts if there are fewer), ascending by expert.
pub fn route(logits: &[f32], bias: Option<&[f32]>, p: &GateParams, out: &mut Vec<Choice>) {
    route_on(Isa::best(), logits, bias, p, out);
}

thread_local! {
    static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

pub(crate) fn route_on(isa: Isa, logits: &[f32], bias: Option<&[f32]>, p: &GateParams, out: &mut Vec<Choice>) {
    let experts = logits.len();
    assert!(p.groups > 0 && experts.is_multiple_of(p.groups), "{experts} experts in {} groups", p.groups);
    with_scratch(&SCORES, 2 * experts + p.groups, |scratch| {
        let (scores, rest) = scratch.split_at_mut(experts);
        let (keys, groups) = rest.split_at_mut(experts);
        scores.copy_from_slice(logits);
        match p.scoring {
            Scoring::Softmax => softmax_on(isa, scores),
            Scoring::Sigmoid => isa.run(Sigmoid { x: scores }),
        }
        for (i, (key, score)) in keys.iter_mut().zip(&*scores).enumerate() {
            *key = ordered(score + bias.map_or(0.0, |bias| bias[i]));
        }
        if p.groups_kept < p.groups {
            mask_groups(keys, groups, p);
        }
        choose(keys, scores, p, out);
    });
}

fn ordered(key: f32) -> f32 {
    if key.is_nan() { f32::NEG_INFINITY } else { key }
}

/// Replaces the keys of all groups but the best by the mask.
fn mask_groups(keys: &mut [f32], groups: &mut [f32], p: &GateParams) {
    let members = keys.len() / p.groups;
    if members == 0 {
        return;
    }
    for (group, keys) in groups.iter_mut().zip(keys.chunks_exact(members)) {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for key in keys {
            if *key > first {
                (first, second) = (*key, first);
            } else if *key > second {
                second = *key;
            }
        }
        *group = match p.group_score {
            GroupScore::TopTwoSum if members > 1 => ordered(first + second),
            _ => first,
        };
    }
    for (g, keys) in keys.chunks_exact_mut(members).enumerate() {
        let better =
            groups.iter().enumerate().filter(|(i, score)| **score > groups[g] || (**score == groups[g] && *i < g));
        if better.count() >= p.groups_kept {
            keys.fill(p.mask);
        }
    }
}

/// Keeps the best in `out`, best first, while going through the experts; then gives them their weights and their order.
fn choose(keys: &[f32], scores: &[f32], p: &GateParams, out: &mut Vec<Choice>) {
    let start = out.len();
    for (expert, key) in keys.iter().enumerate() {
        let full = out.len() - start == p.top_k;
        if full && out[start..].last().is_none_or(|last| last.weight >= *key) {
            continue;
        }
        if full {
            out.pop();
        }
        let after = out[start..].iter().take_while(|c| c.weight >= *key).count();
        out.insert(start + after, Choice { expert: expert as u16, weight: *key });
    }
    let chosen = &mut out[start..];
    chosen.sort_unstable_by_key(|c| c.expert);
    let mut sum = 0.0;
    for c in &mut *chosen {
        c.weight = scores[usize::from(c.expert)];
        sum += c.weight;
    }
    for c in chosen {
        let w = if p.normalize { c.weight / (sum + 1e-20) } else { c.weight };
        c.weight = w * p.scale;
    }
}

struct Sigmoid<'a> {
    x: &'a mut [f32],
}

impl Kernel for Sigmoid<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_mut(LANES) {
            store_part(s, sigmoid(s, load_part(s, x, 0.0)), x);
        }
    }
}

#[cfg(test)]
mod tests;
