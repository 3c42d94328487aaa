//! exp, sigmoid and silu: exact bits of the formula everywhere, and how far the formula is from the functions.

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::{Samples, assert_bits};
use crate::simd::{Isa, Kernel};

#[derive(Clone, Copy, Debug)]
enum Function {
    Exp,
    Sigmoid,
    Silu,
}
use Function::*;

struct Each<'a> {
    function: Function,
    x: &'a mut [f32],
}

impl Kernel for Each<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_mut(LANES) {
            let v = load_part(s, x, 0.0);
            let y = match self.function {
                Exp => exp(s, v),
                Sigmoid => sigmoid(s, v),
                Silu => silu(s, v),
            };
            store_part(s, y, x);
        }
    }
}

/// The function's values; equal to the plain formula's on every instruction set.
fn of(function: Function, x: &[f32]) -> Vec<f32> {
    let plain = match function {
        Exp => reference::exp,
        Sigmoid => reference::sigmoid,
        Silu => reference::silu,
    };
    let expected: Vec<f32> = x.iter().map(|x| plain(*x)).collect();
    for isa in Isa::available() {
        let mut y = x.to_vec();
        isa.run(Each { function, x: &mut y });
        assert_bits(&y, &expected, format_args!("{function:?} on {isa:?}"));
    }
    expected
}

/// Evenly spaced values, and all that are next to n ln 2 / 2, where exp changes its power of two.
fn sweep(from: f32, to: f32) -> Vec<f32> {
    let steps = 1_000_000;
    let even = (0..=steps).map(|i| from + (to - from) * (i as f32 / steps as f32));
    let next_to = |n: i32| {
        let middle = n as f32 * std::f32::consts::LN_2 / 2.0;
        (-20..=20).map(move |i| f32::from_bits(middle.to_bits().wrapping_add_signed(i)))
    };
    let turns = (-300..300).filter(|n| *n != 0).flat_map(next_to);
    even.chain(turns).filter(|x| (from..=to).contains(x)).collect()
}

/// The largest relative error against f64.
fn error(function: Function, exact: impl Fn(f64) -> f64, from: f32, to: f32) -> f64 {
    let x = sweep(from, to);
    let error = |(x, y): (&f32, &f32)| (f64::from(*y) / exact(f64::from(*x)) - 1.0).abs();
    x.iter().zip(&of(function, &x)).filter(|(x, _)| **x != 0.0).map(error).fold(0.0, f64::max)
}

/// Measured: 7.9e-8, 6.6e-8, 1.46e-7, 1.68e-7.
#[test]
fn errors_are_small() {
    let exact_sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let cases = [
        ("exp", error(Exp, f64::exp, -86.59, 88.72), 8e-8),
        ("exp near 0", error(Exp, f64::exp, -0.7, 0.7), 7e-8),
        ("sigmoid", error(Sigmoid, exact_sigmoid, -87.0, 40.0), 1.5e-7),
        ("silu", error(Silu, |x| x * exact_sigmoid(x), -87.0, 40.0), 1.7e-7),
    ];
    for (name, error, bound) in cases {
        assert!(error < bound, "{name}: {error:e}");
    }
}

#[test]
fn exact_values_and_cut_offs() {
    let largest = f32::MAX.ln();
    let cases = [
        (Exp, 0.0, 1.0),
        (Exp, -0.0, 1.0),
        (Exp, f32::from_bits(1), 1.0),
        (Exp, EXP_ZERO_BELOW.next_down(), 0.0),
        (Exp, -1e30, 0.0),
        (Exp, f32::NEG_INFINITY, 0.0),
        (Exp, 88.73, f32::INFINITY),
        (Exp, largest.next_up(), f32::INFINITY),
        (Exp, 1e30, f32::INFINITY),
        (Exp, f32::INFINITY, f32::INFINITY),
        (Exp, f32::NAN, f32::NAN),
        (Sigmoid, 0.0, 0.5),
        (Sigmoid, -0.0, 0.5),
        (Sigmoid, 87.0, 1.0),
        (Sigmoid, f32::INFINITY, 1.0),
        (Sigmoid, -89.0, 0.0),
        (Sigmoid, f32::NEG_INFINITY, 0.0),
        (Sigmoid, f32::NAN, f32::NAN),
        (Silu, 0.0, 0.0),
        (Silu, -0.0, -0.0),
        (Silu, 87.0, 87.0),
        (Silu, 3e38, 3e38),
        (Silu, f32::INFINITY, f32::INFINITY),
        (Silu, -89.0, -0.0),
        (Silu, -3e38, -0.0),
        // -infinity / infinity.
        (Silu, f32::NEG_INFINITY, f32::NAN),
        (Silu, f32::NAN, f32::NAN),
    ];
    for (function, x, expected) in cases {
        assert_bits(&of(function, &[x]), &[expected], format_args!("{function:?}({x:e})"));
    }
    let kept = of(Exp, &[EXP_ZERO_BELOW, largest.next_down()]);
    assert!(kept[0] > f32::MIN_POSITIVE && kept[1].is_finite(), "{kept:?}");
}

proptest! {
    #[test]
    fn any_bits_give_the_same_everywhere(seed in any::<u64>(), len in 1..100usize) {
        let mut s = Samples::new(seed);
        let x: Vec<f32> = (0..len).map(|_| if s.below(2) == 0 { s.pattern() } else { s.unit() * 95.0 }).collect();
        for function in [Exp, Sigmoid, Silu] {
            of(function, &x);
        }
    }

    #[test]
    fn lanes_are_added_halves_onto_halves(seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        let v: [f32; LANES] = std::array::from_fn(|_| s.value(1.0));
        let eight: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        let expected = (four[0] + four[2]) + (four[1] + four[3]);
        prop_assert_eq!(sum_16(v).to_bits(), expected.to_bits());
    }

    /// Exp never falls where its argument rises: attention's largest score has the largest weight.
    #[test]
    fn exp_is_monotonic_next_to(x in -86.0f32..88.0) {
        let y = of(Exp, &[x.next_down(), x, x.next_up()]);
        prop_assert!(y.is_sorted(), "{y:?}");
    }
}
