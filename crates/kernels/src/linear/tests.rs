//! Linears against the plain loop: every storage, numerics and instruction set, rows alone and together, on pools of several sizes.

use std::time::Instant;

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::roof::Roof;
use crate::samples::{Samples, Stored, StoredMatrix, any_magnitude, any_stored, assert_bits, on_all_numerics, pools};
use crate::simd::Isa;

fn forward(linear: &Linear, pool: &Pool, x: RowsRef<'_>) -> Vec<f32> {
    let rows = x.len() / linear.in_features();
    let mut y = vec![f32::NAN; rows * linear.out_features()];
    linear.forward(pool, x, &mut y);
    y
}

/// Rows of the plain loop.
fn expected(m: &StoredMatrix, n: Numerics, x: &[f32]) -> Vec<f32> {
    x.chunks_exact(m.cols).flat_map(|x| reference::linear(&m.matrix(), n, x)).collect()
}

/// All rows together on every pool, each alone, and in two parts.
fn check(m: &StoredMatrix, x: &[f32], cut: usize) {
    check_packed(m, x, cut, Linear::pack);
}

fn check_packed(m: &StoredMatrix, x: &[f32], cut: usize, pack: impl Fn(&Matrix<'_>, Numerics) -> Linear) {
    on_all_numerics(
        |n| expected(m, n, x),
        |n, expected| {
            let linear = pack(&m.matrix(), n);
            for pool in pools() {
                let y = forward(&linear, pool, RowsRef::F32(x));
                assert_bits(&y, expected, format_args!("{n:?}, {} threads", pool.threads()));
            }
            for (x, expected) in x.chunks_exact(m.cols).zip(expected.chunks_exact(m.rows)) {
                assert_bits(&forward(&linear, &pools()[0], RowsRef::F32(x)), expected, format_args!("{n:?}, alone"));
            }
            let (first, second) = x.split_at(cut * m.cols);
            let parts = [first, second].map(|x| forward(&linear, &pools()[1], RowsRef::F32(x))).concat();
            assert_bits(&parts, expected, format_args!("{n:?}, cut after row {cut}"));
        },
    );
}

/// A few, two bands, or more of them than weights are opened for in registers.
fn any_rows() -> impl Strategy<Value = usize> {
    prop_oneof![1..=12usize, 13..=48usize, 49..=75usize]
}

/// F16 and the codes of FP8 are not scaled, so x takes their share.
fn x_magnitude(stored: Stored, magnitude: f32) -> f32 {
    match stored {
        Stored::F16 => magnitude * magnitude,
        _ => magnitude,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn equals_the_plain_loop(
        (stored, magnitude) in (any_stored(), any_magnitude()),
        (rows, out, cols) in (any_rows(), 1..150usize, prop_oneof![1..300usize, (1..75usize).prop_map(|c| 4 * c)]),
        (cut, seed) in (any::<prop::sample::Index>(), any::<u64>()),
    ) {
        let mut s = Samples::new(seed);
        let m = s.matrix(out, cols, stored, magnitude);
        let x = s.values(rows * cols, x_magnitude(stored, magnitude));
        check(&m, &x, cut.index(rows + 1));
    }

    #[test]
    fn bf16_rows_equal_the_same_values_in_f32(
        stored in any_stored(),
        (rows, out, cols) in (1..=20usize, 1..40usize, 1..80usize),
        seed in any::<u64>(),
    ) {
        let mut s = Samples::new(seed);
        let m = s.matrix(out, cols, stored, 1.0);
        let x: Vec<bf16> = s.values(rows * cols, 1.0).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        on_all_numerics(|n| expected(&m, n, &wide), |n, expected| {
            let linear = Linear::pack(&m.matrix(), n);
            for pool in pools() {
                assert_bits(&forward(&linear, pool, RowsRef::F32(&wide)), expected, format_args!("{n:?}, f32"));
                assert_bits(&forward(&linear, pool, RowsRef::Bf16(&x)), expected, format_args!("{n:?}, bf16"));
            }
        });
    }
}

fn unquantised() -> impl Iterator<Item = Numerics> {
    Numerics::all().into_iter().filter(|n| !n.quantises())
}

/// As every set of instructions packs it, not only those that are faster with it.
fn pack_tight(m: &Matrix<'_>, n: Numerics) -> Linear {
    Linear::of(m, n, &Source::Matrix { tight: true }).unwrap()
}

/// Bf16 whose upper bytes are few, but for as many outliers as may be.
fn tight_matrix(s: &mut Samples, out: usize, cols: usize) -> StoredMatrix {
    let mut m = s.matrix(out, cols, Stored::Bf16, 1.0);
    let mut put = |at: usize, x: f32| m.bytes_mut()[2 * at..][..2].copy_from_slice(&bf16::from_f32(x).to_le_bytes());
    for at in 0..out * cols {
        let x = s.unit();
        put(at, x + 0.001f32.copysign(x));
    }
    for _ in 0..out * cols / 8 {
        put(s.below(out * cols), [0.0, f32::MIN_POSITIVE / 4.0][s.below(2)]);
    }
    for _ in 0..out * cols / 2 / 1024 {
        put(s.below(out * cols), [-1e-30, 1e9, f32::MAX / 2.0, f32::INFINITY, -0.0, -1e20, 1e30, -1e-35][s.below(8)]);
    }
    m
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn tight_weights_equal_the_plain_loop(
        (rows, out, groups) in (any_rows(), 1..150usize, 1..40usize),
        (cut, seed) in (any::<prop::sample::Index>(), any::<u64>()),
    ) {
        let mut s = Samples::new(seed);
        let m = tight_matrix(&mut s, out, 8 * groups);
        for n in unquantised() {
            let (tight, plain) = (pack_tight(&m.matrix(), n).bytes(), out.next_multiple_of(16) * groups * 16);
            // Of an outlier there are 8 bytes for a thousand pairs, of a panel 4; and all is a multiple of 192.
            let most = plain * 3 / 4 + plain / 512 + 4 * (out / 16 + 2) + 64 + 192;
            prop_assert!(tight <= most, "{tight} bytes for {plain}, {n:?}");
        }
        check_packed(&m, &s.values(rows * m.cols, 1.0), cut.index(rows + 1), pack_tight);
    }
}

/// FP8 in blocks that fours do not divide becomes bf16, with scales that a tight matrix has no place for.
#[test]
fn weights_with_scales_stay_as_they_are() {
    let mut s = Samples::new(8);
    let mut m = s.matrix(64, 64, Stored::Fp8([16, 6]), 1.0);
    m.bytes_mut().iter_mut().for_each(|code| *code = 0x38 | *code & 0x87);
    check_packed(&m, &s.values(3 * 64, 1.0), 1, pack_tight);
}

/// Sums of twelve are spread about as trained weights are.
#[test]
fn normal_weights_can_be_tight() {
    let mut s = Samples::new(4);
    let normal: Vec<f32> = (0..256 * 512).map(|_| (0..12).map(|_| s.unit()).sum::<f32>() * 0.02).collect();
    let bytes: Vec<u8> = normal.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let tight =
        pack_tight(&Matrix { rows: 256, cols: 512, data: MatrixData::Bf16(&bytes) }, Numerics::all()[0]).bytes();
    assert!((192 * 512 * 2..194 * 512 * 2).contains(&tight), "{tight} bytes");
}

/// Matrices of which more than one pair in a thousand is an outlier, whose rows are no whole groups, or that are too small to become smaller.
#[test]
fn weights_that_cannot_be_tight_stay_as_they_are() {
    let mut s = Samples::new(3);
    let many = s.matrix(64, 64, Stored::Bf16, 1.0);
    let ragged = tight_matrix(&mut s, 64, 60);
    let small = tight_matrix(&mut s, 16, 24);
    for n in unquantised() {
        assert_eq!(pack_tight(&many.matrix(), n).bytes(), 64 * 64 * 2);
        assert_eq!(pack_tight(&ragged.matrix(), n).bytes(), 64 * 60 * 2);
        assert_eq!(pack_tight(&small.matrix(), n).bytes(), 16 * 24 * 2);
        assert_eq!(pack_tight(&tight_matrix(&mut s, 64, 64).matrix(), n).packed().len(), 64 * 64 * 3 / 2 + 192);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Calls big enough to be cut for several threads, by panels and by rows.
    #[test]
    fn equals_the_plain_loop_when_cut_for_threads(
        stored in any_stored(),
        (rows, cols, more) in (prop_oneof![1..4usize, 24..100usize], 40..400usize, 0..40usize),
        (cut, seed) in (any::<prop::sample::Index>(), any::<u64>()),
    ) {
        let out = (1usize << 20).div_ceil(rows * cols) + more;
        let linear_work = rows * cols * out;
        prop_assert!(!pools()[1].is_inline(linear_work) && !pools()[2].is_inline(linear_work));
        let mut s = Samples::new(seed);
        let m = s.matrix(out, cols, stored, 1.0);
        check(&m, &s.values(rows * cols, 1.0), cut.index(rows + 1));
    }
}

/// The conversion of activations is cut by rows, whatever the linear is.
#[test]
fn activations_are_converted_alike_on_threads() {
    let rows = 300;
    let cols = (8usize << 20).div_ceil(rows) | 1;
    let mut s = Samples::new(3);
    let x: Vec<f32> = (0..rows * cols).map(|_| s.unit()).collect();
    // A value counts for an eighth of a multiply-add.
    assert!(!pools()[2].is_inline(x.len() / 8));
    for isa in Isa::available() {
        for form in [Form::Rounded, Form::Pairs, Form::Quads] {
            let [alone, _, split] =
                pools().each_ref().map(|p| with_rows(p, isa, form, RowsRef::F32(&x), cols, bits_of));
            assert!(alone == split, "{isa:?}, {form:?}");
        }
    }
}

fn bits_of(x: Ready<'_>) -> Vec<u32> {
    match x {
        Ready::F32(x) => x.iter().map(|x| x.to_bits()).collect(),
        Ready::Pairs(x) | Ready::Quads(x) => x.to_vec(),
    }
}

#[test]
fn ragged_shapes_and_blocks() {
    let cases = [
        (1, 1, Stored::F32),
        (1, 1, Stored::Fp8([128, 128])),
        (1, 3, Stored::Bf16),
        (16, 1, Stored::F16),
        (17, 2, Stored::Bf16),
        (129, 257, Stored::Fp8([128, 128])),
        (128, 128, Stored::Fp8([128, 128])),
        (145, 128, Stored::Fp8([128, 128])),
        (40, 129, Stored::Fp8([1, 128])),
        (40, 129, Stored::Fp8([128, 1])),
        (33, 30, Stored::Fp8([7, 3])),
        (33, 31, Stored::Fp8([5, 2])),
        (9, 31, Stored::Fp8([1000, 1000])),
        (9, 31, Stored::Fp8([1000, 999])),
    ];
    for (out, cols, stored) in cases {
        let mut s = Samples::new(out as u64 * 1000 + cols as u64);
        let m = s.matrix(out, cols, stored, 1.0);
        for rows in 1..=14 {
            check(&m, &s.values(rows * cols, 1.0), rows / 2);
        }
    }
}

#[test]
fn rows_too_long_to_be_in_bands_at_once() {
    let (rows, out, cols) = (26, 2, 90_000);
    assert!(band::rows_together(rows, cols) < rows);
    let mut s = Samples::new(26);
    let m = s.matrix(out, cols, Stored::Bf16, 1.0);
    check(&m, &s.values(rows * cols, 1.0), 1);
}

#[test]
fn nothing_to_compute() {
    for n in Numerics::all() {
        for pool in pools() {
            Linear::pack_f32(0, 5, &[], n).forward(pool, RowsRef::F32(&[]), &mut []);
            Linear::pack_f32(3, 5, &[1.0; 15], n).forward(pool, RowsRef::F32(&[]), &mut []);
            let mut y = [f32::NAN; 6];
            Linear::pack_f32(3, 0, &[], n).forward(pool, RowsRef::F32(&[]), &mut y);
            assert_eq!(y, [0.0; 6], "a sum of nothing, {n:?}");
        }
    }
}

#[test]
fn infinities_and_nan_go_where_they_belong() {
    let mut s = Samples::new(7);
    let cols = 21;
    for stored in [Stored::F32, Stored::Bf16, Stored::Fp8([4, 6])] {
        let mut m = s.matrix(20, cols, stored, 1.0);
        let mut x = s.values(3 * cols, 1.0);
        (x[4], x[cols + 20]) = (f32::INFINITY, f32::NAN);
        check(&m, &x, 1);
        if let Stored::Fp8(_) = stored {
            m.bytes_mut()[2 * cols + 3] = 0x7f;
            m.bytes_mut()[19 * cols + 20] = 0xff;
            check(&m, &x, 2);
        }
        let y = expected(&m, Numerics::portable(Dtype::F32), &x);
        assert!(y[2 * 20..][..2].iter().all(|y| y.is_finite()), "a row's NaN is in another row");
    }
}

/// Unit roundoffs.
const U_F32: f64 = 1.0 / (1 << 24) as f64;
const U_BF16: f64 = 1.0 / (1 << 8) as f64;

#[test]
fn is_as_exact_as_its_types_allow() {
    let (rows, out, cols) = (5, 70, 700);
    for stored in [Stored::F32, Stored::F16, Stored::Bf16, Stored::Fp8([128, 128]), Stored::Fp8([16, 33])] {
        let mut s = Samples::new(11);
        let (m, x) = (s.matrix(out, cols, stored, 1.0), s.values(rows * cols, 1.0));
        let w = exact_weights(&m.matrix());
        // A value of FP8 or bf16 is itself in bf16.
        let is_wide = matches!(stored, Stored::F32 | Stored::F16);
        for n in unquantised() {
            let rounded = [is_wide && n.dtype() == Dtype::Bf16, n.activations() == Dtype::Bf16];
            let of_inputs = rounded.into_iter().filter(|is| *is).count() as f64 * 1.005 * U_BF16;
            let y = forward(&Linear::pack(&m.matrix(), n), &pools()[0], RowsRef::F32(&x));
            for (i, y) in y.iter().enumerate() {
                let (x, w) = (&x[i / out * cols..][..cols], &w[i % out * cols..][..cols]);
                let terms = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * w);
                let size: f64 = terms().map(f64::abs).sum();
                let error = (f64::from(*y) - terms().sum::<f64>()).abs() / size;
                // Each addition rounds once, those of blocks too: of these there are not more than of the others.
                let bound = (2 * cols) as f64 * U_F32 + of_inputs;
                assert!(error < bound, "{error:e} of the sum of products, {stored:?}, {n:?}");
            }
        }
    }
}

/// Of a factor of INT8 half a step of its block is lost, and all the rest is as exact as above.
#[test]
fn int8_is_as_exact_as_its_steps_are_small() {
    let (rows, out, cols) = (5, 70, 700);
    let half_step = |block: &[f64]| block.iter().fold(0.0, |max, x| x.abs().max(max)) / 254.0;
    for stored in [Stored::F32, Stored::F16, Stored::Bf16, Stored::Fp8([128, 128]), Stored::Fp8([16, 33])] {
        let mut s = Samples::new(12);
        let (m, x) = (s.matrix(out, cols, stored, 1.0), s.values(rows * cols, 1.0));
        let w = exact_weights(&m.matrix());
        let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        for n in Numerics::all().into_iter().filter(Numerics::quantises) {
            let y = forward(&Linear::pack(&m.matrix(), n), &pools()[0], RowsRef::F32(&x));
            for (i, y) in y.iter().enumerate() {
                let (x, w) = (&wide[i / out * cols..][..cols], &w[i % out * cols..][..cols]);
                let (mut exact, mut bound) = (0.0, 0.0);
                for (x, w) in x.chunks(128).zip(w.chunks(128)) {
                    let (of_x, of_w) = (half_step(x), half_step(w));
                    for (x, w) in x.iter().zip(w) {
                        exact += x * w;
                        bound += (of_x * (w.abs() + of_w) + of_w * x.abs()) * 1.001 + 1e-6 * (x * w).abs();
                    }
                }
                let error = (f64::from(*y) - exact).abs();
                assert!(error < bound, "{error:e} where {bound:e} may be, {stored:?}, {n:?}");
            }
        }
    }
}

fn exact_weights(m: &Matrix<'_>) -> Vec<f64> {
    let MatrixData::Fp8 { q, scales, block } = &m.data else {
        return m.to_f32().into_iter().map(f64::from).collect();
    };
    let across = m.cols.div_ceil(block[1]);
    let weight = |(i, code): (usize, &u8)| {
        let (row, col) = (i / m.cols, i % m.cols);
        f64::from(crate::e4m3_to_f32(*code)) * f64::from(scales[row / block[0] * across + col / block[1]])
    };
    q.iter().enumerate().map(weight).collect()
}

proptest! {
    #[test]
    fn tasks_cover_every_output_once(rows in 0..200usize, panels in 0..400usize, parallel in any::<bool>()) {
        for pool in pools() {
            let cut = Cut::new(pool, if parallel { 1 << 20 } else { 0 }, rows, panels);
            let mut times = vec![0; rows * panels];
            for task in 0..cut.tasks() {
                for row in cut.rows(task) {
                    cut.panels(task).for_each(|panel| times[row * panels + panel] += 1);
                }
            }
            prop_assert!(times.iter().all(|times| *times == 1), "{} threads", pool.threads());
        }
    }

    #[test]
    fn bf16_is_rounded_as_the_half_crate_does(x in prop::collection::vec(any::<u32>(), 1..60)) {
        let x: Vec<f32> = x.into_iter().map(f32::from_bits).collect();
        let expected: Vec<u16> = x.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
        let wide: Vec<u32> = expected.iter().map(|x| u32::from(*x) << 16).collect();
        let pair = |pair: &[u16]| u32::from(pair[0]) << 16 | pair.get(1).map_or(0, |x| u32::from(*x));
        let pairs: Vec<u32> = expected.chunks(2).map(pair).collect();
        let as_bf16: Vec<bf16> = expected.iter().map(|x| bf16::from_bits(*x)).collect();
        for isa in Isa::available() {
            for x in [RowsRef::F32(&x), RowsRef::Bf16(&as_bf16)] {
                with_rows(&pools()[0], isa, Form::Rounded, x, x.len(), |x| assert_eq!(bits_of(x), wide, "{isa:?}"));
                with_rows(&pools()[0], isa, Form::Pairs, x, x.len(), |x| assert_eq!(bits_of(x), pairs, "{isa:?}"));
            }
        }
    }
}

#[test]
fn bf16_is_rounded_right_next_to_every_tie() {
    for high in 0..=u16::MAX {
        for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(high) << 16 | low);
            assert_eq!(bf16_bits(x), u32::from(bf16::from_f32(x).to_bits()), "{:#010x}", x.to_bits());
        }
    }
}

