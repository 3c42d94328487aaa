//! Feed-forward blocks against the plain loop: alone, and grouped in any way.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::samples::{Samples, Stored, StoredMatrix, any_stored, assert_bits, on_all_numerics, pools};
use crate::{Dtype, MatrixData};

/// Dimensions of an expert.
#[derive(Clone, Copy, Debug)]
struct Shape {
    in_: usize,
    width: usize,
    out: usize,
}

/// An expert as its checkpoint has it.
struct Stores([StoredMatrix; 3]);

impl Stores {
    fn new(shape: Shape, stored: Stored, s: &mut Samples) -> Self {
        let Shape { in_, width, out } = shape;
        Self([(width, in_), (width, in_), (out, width)].map(|(rows, cols)| s.matrix(rows, cols, stored, 1.0)))
    }

    fn pack(&self, n: Numerics) -> Ffn {
        let [gate, up, down] = self.0.each_ref().map(StoredMatrix::matrix);
        Ffn::pack(&gate, &up, &down, n)
    }

    /// Of every row of x.
    fn expected(&self, n: Numerics, x: &[f32]) -> Vec<Vec<f32>> {
        let matrices = self.0.each_ref().map(StoredMatrix::matrix);
        x.chunks_exact(matrices[0].cols).map(|x| reference::ffn(&matrices, n, x)).collect()
    }
}

/// A call of `grouped_experts`: each group is an expert and rows of x.
#[derive(Clone, Debug)]
struct Call {
    groups: Vec<(usize, Vec<u32>)>,
    rows: usize,
}

fn check_grouped(shape: Shape, stored: Stored, call: &Call, seed: u64) {
    let mut s = Samples::new(seed);
    let count = call.groups.iter().map(|(expert, _)| expert + 1).max().unwrap_or(0);
    let stores: Vec<Stores> = (0..count).map(|_| Stores::new(shape, stored, &mut s)).collect();
    let x: Vec<bf16> = s.values(call.rows * shape.in_, 1.0).into_iter().map(bf16::from_f32).collect();
    let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    on_all_numerics(
        |n| {
            let of: Vec<_> = stores.iter().map(|e| e.expected(n, &wide)).collect();
            let picked = |(expert, rows): &(usize, Vec<u32>)| {
                rows.iter().flat_map(|row| of[*expert][*row as usize].clone()).collect::<Vec<f32>>()
            };
            call.groups.iter().flat_map(picked).collect::<Vec<f32>>()
        },
        |n, expected| {
            let experts: Vec<Ffn> = stores.iter().map(|e| e.pack(n)).collect();
            let groups: Vec<(&Ffn, &[u32])> = call.groups.iter().map(|(e, rows)| (&experts[*e], &rows[..])).collect();
            for pool in pools() {
                for (name, x) in [("f32", RowsRef::F32(&wide)), ("bf16", RowsRef::Bf16(&x))] {
                    let mut y = vec![f32::NAN; expected.len()];
                    grouped_experts(pool, &groups, x, &mut y);
                    assert_bits(&y, expected, format_args!("{n:?}, {} threads, x in {name}", pool.threads()));
                }
            }
        },
    );
}

fn check_alone(shape: Shape, stored: Stored, rows: usize, seed: u64) {
    let mut s = Samples::new(seed);
    let stores = Stores::new(shape, stored, &mut s);
    let x = s.values(rows * shape.in_, 1.0);
    on_all_numerics(
        |n| stores.expected(n, &x),
        |n, expected| {
            let ffn = stores.pack(n);
            for pool in pools() {
                let mut y = vec![f32::NAN; rows * shape.out];
                ffn.forward(pool, RowsRef::F32(&x), &mut y);
                assert_bits(&y, &expected.concat(), format_args!("{n:?}, {} threads", pool.threads()));
            }
            for (x, expected) in x.chunks_exact(shape.in_).zip(expected) {
                let mut y = vec![f32::NAN; shape.out];
                ffn.forward(&pools()[0], RowsRef::F32(x), &mut y);
                assert_bits(&y, expected, format_args!("{n:?}, a row alone"));
            }
        },
    );
}

fn any_shape() -> impl Strategy<Value = Shape> {
    (1..50usize, 1..50usize, 1..50usize).prop_map(|(in_, width, out)| Shape { in_, width, out })
}

