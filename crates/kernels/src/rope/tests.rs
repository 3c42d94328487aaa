//! Frequencies and scales against published numbers and f64, the rotation against the plain loop.

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::{Samples, assert_bits};

/// Of DeepSeek-V3.
const V3: RopeParams = RopeParams {
    dim: 64,
    theta: 10000.0,
    yarn: Some(Yarn {
        factor: 40.0,
        original_positions: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 1.0,
        mscale_all_dim: 1.0,
    }),
};

fn close(got: f64, expected: f64, relative: f64) -> bool {
    (got - expected).abs() <= expected.abs() * relative
}

#[test]
fn frequencies_of_deepseek_v3() {
    let got = frequencies(&V3);
    assert_eq!(got.len(), 32);
    for (i, got) in got.iter().enumerate() {
        let base = (-(i as f64) / 32.0 * 10000f64.ln()).exp();
        // From pair 10 (32 turns in 4096 positions) to pair 23 (one turn) the frequency goes over to a fortieth.
        let stretched = ((i as f64 - 10.0) / 13.0).clamp(0.0, 1.0);
        let expected = base * (1.0 - stretched) + base / 40.0 * stretched;
        assert!(close(*got, expected, 1e-13), "pair {i}: {got:e} {expected:e}");
    }
    assert!(close(got[10], 10f64.powf(-1.25), 1e-13), "kept up to pair 10");
    assert!(close(got[23], 10f64.powf(-2.875) / 40.0, 1e-13), "stretched from pair 23");
}

#[test]
fn frequencies_without_yarn() {
    for (i, got) in frequencies(&RopeParams { yarn: None, ..V3 }).iter().enumerate() {
        assert!(close(*got, 10f64.powf(-(i as f64) / 8.0), 1e-13), "pair {i}: {got:e}");
    }
}

/// Both ends of the ramp on one pair, or beyond the pairs, or before them: nothing is NaN, and all lies between the two frequencies.
#[test]
fn frequencies_of_odd_ramps() {
    let yarn = V3.yarn.unwrap();
    let cases = [
        (64, Yarn { beta_fast: 1.0, beta_slow: 1.0, ..yarn }),
        (64, Yarn { beta_fast: 1e9, beta_slow: 1e8, ..yarn }),
        (64, Yarn { original_positions: 1, ..yarn }),
        (64, Yarn { original_positions: 1 << 40, ..yarn }),
        (2, yarn),
    ];
    for (dim, yarn) in cases {
        let p = RopeParams { dim, yarn: Some(yarn), ..V3 };
        let base = frequencies(&RopeParams { yarn: None, ..p });
        for (got, base) in frequencies(&p).iter().zip(&base) {
            assert!((base / 40.0 * 0.999..=base * 1.001).contains(got), "{got:e} of {base:e}, {yarn:?}");
        }
    }
}

#[test]
fn scales_of_attention() {
    let yarn = |mscale, mscale_all_dim, factor| {
        let yarn = Yarn { mscale, mscale_all_dim, factor, ..V3.yarn.unwrap() };
        RopeParams { yarn: Some(yarn), ..V3 }
    };
    // 0.1 ln 40 + 1 = 1.36888794541.
    let m = 1.368_887_945_411_39;
    let cases = [
        (192, V3, 192f64.powf(-0.5) * m * m),
        (192, RopeParams { yarn: None, ..V3 }, 192f64.powf(-0.5)),
        // V2-Lite: 0.707 of each.
        (192, yarn(0.707, 0.707, 40.0), 192f64.powf(-0.5) * (0.0707 * 40f64.ln() + 1.0).powi(2)),
        (64, yarn(1.0, 0.0, 40.0), 0.125),
        (64, yarn(1.0, 1.0, 1.0), 0.125),
    ];
    for (head_dim, p, expected) in cases {
        assert_eq!(softmax_scale(head_dim, &p), expected as f32, "{head_dim}, {p:?}");
    }
    let magnitudes =
        [(V3, 1.0), (yarn(1.0, 0.0, 40.0), m), (yarn(0.0, 1.0, 40.0), 1.0 / m), (yarn(3.0, 1.0, 0.5), 1.0)];
    for (p, expected) in magnitudes {
        assert!(close(magnitude(&p), expected, 1e-14), "{p:?}");
    }
}

