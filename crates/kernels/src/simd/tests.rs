//! Every operation of every instruction set against its definition on one lane.

use proptest::prelude::*;

use super::*;
use crate::e4m3_to_f32;
use crate::reference::flushing_step;
use crate::samples::{Samples, assert_bits};

type F = [f32; LANES];

/// All operations of f32 lanes.
struct Elementwise {
    a: F,
    b: F,
    c: F,
}

impl Kernel for Elementwise {
    type Out = [(&'static str, F); 11];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let (a, b, c) = (s.load(&self.a), s.load(&self.b), s.load(&self.c));
        let results = [
            ("splat", s.splat(self.a[3])),
            ("add", s.add(a, b)),
            ("sub", s.sub(a, b)),
            ("mul", s.mul(a, b)),
            ("div", s.div(a, b)),
            ("fma", s.fma(a, b, c)),
            ("max", s.max(a, b)),
            ("min", s.min(a, b)),
            ("zero_below", s.zero_below(a, b, c)),
            ("round", s.round(a)),
            ("swap_pairs", s.swap_pairs(a)),
        ];
        results.map(|(name, v)| (name, stored(s, v)))
    }
}

#[inline(always)]
fn stored<S: Simd>(s: S, v: S::F) -> F {
    let mut to = [0.0; LANES];
    s.store(v, &mut to);
    to
}

/// What they mean.
fn elementwise(a: F, b: F, c: F) -> [F; 11] {
    let each = |f: &dyn Fn(usize) -> f32| -> F { std::array::from_fn(f) };
    [
        each(&|_| a[3]),
        each(&|i| a[i] + b[i]),
        each(&|i| a[i] - b[i]),
        each(&|i| a[i] * b[i]),
        each(&|i| a[i] / b[i]),
        each(&|i| a[i].mul_add(b[i], c[i])),
        each(&|i| if a[i] > b[i] { a[i] } else { b[i] }),
        each(&|i| if a[i] < b[i] { a[i] } else { b[i] }),
        each(&|i| if a[i] < b[i] { 0.0 } else { c[i] }),
        each(&|i| a[i].round_ties_even()),
        each(&|i| a[i ^ 1]),
    ]
}

fn check_elementwise(a: F, b: F, c: F) {
    let expected = elementwise(a, b, c);
    for isa in Isa::available() {
        for ((name, got), expected) in isa.run(Elementwise { a, b, c }).iter().zip(&expected) {
            assert_bits(got, expected, format_args!("{name} on {isa:?} of {a:?}, {b:?}, {c:?}"));
        }
    }
}

/// a * 2^n
struct Scale {
    a: F,
    n: F,
}

impl Kernel for Scale {
    type Out = F;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> F {
        stored(s, s.scale(s.load(&self.a), s.load(&self.n)))
    }
}

/// Widened halves of pairs of bf16.
struct HalvesBf16([u32; LANES]);

impl Kernel for HalvesBf16 {
    type Out = [F; 2];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [F; 2] {
        s.halves(s.pairs_bf16(&self.0)).map(|half| stored(s, half))
    }
}

/// Widened halves of both vectors of pairs of e4m3.
struct HalvesE4m3(Line);

impl Kernel for HalvesE4m3 {
    type Out = [[F; 2]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [[F; 2]; 2] {
        [s.pairs_e4m3::<0>(&self.0), s.pairs_e4m3::<1>(&self.0)].map(|v| s.halves(v).map(|half| stored(s, half)))
    }
}

/// A step with weights as pairs of bf16.
struct DotBf16 {
    x: u32,
    w: [u32; LANES],
    acc: F,
}

impl Kernel for DotBf16 {
    type Out = F;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> F {
        stored(s, s.dot_pairs(self.x, s.pairs_bf16(&self.w), s.load(&self.acc)))
    }
}

/// A step with weights as pairs of e4m3.
struct DotE4m3 {
    x: u32,
    w: [u8; 2 * LANES],
    acc: F,
}

impl Kernel for DotE4m3 {
    /// With the weights as the first and as the second of two vectors.
    type Out = [F; 2];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [F; 2] {
        let Self { x, w, acc } = self;
        let (mut first, mut second) = ([0x55; 64], [0x55; 64]);
        for (i, w) in w.into_iter().enumerate() {
            (first[interleaved::<0>(i)], second[interleaved::<1>(i)]) = (w, w);
        }
        [s.pairs_e4m3::<0>(&first), s.pairs_e4m3::<1>(&second)].map(|w| stored(s, s.dot_pairs(x, w, s.load(&acc))))
    }
}

/// A step of quads, and what it adds up to.
struct DotQuads {
    x: u32,
    w: [u32; LANES],
    acc: F,
}

impl Kernel for DotQuads {
    type Out = F;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> F {
        stored(s, s.integers(s.dot_quads(self.x, s.quads(&self.w), s.load(&self.acc))))
    }
}

fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

/// The formula at [`Simd::dot_pairs`].
fn dot(x: u32, w: u32, acc: f32) -> f32 {
    flushing_step(low(x), low(w), flushing_step(high(x), high(w), acc))
}

fn check_dot(x: u32, w: [u32; LANES], acc: F) {
    let expected: F = std::array::from_fn(|i| dot(x, w[i], acc[i]));
    for isa in Isa::available() {
        let what = format_args!("{isa:?}, x {x:#x}, w {w:x?}, acc {acc:?}");
        assert_bits(&isa.run(DotBf16 { x, w, acc }), &expected, what);
    }
}

fn lanes(mut f: impl FnMut() -> f32) -> F {
    std::array::from_fn(|_| f())
}

/// A pair of bf16 whose exponents are such that a product of two is near the smallest normal number.
fn small_pair(s: &mut Samples) -> u32 {
    let mut half = || s.bits() as u32 & 0x807f | (54 + s.below(20) as u32) << 7;
    half() << 16 | half()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn operations_mean_the_same_everywhere(seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        for _ in 0..20 {
            check_elementwise(lanes(|| s.pattern()), lanes(|| s.pattern()), lanes(|| s.pattern()));
        }
    }

    #[test]
    fn quads_are_added_up_exactly(seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        let mut byte = || if s.below(4) == 0 { [0, 1, 128, 255][s.below(4)] } else { s.bits() as u8 };
        let w: [[u8; 4]; LANES] = std::array::from_fn(|_| std::array::from_fn(|_| byte()));
        let x: [i8; 4] = std::array::from_fn(|_| (byte() as i8).max(-127));
        let acc: [i32; LANES] = std::array::from_fn(|_| s.below(1 << 22) as i32 - (1 << 21));
        let expected: F = std::array::from_fn(|i| {
            let products = w[i].iter().zip(&x).map(|(w, x)| i32::from(*w) * i32::from(*x));
            (acc[i] + products.sum::<i32>()) as f32
        });
        let quad = u32::from_le_bytes(x.map(|x| x as u8));
        for isa in Isa::available() {
            let acc = acc.map(|acc| f32::from_bits(acc as u32));
            let got = isa.run(DotQuads { x: quad, w: w.map(u32::from_le_bytes), acc });
            assert_bits(&got, &expected, format_args!("{isa:?}, x {x:?}, w {w:?}"));
        }
    }

    #[test]
    fn scales_by_powers_of_two(seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        let n: F = lanes(|| s.below(254) as f32 - 126.0);
        let a = lanes(|| s.pattern());
        let expected: F = std::array::from_fn(|i| a[i] * 2f32.powi(n[i] as i32));
        for isa in Isa::available() {
            assert_bits(&isa.run(Scale { a, n }), &expected, format_args!("{isa:?} of {a:?}, {n:?}"));
        }
    }

    #[test]
    fn dot_of_any_pairs(seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        for _ in 0..100 {
            let w = std::array::from_fn(|_| s.bits() as u32);
            check_dot(s.bits() as u32, w, lanes(|| s.pattern()));
        }
    }

    /// Products and sums on both sides of the smallest normal number, where flushing shows.
    #[test]
    fn dot_of_small_pairs(seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        for _ in 0..100 {
            let w = std::array::from_fn(|_| small_pair(&mut s));
            let acc = lanes(|| f32::from_bits(s.bits() as u32 & 0x81ff_ffff));
            check_dot(small_pair(&mut s), w, acc);
        }
    }

    /// Sums that round up to the smallest normal number, or just do not.
    #[test]
    fn dot_next_to_the_smallest_normal(seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        for _ in 0..100 {
            let half = |s: &mut Samples, exponent: u32| s.bits() as u32 & 0x807f | exponent << 7;
            // The product of the halves that are not zero is between 2^-153 and 2^-147.
            let exponent = 40 + s.below(30) as u32;
            let shift = 16 * s.below(2) as u32;
            let x = half(&mut s, exponent) << shift;
            let w = std::array::from_fn(|_| { let e = 102 + s.below(4) as u32 - exponent; half(&mut s, e) } << shift);
            let acc = lanes(|| f32::from_bits((0x80_0000 - 2 + s.below(5) as u32) | s.bits() as u32 & 0x8000_0000));
            check_dot(x, w, acc);
        }
    }

    #[test]
    fn dot_with_e4m3(x in any::<u32>(), seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        let w: [u8; 2 * LANES] = std::array::from_fn(|_| s.bits() as u8);
        let acc = lanes(|| s.pattern());
        let value = |i: usize| e4m3_to_f32(w[i]);
        let expected: F = std::array::from_fn(|i| {
            flushing_step(low(x), value(2 * i), flushing_step(high(x), value(2 * i + 1), acc[i]))
        });
        for isa in Isa::available() {
            for got in isa.run(DotE4m3 { x, w, acc }) {
                assert_bits(&got, &expected, format_args!("{isa:?}, x {x:#x}, w {w:?}"));
            }
        }
    }
}

#[test]
fn operations_on_special_values() {
    let special = [
        0.0,
        -0.0,
        f32::MIN_POSITIVE,
        f32::MIN_POSITIVE / 2.0,
        -f32::from_bits(1),
        0.5,
        1.5,
        -2.5,
        8_388_609.0,
        f32::MAX,
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        1.0,
        -1.0,
    ];
    for shift in 0..LANES {
        for other in 0..LANES {
            let turned = |by: usize| std::array::from_fn(|i| special[(i + by) % LANES]);
            check_elementwise(special, turned(shift), turned(other));
        }
    }
}

#[test]
fn halves_of_every_pair_are_widened() {
    for first in (0..=u16::MAX).step_by(LANES) {
        let bf16: [u32; LANES] =
            std::array::from_fn(|i| u32::from(first + i as u16) << 16 | u32::from(!first - i as u16));
        let e4m3: Line = std::array::from_fn(|i| (first / LANES as u16) as u8 ^ (8 * i + i / 32) as u8);
        for isa in Isa::available() {
            let [upper, lower] = isa.run(HalvesBf16(bf16));
            assert_bits(&upper, &bf16.map(high), format_args!("{isa:?}, high, {bf16:x?}"));
            assert_bits(&lower, &bf16.map(low), format_args!("{isa:?}, low, {bf16:x?}"));
            let places = [interleaved::<0>, interleaved::<1>];
            for ([upper, lower], place) in isa.run(HalvesE4m3(e4m3)).into_iter().zip(places) {
                let half = |half: usize| -> F { std::array::from_fn(|i| e4m3_to_f32(e4m3[place(2 * i + half)])) };
                assert_bits(&upper, &half(1), format_args!("{isa:?}, high, {e4m3:x?}"));
                assert_bits(&lower, &half(0), format_args!("{isa:?}, low, {e4m3:x?}"));
            }
        }
    }
}

/// Each code as the high and as the low half of a pair, times one.
#[test]
fn pairs_hold_every_e4m3() {
    const ONE: u32 = 0x3f80;
    for first in (0..=u8::MAX).step_by(LANES) {
        for isa in Isa::available() {
            for half in 0..2 {
                let w = std::array::from_fn(|i| if i % 2 == half { first + (i / 2) as u8 } else { 0 });
                // Plus a zero is +0 where the code is -0.
                let expected: F = std::array::from_fn(|i| e4m3_to_f32(first + i as u8) + 0.0);
                for got in isa.run(DotE4m3 { x: ONE << (16 * half), w, acc: [0.0; LANES] }) {
                    assert_bits(&got, &expected, format_args!("{isa:?}, half {half}, from {first}"));
                }
            }
        }
    }
}

#[test]
fn best_is_the_last_of_those_available() {
    let available = Isa::available();
    assert!(available.is_sorted() && available[0] == Isa::Portable, "{available:?}");
    assert_eq!(Some(&Isa::best()), available.last());
    let with_dot: Vec<&str> = available.iter().filter(|isa| isa.has_dot_pairs()).map(|isa| isa.name()).collect();
    assert!(with_dot.is_empty() || with_dot == ["avx512-bf16"], "{with_dot:?}");
}

/// Bytes of words, interleaved.
struct Interleave([Words; 2]);

impl Kernel for Interleave {
    type Out = Line;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Line {
        s.interleave(&self.0[0], &self.0[1])
    }
}

#[test]
fn every_byte_is_interleaved() {
    for first in 0..=u16::from(u8::MAX) {
        let words = [0, 100].map(|by| -> Words { std::array::from_fn(|i| (first + by + i as u16) % 256) });
        for isa in Isa::available() {
            let bytes = isa.run(Interleave(words));
            for (word, [even, odd]) in std::iter::zip(words[0], words[1]).map(<[u16; 2]>::from).enumerate() {
                assert_eq!(u16::from(bytes[interleaved::<0>(word)]), even, "{isa:?}, word {word}");
                assert_eq!(u16::from(bytes[interleaved::<1>(word)]), odd, "{isa:?}, word {word}");
            }
        }
    }
}