#[test]
fn says_its_sizes() {
    for (cols, block) in [(8, 4), (6, 4), (5, 4), (6, 3)] {
        let m = Samples::new(1).matrix(17, cols, Stored::Fp8([16, block]), 1.0);
        for n in Numerics::all() {
            let linear = Linear::pack(&m.matrix(), n);
            assert_eq!((linear.in_features(), linear.out_features()), (cols, 17));
            assert_eq!(format!("{linear:?}"), format!("Linear({cols} -> 17, {})", n.name()));
            if n.quantises() {
                // One block, whatever the matrix has.
                assert_eq!(linear.bytes(), 2 * 16 * (cols.next_multiple_of(4) + size_of::<f32>()), "{n:?}");
                continue;
            }
            // Codes stay codes where fours are whole.
            let bytes = match (block, cols, n.name()) {
                (4, 8, _) => cols,
                (4, _, "bf16-dp") => 2 * cols.next_multiple_of(2),
                _ => cols * size_of::<f32>(),
            };
            // Two panels of 16 outputs with two scales each.
            assert_eq!(linear.bytes(), 2 * 16 * (bytes + 2 * size_of::<f32>()), "{n:?}");
        }
    }
}

#[test]
#[should_panic(expected = "x does not have as many rows as y")]
fn rows_have_to_be_there() {
    let linear = Linear::pack_f32(2, 3, &[0.0; 6], Numerics::portable(Dtype::F32));
    linear.forward(&pools()[0], RowsRef::F32(&[0.0; 3]), &mut [0.0; 4]);
}

