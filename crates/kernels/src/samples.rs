//! Random inputs for tests, all of them made of one seed (so that proptest has shapes and a seed to shrink), and the comparisons that tests share.

use std::borrow::Cow;
use std::sync::OnceLock;

use half::{bf16, f16};
use proptest::prelude::*;

use crate::{Matrix, MatrixData, Numerics, Pool};

/// splitmix64.
pub(crate) struct Samples(u64);

impl Samples {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In -1..1, evenly.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Up to `magnitude`, and one in sixteen something special: a zero of either sign, a denormal, something small.
    pub fn value(&mut self, magnitude: f32) -> f32 {
        let x = self.unit();
        match self.below(64) {
            0 => 0.0,
            1 => -0.0,
            2 => x * f32::MIN_POSITIVE,
            3 => x * magnitude * 1e-6,
            _ => x * magnitude,
        }
    }

    pub fn values(&mut self, len: usize, magnitude: f32) -> Vec<f32> {
        (0..len).map(|_| self.value(magnitude)).collect()
    }

    /// Any bit pattern, or one of a number near 1, so that results are not NaN all the time.
    pub fn pattern(&mut self) -> f32 {
        let bits = self.bits();
        if bits >> 63 == 0 { f32::from_bits(bits as u32) } else { self.value(4.0) }
    }

    /// Values up to `magnitude` where the type of storage allows it; no NaN.
    pub fn matrix(&mut self, rows: usize, cols: usize, stored: Stored, magnitude: f32) -> StoredMatrix {
        let len = rows * cols;
        let mut scales = Vec::new();
        let values: Vec<u8> = match stored {
            Stored::F32 => self.values(len, magnitude).iter().flat_map(|x| x.to_le_bytes()).collect(),
            Stored::F16 => self.values(len, 1.0).iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Stored::Bf16 => self.values(len, magnitude).iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Stored::Fp8(block) => {
                scales = self.values(rows.div_ceil(block[0]) * cols.div_ceil(block[1]), magnitude / 448.0);
                (0..len).map(|_| (self.below(0x7f) | self.below(2) << 7) as u8).collect()
            }
        };
        // One byte in front, so that nothing may count on alignment.
        let bytes = [&[0], &values[..]].concat();
        StoredMatrix { rows, cols, stored, bytes, scales }
    }
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
    /// In blocks of [rows, cols].
    Fp8([usize; 2]),
}

pub(crate) fn any_stored() -> impl Strategy<Value = Stored> {
    let block = prop_oneof![2 => Just([128, 128]), 1 => [1..40usize, 1..40usize]];
    prop_oneof![Just(Stored::F32), Just(Stored::F16), Just(Stored::Bf16), block.prop_map(Stored::Fp8)]
}

/// Of ordinary values, of such whose products are about the smallest normal number, of such whose products may overflow.
pub(crate) fn any_magnitude() -> impl Strategy<Value = f32> {
    prop_oneof![4 => Just(1.0f32), 2 => Just(1e-19), 1 => Just(3e18)]
}

#[derive(Clone, Debug)]
pub(crate) struct StoredMatrix {
    pub rows: usize,
    pub cols: usize,
    stored: Stored,
    bytes: Vec<u8>,
    scales: Vec<f32>,
}

impl StoredMatrix {
    pub fn matrix(&self) -> Matrix<'_> {
        let bytes = &self.bytes[1..];
        let data = match self.stored {
            Stored::F32 => MatrixData::F32(bytes),
            Stored::F16 => MatrixData::F16(bytes),
            Stored::Bf16 => MatrixData::Bf16(bytes),
            Stored::Fp8(block) => MatrixData::Fp8 { q: bytes, scales: Cow::Borrowed(&self.scales), block },
        };
        Matrix { rows: self.rows, cols: self.cols, data }
    }

    /// The stored bytes, to be spoiled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[1..]
    }
}

/// Pools of one, two and three threads; kept, so that their threads' scratches have been used before.
pub(crate) fn pools() -> &'static [Pool; 3] {
    static POOLS: OnceLock<[Pool; 3]> = OnceLock::new();
    POOLS.get_or_init(|| [Pool::new(1), Pool::new(2), Pool::new(3)])
}

/// `check`s every numerics on every instruction set against what is `expected` under its name.
pub(crate) fn on_all_numerics<T>(expected: impl Fn(Numerics) -> T, check: impl Fn(Numerics, &T)) {
    for name in ["f32", "bf16-fma", "bf16-dp", "int8"] {
        let same: Vec<Numerics> = Numerics::all().into_iter().filter(|n| n.name() == name).collect();
        let expected = expected(same[0]);
        same.into_iter().for_each(|n| check(n, &expected));
    }
}

/// Bit by bit, but that a NaN is as good as another: payloads are nobody's promise.
#[track_caller]
pub(crate) fn assert_bits(got: &[f32], expected: &[f32], what: std::fmt::Arguments<'_>) {
    assert_eq!(got.len(), expected.len(), "values, {what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
        assert!(same, "value {i}: {got:e} and not {expected:e}, {what}");
    }
}
