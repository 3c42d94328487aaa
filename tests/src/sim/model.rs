//! A model whose tokens are hashes: exact in f32, and anything lost, repeated, changed or added in another order shows in
//! the next token.
//!
//! A token's state is a chain over all tokens before it, kept in pages as latents are. Each layer hashes the row, chooses
//! experts by it and adds them up by rule 1(c), with operations for which the order matters.

use moesaic_dispatch::{CombineOps, Route};
use moesaic_proto::{ExpertId, LayerId};

pub const HIDDEN: usize = 3;
pub const LAYERS: [LayerId; 2] = [LayerId(1), LayerId(2)];
pub const EXPERTS: usize = 8;
pub const GROUPS: usize = 4;
pub const TOP_K: usize = 3;
pub const VOCABULARY: u64 = 50_000;

/// Values are whole numbers below it, so that sums of two products are exact in f64 and each value in f32.
const MODULUS: u64 = 1_000_003;

pub const OPS: CombineOps = CombineOps {
    first: |y, w, x| each(y, x, |_, x| number(w) * x),
    next: |y, w, x| each(y, x, |y, x| y * 31 + number(w) * x),
    add: |y, x| each(y, x, |y, x| y * 37 + x),
};

fn each(y: &mut [f32], x: &[f32], f: impl Fn(u64, u64) -> u64) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = value(f(number(*y), number(*x))));
}

fn number(value: f32) -> u64 {
    value as u64
}

fn value(number: u64) -> f32 {
    (number % MODULUS) as f32
}

/// A mixer of 64 bits (the finalizer of SplitMix64, Steele et al. 2014).
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

fn hash(numbers: &[u64]) -> u64 {
    numbers.iter().fold(0x9e37_79b9_7f4a_7c15, |hash, number| mix(hash ^ mix(number.wrapping_add(1))))
}

/// The state before the first token.
pub const START: u64 = 0;

/// The state after one more token.
pub fn chain(before: u64, token: u32) -> u64 {
    hash(&[before, u64::from(token)])
}

/// A row as the first layer gets it.
pub fn embed(chain: u64) -> Vec<f32> {
    (0..HIDDEN as u64).map(|i| value(hash(&[chain, i]))).collect()
}

/// The experts of a row, ascending.
pub fn gate(layer: LayerId, row: &[f32]) -> Vec<Route> {
    let row: u64 = row.iter().fold(u64::from(layer.0), |hash, value| mix(hash ^ number(*value)));
    let mut experts: Vec<u16> = (0..EXPERTS as u16).collect();
    experts.sort_unstable_by_key(|expert| hash(&[row, u64::from(*expert)]));
    experts.truncate(TOP_K);
    experts.sort_unstable();
    let weight = |expert: u16| (1 + hash(&[row, 7, u64::from(expert)]) % 97) as f32;
    experts.into_iter().map(|expert| Route { expert: ExpertId(expert), weight: weight(expert) }).collect()
}

/// What an expert makes of a row.
pub fn expert(layer: LayerId, expert: ExpertId, row: &[f32]) -> Vec<f32> {
    let of = hash(&[u64::from(layer.0), u64::from(expert.0)]);
    row.iter().map(|x| value(mix(of ^ number(*x)))).collect()
}

/// A row after a layer: the residual and its experts' sum.
pub fn residual(row: &mut [f32], sum: &[f32]) {
    each(row, sum, |row, sum| row * 41 + sum);
}

/// The token that a row draws.
pub fn draw(row: &[f32], seed: u64, position: usize) -> u32 {
    let row = row.iter().fold(seed, |hash, value| mix(hash ^ number(*value)));
    (hash(&[row, position as u64]) % VOCABULARY) as u32
}

/// The sum of a row's experts, by the definition.
pub fn sum(layer: LayerId, row: &[f32]) -> Vec<f32> {
    let routes = gate(layer, row);
    let group = |route: &Route| usize::from(route.expert.0) / EXPERTS.div_ceil(GROUPS);
    let mut total: Option<Vec<f32>> = None;
    for routes in routes.chunk_by(|a, b| group(a) == group(b)) {
        let mut sum = vec![0.0; HIDDEN];
        (OPS.first)(&mut sum, routes[0].weight, &expert(layer, routes[0].expert, row));
        for route in &routes[1..] {
            (OPS.next)(&mut sum, route.weight, &expert(layer, route.expert, row));
        }
        match &mut total {
            None => total = Some(sum),
            Some(total) => (OPS.add)(total, &sum),
        }
    }
    total.unwrap_or_default()
}

/// What must come out of a request.
pub fn golden(prompt: &[u32], seed: u64, tokens: usize) -> Vec<u32> {
    let mut state = prompt.iter().fold(START, |state, token| chain(state, *token));
    let mut emitted = Vec::with_capacity(tokens);
    for position in 0..tokens {
        let mut row = embed(state);
        for layer in LAYERS {
            let sum = sum(layer, &row);
            residual(&mut row, &sum);
        }
        let token = draw(&row, seed, position);
        emitted.push(token);
        state = chain(state, token);
    }
    emitted
}
