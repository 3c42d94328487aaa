//! Every operation as plain loops, as the heads of their modules state the formulas: no lanes, no tiles, no threads. What tests compare bits with.

use half::bf16;

use crate::math::{EXP_RANGE, EXP_ZERO_BELOW, LN2_HIGH, LN2_LOW, LOG2_E, TAYLOR};
use crate::{Choice, Dtype, GateParams, GroupScore, Matrix, MatrixData, Numerics, PAGE_TOKENS, Scoring, e4m3_to_f32};

/// One row of x: [cols] to [rows of the matrix].
pub(crate) fn linear(m: &Matrix<'_>, n: Numerics, x: &[f32]) -> Vec<f32> {
    if n.quantises() {
        return quantised_linear(m, x);
    }
    let x: Vec<f32> = x.iter().map(|x| rounded(n.activations(), *x)).collect();
    (0..m.rows).map(|o| linear_output(m, n, o, &x)).collect()
}

fn linear_output(m: &Matrix<'_>, n: Numerics, o: usize, x: &[f32]) -> f32 {
    let by_pairs = n.name() == "bf16-dp";
    let MatrixData::Fp8 { q, scales, block } = &m.data else {
        let mut w = vec![0.0; m.cols];
        m.row_to_f32(o, &mut w);
        w.iter_mut().for_each(|w| *w = rounded(n.dtype(), *w));
        return chain(by_pairs, x, &w);
    };
    let by_pairs = by_pairs && block[1] % 2 == 0;
    let codes = q[o * m.cols..][..m.cols].chunks(block[1]);
    let scales = &scales[o / block[0] * m.cols.div_ceil(block[1])..];
    let mut acc = 0.0;
    for ((codes, x), scale) in codes.zip(x.chunks(block[1])).zip(scales) {
        let w: Vec<f32> = codes.iter().map(|code| e4m3_to_f32(*code)).collect();
        acc = chain(by_pairs, x, &w).mul_add(*scale, acc);
    }
    acc
}

/// The same in blocks of INT8.
fn quantised_linear(m: &Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let x: Vec<_> = x.chunks(128).map(quantised).collect();
    let output = |o: usize| {
        let mut w = vec![0.0; m.cols];
        m.row_to_f32(o, &mut w);
        w.chunks(128).map(quantised).zip(&x).fold(0.0, |acc, ((w, w_scale), (x, x_scale))| {
            let sum: i32 = w.iter().zip(x).map(|(w, x)| w * x).sum();
            (sum as f32 * x_scale).mul_add(w_scale, acc)
        })
    };
    (0..m.rows).map(output).collect()
}

/// The codes of a block, and its scale.
fn quantised(block: &[f32]) -> (Vec<i32>, f32) {
    let max =
        if block.iter().any(|x| x.is_nan()) { f32::NAN } else { block.iter().fold(0.0, |max, x| x.abs().max(max)) };
    let code = |x: &f32| match 127.0 / max {
        factor if factor > 0.0 && factor < f32::INFINITY => (x * factor).round_ties_even() as i32,
        _ => 0,
    };
    (block.iter().map(code).collect(), max / 127.0)
}

