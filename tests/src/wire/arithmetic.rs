//! What the played engines compute. Experts are hashes of (layer, expert, row) in small integers, weighted by small
//! integers: f32 holds every sum exactly, in whatever order it is made. A token is a hash of the seed, of all tokens
//! before it and of what the experts answered for it, so one wrong bit anywhere changes the rest of the answer.

use moesaic_dispatch::{CombineOps, Route, Shape};
use moesaic_proto::{ExpertId, LayerId};

/// The model's own layers and experts (tiny-r1), of which a step passes two layers; rows are short.
pub const HIDDEN: usize = 4;
pub const EXPERTS: usize = 32;
pub const GROUPS: usize = 4;
pub const TOP_K: usize = 4;
pub const LAYERS: [LayerId; 2] = [LayerId(1), LayerId(3)];
pub const SHAPE: Shape = Shape { hidden: HIDDEN, experts: EXPERTS };

/// Tokens below are special, the model's end among them: no answer has one.
const SPECIAL: u64 = 3;
const VOCABULARY: u64 = 288;
const ROWS_MAX: u64 = 3;
/// Values and weights are below: a row's sum stays far below 2^24.
const VALUE_MAX: u64 = 4093;
const WEIGHT_MAX: u64 = 16;

fn first(y: &mut [f32], w: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = w * x);
}

fn next(y: &mut [f32], w: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = w.mul_add(*x, *y));
}

fn add(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

pub const OPS: CombineOps = CombineOps { first, next, add };

/// SplitMix64 of both.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn mix_values(state: u64, values: &[f32]) -> u64 {
    values.iter().fold(state, |state, value| mix(state, u64::from(value.to_bits())))
}

/// One expert of one row.
pub fn expert_row(layer: LayerId, expert: ExpertId, x: &[f32]) -> [f32; HIDDEN] {
    let mixed = mix_values(mix(u64::from(layer.0), u64::from(expert.0)), x);
    std::array::from_fn(|i| (mix(mixed, i as u64) % VALUE_MAX) as f32)
}

/// A layer call: rows, and each row's experts.
#[derive(Clone, Debug)]
pub struct Call {
    pub layer: LayerId,
    pub x: Vec<f32>,
    pub routes: Vec<Route>,
}

impl Call {
    /// Made from a number: few rows, different experts for each.
    pub fn of(layer: LayerId, number: u64) -> Self {
        let number = mix(number, u64::from(layer.0));
        let rows = 1 + number % ROWS_MAX;
        let value = |i: u64| (mix(number, i) % VALUE_MAX) as f32;
        let x = (0..rows * HIDDEN as u64).map(value).collect();
        Self { layer, x, routes: (0..rows).flat_map(|row| routes(mix(number, !row))).collect() }
    }

    pub fn rows(&self) -> usize {
        self.x.len() / HIDDEN
    }

    /// What must come back.
    pub fn expected(&self) -> Vec<f32> {
        let row = |(x, routes): (&[f32], &[Route])| {
            let mut y = [0.0; HIDDEN];
            routes.iter().for_each(|route| next(&mut y, route.weight, &expert_row(self.layer, route.expert, x)));
            y
        };
        self.x.chunks(HIDDEN).zip(self.routes.chunks(TOP_K)).flat_map(row).collect()
    }
}

/// Different experts, ascending.
fn routes(number: u64) -> Vec<Route> {
    let mut experts: Vec<u16> = (0..EXPERTS as u16).collect();
    experts.sort_by_cached_key(|expert| mix(number, u64::from(*expert)));
    experts.truncate(TOP_K);
    experts.sort_unstable();
    let weight = |expert: u16| (1 + mix(!number, u64::from(expert)) % (WEIGHT_MAX - 1)) as f32;
    experts.into_iter().map(|expert| Route { expert: ExpertId(expert), weight: weight(expert) }).collect()
}

/// Where a sequence stands: all that its next token depends on.
#[derive(Clone, Copy, Debug)]
pub struct State(u64);

impl State {
    pub fn new(seed: u64, tokens: &[u32]) -> Self {
        tokens.iter().fold(Self(mix(seed, 0)), |state, token| state.after(*token))
    }

    pub fn after(self, token: u32) -> Self {
        Self(mix(self.0, u64::from(token)))
    }

    /// The layer calls of the next token.
    pub fn calls(self) -> [Call; LAYERS.len()] {
        LAYERS.map(|layer| Call::of(layer, self.0))
    }

    /// The next token, by what came back.
    pub fn token(self, answers: &[Vec<f32>]) -> u32 {
        let drawn = answers.iter().fold(self.0, |state, y| mix_values(state, y));
        (SPECIAL + drawn % (VOCABULARY - SPECIAL)) as u32
    }
}

/// A whole answer, made without any network.
pub fn answer(prompt: &[u32], seed: u64, tokens: usize) -> Vec<u32> {
    let mut state = State::new(seed, prompt);
    let draw = |_| {
        let token = state.token(&state.calls().map(|call| call.expected()));
        state = state.after(token);
        token
    };
    (0..tokens).map(draw).collect()
}