#[test]
fn the_table_is_rounded_once() {
    let yarn = Yarn { mscale_all_dim: 0.5, ..V3.yarn.unwrap() };
    for p in [V3, RopeParams { yarn: None, ..V3 }, RopeParams { dim: 10, yarn: Some(yarn), ..V3 }] {
        let table = RopeTable::new(&p, 5000);
        assert_eq!(table.positions(), 5000);
        let turns = table.turns.chunks_exact(p.dim / 2).enumerate();
        for (position, turns) in turns.filter(|(position, _)| position % 37 < 2) {
            for ([cos, sin], frequency) in turns.iter().zip(frequencies(&p)) {
                let angle = position as f64 * frequency;
                assert_eq!(*cos, (angle.cos() * magnitude(&p)) as f32, "cos, position {position}");
                assert_eq!(*sin, (angle.sin() * magnitude(&p)) as f32, "sin, position {position}");
            }
        }
    }
}

proptest! {
    #[test]
    fn equals_the_plain_loop(
        (pairs, heads) in (1..50usize, 0..6usize),
        (position, yarn) in (0..40usize, any::<bool>()),
        seed in any::<u64>(),
    ) {
        let p = RopeParams { dim: 2 * pairs, yarn: V3.yarn.filter(|_| yarn), ..V3 };
        let table = RopeTable::new(&p, 40);
        let x = Samples::new(seed).values(heads * p.dim, 2.0);
        let turns = &table.turns[position * pairs..][..pairs];
        let expected: Vec<f32> = x.chunks_exact(p.dim).flat_map(|head| reference::rotate(turns, head)).collect();
        for isa in Isa::available() {
            let mut y = x.clone();
            table.apply_on(isa, position, &mut y);
            assert_bits(&y, &expected, format_args!("{isa:?}, all heads"));
            let mut y = x.clone();
            y.chunks_exact_mut(p.dim).for_each(|head| table.apply_on(isa, position, head));
            assert_bits(&y, &expected, format_args!("{isa:?}, each head alone"));
        }
        let mut y = x;
        table.apply(position, &mut y);
        assert_bits(&y, &expected, format_args!("by default"));
    }

    /// What rotary embedding is for: a product of two rotated vectors depends on how far apart their positions are.
    #[test]
    fn products_depend_on_the_distance(a in 0..500usize, b in 0..500usize, shift in 0..500usize, seed in any::<u64>()) {
        let table = RopeTable::new(&V3, 1000);
        let mut s = Samples::new(seed);
        let (q, k) = (s.values(64, 1.0), s.values(64, 1.0));
        let product = |a: usize, b: usize| {
            let (mut q, mut k) = (q.clone(), k.clone());
            table.apply(a, &mut q);
            table.apply(b, &mut k);
            q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(k)).sum::<f64>()
        };
        prop_assert!((product(a, b) - product(a + shift, b + shift)).abs() < 1e-5);
    }
}

#[test]
fn position_0_changes_nothing() {
    let x = Samples::new(5).values(64, 1.0);
    let mut y = x.clone();
    RopeTable::new(&V3, 1).apply(0, &mut y);
    // But for the sign of zeros.
    assert_eq!(y, x);
}

#[test]
#[should_panic(expected = "position 3 of 3")]
fn positions_end() {
    RopeTable::new(&V3, 3).apply(3, &mut [0.0; 64]);
}

#[test]
#[should_panic(expected = "rope over 63 values, an odd number")]
fn values_come_in_pairs() {
    RopeTable::new(&RopeParams { dim: 63, ..V3 }, 3);
}