/// Up to 7 groups of up to 6 experts; rows come in any order, twice, or not at all.
fn any_call() -> impl Strategy<Value = Call> {
    (1..=12usize).prop_flat_map(|rows| {
        let pick = prop::collection::vec(0..rows as u32, 0..20);
        let groups = prop::collection::vec((0..6usize, prop_oneof![4 => pick, 1 => Just(vec![])]), 0..8);
        groups.prop_map(move |groups| Call { groups, rows })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn alone_equals_the_plain_loop(
        (shape, stored) in (any_shape(), any_stored()),
        rows in 0..20usize,
        seed in any::<u64>(),
    ) {
        check_alone(shape, stored, rows, seed);
    }

    #[test]
    fn grouped_equals_the_plain_loop(
        (shape, stored, call) in (any_shape(), any_stored(), any_call()),
        seed in any::<u64>(),
    ) {
        check_grouped(shape, stored, &call, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn alone_equals_the_plain_loop_on_threads(
        (in_, width, out) in (60..120usize, 60..300usize, 60..120usize),
        stored in any_stored(),
        seed in any::<u64>(),
    ) {
        let rows = (1usize << 20).div_ceil(width * in_.min(out));
        check_alone(Shape { in_, width, out }, stored, rows, seed);
    }

    /// A hot expert with most of the rows among others with few or none.
    #[test]
    fn grouped_equals_the_plain_loop_on_threads(
        (in_, width, out) in (60..100usize, 60..300usize, 60..100usize),
        (stored, hot) in (any_stored(), 0..5usize),
        // Work is counted for the mean expert when experts are cut: five times as much cuts each of them, too.
        (times, seed) in (prop_oneof![Just(1usize), Just(5)], any::<u64>()),
    ) {
        let mut s = Samples::new(seed);
        let picks = (times << 20).div_ceil(width * in_.min(out));
        let rows = 20;
        let mut pick = |count: usize| (0..count).map(|_| s.below(rows) as u32).collect::<Vec<u32>>();
        let groups = (0..5).map(|e| (e, pick(if e == hot { picks } else { e * 2 }))).collect();
        check_grouped(Shape { in_, width, out }, stored, &Call { groups, rows }, seed);
    }
}

#[test]
fn groupings_of_the_same_rows() {
    let shape = Shape { in_: 33, width: 18, out: 20 };
    let cases: [&[(usize, &[u32])]; 7] = [
        &[],
        &[(0, &[])],
        &[(0, &[]), (1, &[]), (2, &[0])],
        &[(2, &[5]), (0, &[]), (1, &[5, 5, 5])],
        &[(0, &[3, 1, 2, 0]), (0, &[0, 1, 2, 3])],
        &[(0, &[0, 1, 2, 3, 4, 5]), (1, &[0, 1, 2, 3, 4, 5]), (2, &[0, 1, 2, 3, 4, 5])],
        &[(0, &[0]), (1, &[0]), (2, &[0]), (0, &[1]), (1, &[1]), (2, &[1])],
    ];
    for groups in cases {
        let call = Call { groups: groups.iter().map(|(e, rows)| (*e, rows.to_vec())).collect(), rows: 6 };
        for stored in [Stored::F32, Stored::Bf16, Stored::Fp8([16, 16]), Stored::Fp8([4, 3])] {
            check_grouped(shape, stored, &call, 1);
        }
    }
}

/// gate, up and down may be stored differently where they read rows in the same form.
#[test]
fn storages_may_be_mixed() {
    let mut s = Samples::new(4);
    let stores = Stores([
        s.matrix(18, 33, Stored::F16, 1.0),
        s.matrix(18, 33, Stored::Bf16, 1.0),
        s.matrix(20, 18, Stored::Fp8([8, 5]), 1.0),
    ]);
    let x = s.values(3 * 33, 1.0);
    on_all_numerics(
        |n| stores.expected(n, &x).concat(),
        |n, expected| {
            let mut y = vec![f32::NAN; 60];
            stores.pack(n).forward(&pools()[0], RowsRef::F32(&x), &mut y);
            assert_bits(&y, expected, format_args!("{n:?}"));
        },
    );
}

fn zeros(rows: usize, cols: usize, bytes: &[u8]) -> Matrix<'_> {
    Matrix { rows, cols, data: MatrixData::F32(&bytes[..rows * cols * 4]) }
}

fn ffn_of(shape: Shape) -> Ffn {
    let Shape { in_, width, out } = shape;
    let bytes = vec![0; 4 * width * in_.max(out)];
    let (gate, down) = (zeros(width, in_, &bytes), zeros(out, width, &bytes));
    Ffn::pack(&gate, &gate, &down, Numerics::portable(Dtype::F32))
}

#[test]
fn an_expert_of_no_width_gives_zeros() {
    let mut y = [f32::NAN; 10];
    ffn_of(Shape { in_: 3, width: 0, out: 5 }).forward(&pools()[1], RowsRef::F32(&[1.0; 6]), &mut y);
    assert_eq!(y, [0.0; 10]);
}

#[test]
fn says_its_bytes() {
    // 17 outputs fill two panels of 16, 5 one.
    let bytes = ffn_of(Shape { in_: 3, width: 17, out: 5 }).bytes();
    assert_eq!(bytes, size_of::<f32>() * (2 * 32 * 3 + 16 * 17));
}

#[test]
#[should_panic(expected = "experts of one call differ in shape")]
fn experts_of_a_call_have_one_shape() {
    let (a, b) = (ffn_of(Shape { in_: 3, width: 4, out: 5 }), ffn_of(Shape { in_: 3, width: 4, out: 6 }));
    grouped_experts(&pools()[0], &[(&a, &[0]), (&b, &[0])], RowsRef::F32(&[0.0; 3]), &mut [0.0; 11]);
}

#[test]
#[should_panic(expected = "y does not have one row for each row of each group")]
fn every_row_has_its_place() {
    let a = ffn_of(Shape { in_: 3, width: 4, out: 5 });
    grouped_experts(&pools()[0], &[(&a, &[0, 0])], RowsRef::F32(&[0.0; 3]), &mut [0.0; 5]);
}

#[test]
#[should_panic(expected = "y has rows, but there are no groups")]
fn without_groups_there_are_no_rows() {
    grouped_experts(&pools()[0], &[], RowsRef::F32(&[0.0; 3]), &mut [0.0; 5]);
}

#[test]
#[should_panic(expected = "gate and up are stored too differently")]
fn gate_and_up_read_the_same_rows() {
    let mut s = Samples::new(4);
    // By pairs, and one by one because no pair may lie across two blocks.
    let by_pairs = Numerics::all().into_iter().find(|n| n.name() == "bf16-dp").unwrap();
    Stores([
        s.matrix(18, 33, Stored::Bf16, 1.0),
        s.matrix(18, 33, Stored::Fp8([8, 5]), 1.0),
        s.matrix(20, 18, Stored::Bf16, 1.0),
    ])
    .pack(by_pairs);
}
