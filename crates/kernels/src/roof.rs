//! What the machine can do at most, measured: the roofs that speeds are held against.

use std::hint::black_box;
use std::time::Instant;

use crate::pool::Pool;
use crate::simd::{Isa, Kernel, LANES, Lanes, Simd};

/// Rates of so many threads together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roof {
    pub threads: usize,
    /// Bytes a second read from memory, in order.
    pub read: f64,
    /// Multiply-adds a second, in registers: f32, bf16 (by pairs where the processor has them and they are faster), and INT8.
    pub fma: f64,
    pub bf16: f64,
    pub int8: f64,
}

/// Far more than a processor caches, each thread's own.
const READ_BYTES: usize = 192 << 20;
const READ_ROUNDS: usize = 5;
const CHAINS: usize = 16;
const CHAIN_STEPS: usize = 2_000_000;

impl Roof {
    /// Takes about a second. Medians of several rounds; the pool should have nothing else to do.
    pub fn measure(pool: &Pool) -> Self {
        let isa = Isa::best();
        let steps = (CHAINS * CHAIN_STEPS * LANES * pool.threads()) as f64;
        let [fma, pairs, int8] = [(Step::Fma, 1.0), (Step::Pairs, 2.0), (Step::Quads, 4.0)]
            .map(|(step, products)| products * steps / rate(pool, |_| isa.run(Chains(step))));
        let bf16 = if isa.has_dot_pairs() { fma.max(pairs) } else { fma };
        let memory: Vec<Vec<Lanes>> =
            (0..pool.threads()).map(|_| vec![Lanes([1.0; LANES]); READ_BYTES / size_of::<Lanes>()]).collect();
        let read = rate(pool, |thread| isa.run(Read { memory: &memory[thread] }));
        Self { threads: pool.threads(), read: (READ_BYTES * pool.threads()) as f64 / read, fma, bf16, int8 }
    }
}

/// The median time of a round in which each thread runs `work` once.
fn rate(pool: &Pool, work: impl Fn(usize) -> f32 + Sync) -> f64 {
    let mut times: Vec<f64> = (0..READ_ROUNDS)
        .map(|_| {
            let start = Instant::now();
            pool.each(pool.threads(), usize::MAX, |thread| {
                black_box(work(thread));
            });
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

#[derive(Clone, Copy)]
enum Step {
    Fma,
    Pairs,
    Quads,
}

/// Independent chains of multiply-adds that never leave the registers.
struct Chains(Step);

impl Kernel for Chains {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (x, w) = (black_box(0x3f80_3f80u32), black_box([0x3f80_3f80; LANES]));
        let (pairs, quads) = (s.pairs_bf16(&w), s.quads(&w));
        let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        let mut acc = [s.splat(0.0); CHAINS];
        for _ in 0..CHAIN_STEPS {
            for acc in &mut acc {
                *acc = match self.0 {
                    Step::Fma => s.fma(a, *acc, b),
                    Step::Pairs => s.dot_pairs(x, pairs, *acc),
                    Step::Quads => s.dot_quads(x, quads, *acc),
                };
            }
        }
        let mut lanes = [0.0; LANES];
        acc.iter()
            .map(|acc| {
                s.store(*acc, &mut lanes);
                lanes[0]
            })
            .sum()
    }
}

struct Read<'a> {
    memory: &'a [Lanes],
}

impl Kernel for Read<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sum = [s.splat(0.0); 8];
        for block in self.memory.as_chunks::<8>().0 {
            for (sum, lanes) in sum.iter_mut().zip(block) {
                *sum = s.add(*sum, s.load(&lanes.0));
            }
        }
        let mut lanes = [0.0; LANES];
        sum.iter()
            .map(|sum| {
                s.store(*sum, &mut lanes);
                lanes[0]
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roofs_are_in_the_range_of_machines_that_there_are() {
        let roof = Roof::measure(&Pool::new(1));
        assert_eq!(roof.threads, 1);
        assert!((1e8..1e12).contains(&roof.read), "{roof:?}");
        assert!([roof.fma, roof.bf16, roof.int8].iter().all(|rate| (1e8..1e12).contains(rate)), "{roof:?}");
    }
}
