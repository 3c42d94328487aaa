//! The norm against the plain loop and against f64.

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::{Samples, any_magnitude, assert_bits};

proptest! {
    #[test]
    fn equals_the_plain_loop(
        (rows, width) in (0..12usize, 1..200usize),
        magnitude in any_magnitude(),
        eps in prop_oneof![Just(1e-6f32), Just(0.1), Just(1e-30)],
        seed in any::<u64>(),
    ) {
        let mut s = Samples::new(seed);
        let (x, weight) = (s.values(rows * width, magnitude), s.values(width, 2.0));
        let expected: Vec<f32> = x.chunks_exact(width).flat_map(|x| reference::rms_norm(x, &weight, eps)).collect();
        for isa in Isa::available() {
            let mut y = vec![f32::NAN; x.len()];
            rms_norm_on(isa, &x, &weight, eps, &mut y);
            assert_bits(&y, &expected, format_args!("{isa:?}, all rows"));
            for (x, expected) in x.chunks_exact(width).zip(expected.chunks_exact(width)) {
                let mut y = vec![f32::NAN; width];
                rms_norm_on(isa, x, &weight, eps, &mut y);
                assert_bits(&y, expected, format_args!("{isa:?}, a row alone"));
            }
        }
        let mut y = vec![f32::NAN; x.len()];
        rms_norm(&x, &weight, eps, &mut y);
        assert_bits(&y, &expected, format_args!("by default"));
    }

    #[test]
    fn agrees_with_f64(width in 1..3000usize, seed in any::<u64>()) {
        let mut s = Samples::new(seed);
        let (x, weight) = (s.values(width, 3.0), s.values(width, 2.0));
        let mut y = vec![f32::NAN; width];
        rms_norm(&x, &weight, 1e-6, &mut y);
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
        let factor = 1.0 / (mean + 1e-6).sqrt();
        for ((x, w), y) in x.iter().zip(&weight).zip(&y) {
            let exact = f64::from(*x) * factor * f64::from(*w);
            // A sixteenth of the width's roundings in a sum, half of that after the root; a few more. Denormals have fewer bits.
            let bound = exact.abs() * (10 + width / 16) as f64 / (1 << 24) as f64 + 1e-37;
            prop_assert!((f64::from(*y) - exact).abs() <= bound, "{y:e} {exact:e}");
        }
    }
}

#[test]
fn a_row_of_zeros_stays_zero() {
    let mut y = [f32::NAN; 20];
    rms_norm(&[0.0; 20], &[1.5; 20], 1e-6, &mut y);
    assert_eq!(y, [0.0; 20]);
}

#[test]
#[should_panic(expected = "x does not have whole rows")]
fn rows_have_to_be_whole() {
    rms_norm(&[0.0; 7], &[1.0; 3], 1e-6, &mut [0.0; 7]);
}
