//! One linear over rows, and a linear of its own for each head.

use half::bf16;
use moesaic_kernels::cuda::{GpuLinear, GpuPerHead, Strides};
use proptest::prelude::*;

use moesaic_emulator::test_device as device;

use crate::support::{Random, Stored};

fn bits(x: &[bf16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn f32s(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn a_linear_is_the_plain_loop_and_keeps_rule_1(
        in_ in (1..60usize).prop_map(|n| n * 8),
        out in 1..300usize,
        rows in prop_oneof![1..9usize, 9..65usize, 65..140usize],
        is_fp8 in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (mut random, device) = (Random::new(seed), device(32 << 20, seed));
        let weights = Stored::random(&mut random, out, in_, is_fp8);
        let linear = GpuLinear::load(&device, &weights.matrix()).unwrap();
        let forward = |x: &[bf16], rows: usize| {
            let (x, y) = (device.buffer_of(&bits(x)).unwrap(), device.buffer::<f32>(rows * out).unwrap());
            linear.queue(&device, rows, x.view(), y.view()).unwrap();
            let mut returned = device.returned::<f32>(rows * out).unwrap();
            device.queue_return(y.view(), &mut returned, rows * out).unwrap();
            device.finish().unwrap();
            returned.values().to_vec()
        };
        let x = random.bf16s(rows * in_);
        let y = forward(&x, rows);
        for (x, y) in x.chunks_exact(in_).zip(y.chunks_exact(out)) {
            for (y, expected) in y.iter().zip(weights.times(&f32s(x))) {
                prop_assert!((y - expected).abs() < 1e-3, "{y}, expected {expected}");
            }
        }
        let row = random.below(rows);
        let alone = forward(&x[row * in_..][..in_], 1);
        let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&alone), bits(&y[row * out..][..out]));
    }

    #[test]
    fn each_head_has_a_linear_of_its_own(
        heads in 1..6usize,
        in_ in (1..20usize).prop_map(|n| n * 8),
        out in 1..100usize,
        rows in 1..40usize,
        gap in 0..9usize,
        seed in any::<u64>(),
    ) {
        let (mut random, device) = (Random::new(seed), device(32 << 20, seed));
        let w: Vec<f32> = f32s(&random.bf16s(heads * out * in_));
        let linears = GpuPerHead::load(&device, heads, out, in_, &w).unwrap();
        // [heads, rows, in]
        let x = random.bf16s(heads * rows * in_);
        let strides = Strides { row: heads * (out + gap), head: out + gap };
        let untouched = vec![0x7fc1u16; rows * strides.row];
        let (from, to) = (device.buffer_of(&bits(&x)).unwrap(), device.buffer_of(&untouched).unwrap());
        linears.queue(&device, rows, from.view(), to.view(), strides).unwrap();
        let mut returned = device.returned::<u16>(untouched.len()).unwrap();
        device.queue_return(to.view(), &mut returned, untouched.len()).unwrap();
        device.finish().unwrap();
        for (row, y) in returned.values().chunks_exact(strides.row).enumerate() {
            for (head, y) in y.chunks_exact(strides.head).enumerate() {
                let x = f32s(&x[(head * rows + row) * in_..][..in_]);
                let w = &w[head * out * in_..][..out * in_];
                for (y, w) in y.iter().zip(w.chunks_exact(in_)) {
                    let expected: f32 = w.iter().zip(&x).map(|(w, x)| w * x).sum();
                    let y = bf16::from_bits(*y).to_f32();
                    prop_assert!((y - expected).abs() < 0.01 * (1.0 + expected.abs()), "{y}, expected {expected}");
                }
                prop_assert!(y[out..].iter().all(|y| *y == 0x7fc1), "a write between heads");
            }
        }
    }
}