/// What an operand of a linear becomes first.
fn rounded(to: Dtype, x: f32) -> f32 {
    match to {
        Dtype::F32 => x,
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// Products added up from zero, k ascending.
fn chain(by_pairs: bool, x: &[f32], w: &[f32]) -> f32 {
    let terms = x.iter().zip(w);
    if !by_pairs {
        return terms.fold(0.0, |acc, (x, w)| x.mul_add(*w, acc));
    }
    let acc = terms.fold(0.0, |acc, (x, w)| flushing_step(*x, *w, acc));
    // The pair of an odd end has a zero: it makes a zero of a negative one.
    if x.len() % 2 == 1 { flushing_step(0.0, 0.0, acc) } else { acc }
}

/// One half of `Simd::dot_pairs`, for bf16 x and w. In f64 the sum is exact where it is about the smallest normal number, which it is rounded up to
/// (not flushed) from half a step of 24 bits below.
pub(crate) fn flushing_step(x: f32, w: f32, acc: f32) -> f32 {
    let (x, w, acc) = (flush(x), flush(w), flush(acc));
    let wide = f64::from(x).mul_add(f64::from(w), f64::from(acc));
    let half_a_step = 2f64.powi(-151);
    let sum = x.mul_add(w, acc);
    if wide.abs() < f64::from(f32::MIN_POSITIVE) - half_a_step { 0f32.copysign(sum) } else { sum }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// One row through gate, up and down.
pub(crate) fn ffn([gate, up, down]: &[Matrix<'_>; 3], n: Numerics, x: &[f32]) -> Vec<f32> {
    let up = linear(up, n, x);
    let h: Vec<f32> = linear(gate, n, x).iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect();
    linear(down, n, &h)
}

pub(crate) fn exp(x: f32) -> f32 {
    if x < EXP_ZERO_BELOW {
        return 0.0;
    }
    let x = if x > EXP_RANGE[1] { EXP_RANGE[1] } else { x };
    let n = (x * LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = TAYLOR.iter().fold(0.0f32, |p, c| p.mul_add(r, *c));
    (p + p) * 2f32.powi(n as i32 - 1)
}

pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = sum_by_16(x, |x, sum| x.mul_add(x, sum)) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * factor * w).collect()
}

pub(crate) fn softmax(x: &[f32]) -> Vec<f32> {
    let (e, sum) = exponentials(x);
    e.iter().map(|e| e / sum).collect()
}

pub(crate) fn log_softmax(x: &[f32]) -> Vec<f32> {
    let log_sum = crate::softmax::ln(exponentials(x).1);
    x.iter().map(|v| (v - largest(x)) - log_sum).collect()
}

fn exponentials(x: &[f32]) -> (Vec<f32>, f32) {
    let e: Vec<f32> = x.iter().map(|v| exp(v - largest(x))).collect();
    let sum = sum_by_16(&e, |e, sum| sum + e);
    (e, sum)
}

fn largest(x: &[f32]) -> f32 {
    x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Value i goes into sum i % 16, ascending; then the sums are added up, halves onto halves.
fn sum_by_16(x: &[f32], into: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0; 16];
    for (i, x) in x.iter().enumerate() {
        sums[i % 16] = into(*x, sums[i % 16]);
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

pub(crate) fn route(logits: &[f32], bias: Option<&[f32]>, p: &GateParams) -> Vec<Choice> {
    let scores: Vec<f32> = match p.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::Sigmoid => logits.iter().map(|x| sigmoid(*x)).collect(),
    };
    let biased = |(i, score): (usize, &f32)| nan_is_last(score + bias.map_or(0.0, |bias| bias[i]));
    let mut keys: Vec<f32> = scores.iter().enumerate().map(biased).collect();
    if p.groups_kept < p.groups {
        let members = keys.len() / p.groups;
        let groups: Vec<f32> = keys.chunks(members).map(|keys| group_score(keys, p.group_score)).collect();
        let kept = best(&groups, p.groups_kept);
        let lost = (0..keys.len()).filter(|expert| !kept.contains(&(expert / members)));
        lost.for_each(|expert| keys[expert] = p.mask);
    }
    let mut chosen = best(&keys, p.top_k);
    chosen.sort_unstable();
    let sum = chosen.iter().fold(0.0, |sum, expert| sum + scores[*expert]);
    let weight = |score: f32| if p.normalize { score / (sum + 1e-20) * p.scale } else { score * p.scale };
    chosen.iter().map(|expert| Choice { expert: *expert as u16, weight: weight(scores[*expert]) }).collect()
}

fn nan_is_last(key: f32) -> f32 {
    if key.is_nan() { f32::NEG_INFINITY } else { key }
}

fn group_score(keys: &[f32], by: GroupScore) -> f32 {
    let order = best(keys, 2);
    match (by, &order[..]) {
        (GroupScore::TopTwoSum, [first, second]) => nan_is_last(keys[*first] + keys[*second]),
        _ => keys[order[0]],
    }
}

/// The places of the `count` largest, of equals the lower place first.
fn best(keys: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..keys.len()).collect();
    places.sort_by(|a, b| keys[*b].partial_cmp(&keys[*a]).unwrap());
    places.truncate(count);
    places
}

/// Rotates the pairs of one head by [(cos, sin)].
pub(crate) fn rotate(turns: &[[f32; 2]], head: &[f32]) -> Vec<f32> {
    let pair = |(x, [cos, sin]): (&[f32], &[f32; 2])| {
        let (a, b) = (x[0], x[1]);
        [a.mul_add(*cos, b * -sin), b.mul_add(*cos, a * sin)]
    };
    head.chunks_exact(2).zip(turns).flat_map(pair).collect()
}

/// One head of one query over the tokens of its context, each [latent + rope] as the cache keeps it.
pub(crate) fn attend(n: Numerics, q: &[f32], tokens: &[Vec<f32>], latent: usize, scale: f32) -> Vec<f32> {
    if n.name() == "bf16-dp" && q.len().is_multiple_of(2) {
        return attend_by_pairs(n, q, tokens, latent, scale);
    }
    let (mut max, mut sum, mut o) = (f32::NEG_INFINITY, 0.0f32, vec![0.0; latent]);
    for page in tokens.chunks(PAGE_TOKENS) {
        let scores: Vec<f32> = page.iter().map(|kv| scale * chain(false, q, kv)).collect();
        let new = scores.iter().copied().fold(max, f32::max);
        let factor = exp(max - new);
        let p: Vec<f32> = scores.iter().map(|s| exp(s - new)).collect();
        sum = sum.mul_add(factor, p.iter().fold(0.0, |sum, p| sum + p));
        for (d, o) in o.iter_mut().enumerate() {
            *o = page.iter().zip(&p).fold(*o * factor, |acc, (kv, p)| p.mul_add(kv[d], acc));
        }
        max = new;
    }
    o.iter().map(|o| o * (1.0 / sum)).collect()
}

/// One head of one query in the expanded form, over the tokens of its context; `key` is [nope, latent], `value` [v, latent].
pub(crate) fn attend_expanded(
    n: Numerics,
    q: &[f32],
    tokens: &[Vec<f32>],
    [key, value]: [&Matrix<'_>; 2],
    scale: f32,
) -> Vec<f32> {
    let by_pairs = n.name() == "bf16-dp";
    let operands = |x: Vec<f32>| if by_pairs { x.iter().map(|x| rounded(n.activations(), *x)).collect() } else { x };
    let step = |x: f32, w: f32, acc: f32| if by_pairs { flushing_step(x, w, acc) } else { x.mul_add(w, acc) };
    let q: Vec<f32> = q.iter().map(|q| rounded(n.activations(), *q)).collect();
    let keys = tokens.iter().map(|kv| [&linear(key, n, &kv[..key.cols])[..], &kv[key.cols..]].concat());
    let keys: Vec<Vec<f32>> = keys.map(operands).collect();
    let values: Vec<Vec<f32>> = tokens.iter().map(|kv| operands(linear(value, n, &kv[..key.cols]))).collect();
    let (mut max, mut sum, mut o) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; value.rows]);
    for (keys, values) in keys.chunks(PAGE_TOKENS).zip(values.chunks(PAGE_TOKENS)) {
        let scores: Vec<f32> = keys.iter().map(|k| scale * chain(by_pairs, &q, k)).collect();
        let new = scores.iter().copied().fold(max, f32::max);
        let factor = exp(max - new);
        let p = operands(scores.iter().map(|s| exp(s - new)).collect());
        sum = sum.mul_add(factor, sum_by_16(&p, |p, sum| sum + p));
        for (d, o) in o.iter_mut().enumerate() {
            *o = p.iter().zip(values).fold(o.mul_add(factor, 0.0), |acc, (p, v)| step(*p, v[d], acc));
        }
        max = new;
    }
    o.iter().map(|o| o * (1.0 / sum)).collect()
}

fn attend_by_pairs(n: Numerics, q: &[f32], tokens: &[Vec<f32>], latent: usize, scale: f32) -> Vec<f32> {
    let odd_first = |x: &[f32]| x.chunks(2).flat_map(|x| [x[1], x[0]]).collect::<Vec<f32>>();
    let q: Vec<f32> = odd_first(q).iter().map(|q| rounded(n.activations(), *q)).collect();
    let (mut max, mut sum, mut o) = (f32::NEG_INFINITY, 0.0f32, vec![0.0; latent]);
    for page in tokens.chunks(PAGE_TOKENS) {
        let scores: Vec<f32> = page.iter().map(|kv| scale * chain(true, &odd_first(kv), &q)).collect();
        let new = scores.iter().copied().fold(max, f32::max);
        let factor = exp(max - new);
        let mut p: Vec<f32> = scores.iter().map(|s| rounded(n.activations(), exp(s - new))).collect();
        sum = sum.mul_add(factor, p.iter().fold(0.0, |sum, p| sum + p));
        p.resize(p.len().next_multiple_of(2), 0.0);
        for (d, o) in o.iter_mut().enumerate() {
            let value = |t: usize| page.get(t).map_or(0.0, |kv| kv[d]);
            *o = (0..p.len()).fold(*o * factor, |acc, t| flushing_step(value(t), p[t], acc));
        }
        max = new;
    }
    o.iter().map(|o| o * (1.0 / sum)).collect()
}