#[test]
#[should_panic(expected = "y does not have whole rows")]
fn rows_have_to_be_whole() {
    let linear = Linear::pack_f32(2, 3, &[0.0; 6], Numerics::portable(Dtype::F32));
    linear.forward(&pools()[0], RowsRef::F32(&[0.0; 3]), &mut [0.0; 3]);
}

#[repr(align(64))]
struct Aligned([u8; 40_000]);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Bytes at a multiple of 64 in memory, and some zeros behind them.
fn aligned(bytes: &[u8]) -> Bytes {
    let mut memory = Aligned([0; 40_000]);
    memory.0[..bytes.len()].copy_from_slice(bytes);
    Bytes::from_owner(memory)
}

/// What was packed once is the same weights again, from memory that is aligned as a file's pages are.
#[test]
fn packed_weights_can_be_mapped() {
    let mut s = Samples::new(7);
    let stored = [Stored::F32, Stored::F16, Stored::Bf16, Stored::Fp8([16, 32]), Stored::Fp8([8, 7])];
    let mut matrices = stored.map(|stored| s.matrix(37, 75, stored, 1.0)).to_vec();
    matrices.push(tight_matrix(&mut s, 90, 80));
    for m in matrices {
        let x = s.values(3 * m.cols, 1.0);
        for n in Numerics::all() {
            let packed = pack_tight(&m.matrix(), n);
            let len = packed.packed().len();
            let bytes = aligned(packed.packed());
            let expected = forward(&packed, &pools()[0], RowsRef::F32(&x));
            // By a processor with another set of instructions, too.
            for other in Numerics::all().into_iter().filter(|other| other.name() == n.name()) {
                let mapped = Linear::mapped(&m.matrix(), other, bytes.slice(..len)).unwrap();
                let y = forward(&mapped, &pools()[0], RowsRef::F32(&x));
                assert_bits(&y, &expected, format_args!("{n:?}, {other:?}, {m:?}"));
                assert_eq!(packed.bytes(), mapped.bytes());
            }
            for unfit in [bytes.slice(..len / 2), bytes.slice(..0), bytes.slice(1..len + 1)] {
                let error = Linear::mapped(&m.matrix(), n, unfit).unwrap_err().to_string();
                assert!(error.contains(&format!("for a matrix [{}, {}]", m.rows, m.cols)), "{error}");
            }
        }
    }
}

/// A file is whoever's: what it says of outliers is not believed.
#[test]
fn outliers_without_a_place_are_refused() {
    let m = tight_matrix(&mut Samples::new(5), 64, 256);
    let n = Numerics::portable(Dtype::Bf16);
    let packed = pack_tight(&m.matrix(), n);
    let groups = 64 * 256 * 3 / 2;
    let words: Vec<u32> = bytemuck::cast_slice(&packed.packed()[groups..]).to_vec();
    let (uppers, panels) = (16, 4);
    let count = words[uppers + panels];
    assert!(count > 1, "{words:?}");
    let spoiled = |at: usize, word: u32| {
        let mut words = words.clone();
        words[at] = word;
        let bytes = [&packed.packed()[..groups], bytemuck::cast_slice(&words)].concat();
        Linear::mapped(&m.matrix(), n, aligned(&bytes).slice(..bytes.len()))
    };
    assert!(spoiled(uppers + panels, count).is_ok(), "as it was");
    let before = [(uppers, count + 1), (uppers + panels, u32::MAX), (uppers + panels, 1 << 20)];
    let outlier = (uppers + panels + 1, 16 * 128);
    for (at, word) in before.into_iter().chain([outlier, (5, !words[5])]) {
        assert!(spoiled(at, word).is_err(), "word {at} as {word}");
    }
    let mut s = Samples::new(6);
    for _ in 0..300 {
        let at = s.below(words.len());
        if let Ok(linear) = spoiled(at, words[at] ^ 1 << s.below(32)) {
            forward(&linear, &pools()[0], RowsRef::F32(&[1.0; 256]));
        }
    }
}

/// How fast is a matter of what the compiler makes of a tile, which small changes have halved before. The best of many short
/// rounds counts, so that other work on the machine does not.
#[test]
fn many_rows_are_computed_at_half_of_the_roof_at_least() {
    const ROWS: usize = 96;
    const OUT: usize = 64;
    const IN: usize = 512;
    let pool = Pool::new(1);
    let roof = Roof::measure(&pool);
    let x = vec![0.5; ROWS * IN];
    let mut y = vec![0.0; ROWS * OUT];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let n = Numerics::detect(dtype);
        let linear = Linear::pack_f32(OUT, IN, &[0.25; OUT * IN], n);
        let best = (0..500)
            .map(|_| {
                let start = Instant::now();
                linear.forward(&pool, RowsRef::F32(&x), &mut y);
                start.elapsed()
            })
            .min()
            .unwrap();
        let rate = (ROWS * OUT * IN) as f64 / best.as_secs_f64();
        let roof = if dtype == Dtype::Bf16 { roof.bf16 } else { roof.fma };
        assert!(rate >= 0.5 * roof, "{n:?}: {:.0} % of the roof", 100.0 * rate / roof);
        assert!(y.iter().all(|y| *y == 0.125 * IN as f32));
    }
}
