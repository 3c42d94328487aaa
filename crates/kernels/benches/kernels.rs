//! `cargo bench -p moesaic-kernels [-- NAME [DTYPE]]`: each kernel's speed in bf16, or DTYPE, beside the machine's roofs, measured in the same run.
//!
//! Weights are far larger than the caches, as they are in a model. Before a kernel is timed, a row computed alone must
//! have the bits that it has in the batch; the tests compare every kernel with its plain reference.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use moesaic_kernels::{
    Draw, DtypeChoice, Expand, Ffn, LatentPages, Linear, Matrix, MatrixData, Numerics, PAGE_TOKENS, PerHead, Pool,
    Query, Roof, RowsRef, Span, draw, grouped_experts, int8_bytes, mla_attend, mla_attend_expanded,
};

/// Weights that a test passes over before it meets the first again. Third-level caches of servers have hundreds of megabytes.
const WORKING_SET_BYTES: usize = 1 << 30;
const ROUNDS: usize = 7;

struct Bench {
    pool: Pool,
    roof: Roof,
    filter: Option<String>,
    n: Numerics,
}

/// What one call of a kernel takes at least.
struct Work {
    bytes: f64,
    fma: f64,
}

impl Bench {
    /// `call(i)` is the i-th of `calls` that together are a round.
    fn time(&self, name: &str, calls: usize, work: Work, mut call: impl FnMut(usize)) {
        let mut times: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                (0..calls).for_each(&mut call);
                start.elapsed().as_secs_f64() / calls as f64
            })
            .collect();
        times.sort_unstable_by(f64::total_cmp);
        let time = times[ROUNDS / 2];
        let least = (work.bytes / self.roof.read).max(work.fma / self.fma_roof());
        println!(
            "{name:<44} {:>9.1} us {:>7.1} GB/s {:>8.1} GFLOP/s {:>5.0} %",
            1e6 * time,
            work.bytes / time / 1e9,
            2.0 * work.fma / time / 1e9,
            100.0 * least / time,
        );
    }

    /// Of linears; attention is always computed in bf16.
    fn fma_roof(&self) -> f64 {
        if self.n.quantises() { self.roof.int8 } else { self.roof.bf16 }
    }

    /// Bytes of a matrix: of INT8 as it is packed, else as the checkpoint has it, bf16 that is packed tighter, too.
    fn stored(&self, bytes: usize, out: usize, in_: usize) -> f64 {
        (if self.n.quantises() { int8_bytes(out, in_) } else { bytes }) as f64
    }

    fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }
}

/// Values about 1, others for each seed.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| draw()).collect()
}

/// About normal, as weights are: some are so small that few others have their exponent.
fn weights(len: usize, seed: u64) -> Vec<f32> {
    values(4 * len, seed).as_chunks::<4>().0.iter().map(|four| four.iter().sum()).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| moesaic_kernels::bf16::from_f32(*x).to_le_bytes()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn linear(bench: &Bench, fp8: bool) {
    let name = if fp8 { "linear fp8" } else { "linear bf16" };
    if !bench.wants(name) {
        return;
    }
    // The second is the gate of one of V3's experts.
    for (out, in_) in [(2048, 2048), (2048, 7168)] {
        linear_of(bench, name, fp8, out, in_);
    }
}

fn linear_of(bench: &Bench, name: &str, fp8: bool, out: usize, in_: usize) {
    let size = if fp8 { 1 } else { 2 };
    let count = WORKING_SET_BYTES / (out * in_ * size);
    let bytes = bf16_bytes(&weights(out * in_, 1));
    let codes: Vec<u8> = (0..out * in_).map(|i| (i * 37 % 120) as u8).collect();
    let scales = vec![0.01; out.div_ceil(128) * in_.div_ceil(128)];
    let data = match fp8 {
        true => MatrixData::Fp8 { q: &codes, scales: scales.into(), block: [128, 128] },
        false => MatrixData::Bf16(&bytes),
    };
    let matrix = Matrix { rows: out, cols: in_, data };
    let linears: Vec<Linear> = (0..count).map(|_| Linear::pack(&matrix, bench.n)).collect();
    for rows in [1, 2, 4, 8, 16, 32, 64, 512] {
        let x = values(rows * in_, 2);
        let (mut y, mut alone) = (vec![0.0; rows * out], vec![0.0; out]);
        linears[0].forward(&bench.pool, RowsRef::F32(&x), &mut y);
        linears[0].forward(&bench.pool, RowsRef::F32(&x[(rows - 1) * in_..]), &mut alone);
        assert_eq!(bits(&alone), bits(&y[(rows - 1) * out..]));
        let work = Work { bytes: bench.stored(out * in_ * size, out, in_), fma: (rows * out * in_) as f64 };
        let calls = count.min(4096 / rows.max(16));
        bench.time(&format!("{name} [{rows}, {in_}] x [{out}, {in_}]"), calls, work, |i| {
            linears[i].forward(&bench.pool, RowsRef::F32(&x), &mut y);
        });
    }
}

/// Layers of 64 experts of which each row takes 8.
fn experts(bench: &Bench) {
    if !bench.wants("experts") {
        return;
    }
    let (hidden, width, experts, top_k) = (1024, 512, 64, 8);
    let (up, down) = (bf16_bytes(&weights(width * hidden, 1)), bf16_bytes(&weights(width * hidden, 2)));
    let up = Matrix { rows: width, cols: hidden, data: MatrixData::Bf16(&up) };
    let down = Matrix { rows: hidden, cols: width, data: MatrixData::Bf16(&down) };
    let n = bench.n;
    let layer_bytes = experts * 3 * width * hidden * 2;
    let layer = || (0..experts).map(|_| Ffn::pack(&up, &up, &down, n)).collect::<Vec<Ffn>>();
    let layers: Vec<Vec<Ffn>> = (0..WORKING_SET_BYTES / layer_bytes).map(|_| layer()).collect();
    for rows in [1usize, 4, 16, 32, 64, 256] {
        let x = values(rows * hidden, 3);
        let mut picks: Vec<Vec<u32>> = vec![Vec::new(); experts];
        for row in 0..rows {
            (0..top_k).for_each(|k| picks[(row * 11 + k * (1 + row % 7)) % experts].push(row as u32));
        }
        let groups = |layer: usize| -> Vec<(&Ffn, &[u32])> {
            let all = layers[layer].iter().zip(&picks);
            all.filter(|(_, rows)| !rows.is_empty()).map(|(ffn, rows)| (ffn, &rows[..])).collect()
        };
        let first = groups(0);
        let mut y = vec![0.0; rows * top_k * hidden];
        grouped_experts(&bench.pool, &first, RowsRef::F32(&x), &mut y);
        let mut alone = vec![0.0; hidden];
        let row = first[0].1[0] as usize;
        first[0].0.forward(&bench.pool, RowsRef::F32(&x[row * hidden..][..hidden]), &mut alone);
        assert_eq!(bits(&alone), bits(&y[..hidden]));
        let stored = |out: usize, in_: usize| bench.stored(2 * out * in_, out, in_);
        let expert = 2.0 * stored(width, hidden) + stored(hidden, width);
        let fma = (3 * width * hidden * rows * top_k) as f64;
        let work = Work { bytes: expert * first.len() as f64, fma };
        bench.time(&format!("experts {rows} rows, 8 of 64 [{width}, {hidden}]"), layers.len(), work, |layer| {
            grouped_experts(&bench.pool, &groups(layer), RowsRef::F32(&x), &mut y);
        });
    }
}

/// A cache of one layer with so many tokens in it, and the pages they are in.
fn cached(n: Numerics, context: usize, latent: usize, rope: usize) -> (LatentPages, Vec<u32>) {
    let pages = context.div_ceil(PAGE_TOKENS);
    let mut cache = LatentPages::new(n, 1, pages, latent, rope);
    for t in 0..context {
        let token = values(latent + rope, t as u64);
        let (page, slot) = ((t / PAGE_TOKENS) as u32, t % PAGE_TOKENS);
        cache.write(0, page, slot, &token[..latent], &token[latent..]);
    }
    (cache, (0..pages as u32).collect())
}

/// Emitted tokens of a sequence each: 16 heads over a latent of 256 + 32.
fn attention(bench: &Bench) {
    if !bench.wants("attention") {
        return;
    }
    let (heads, latent, rope) = (16, 256, 32);
    let n = bench.n;
    for (rows, context) in [(1usize, 512usize), (1, 4096), (64, 512), (256, 1024)] {
        let (cache, table) = cached(n, rows * context, latent, rope);
        let q = values(rows * heads * (latent + rope), 9);
        let tables = table.chunks_exact(context / PAGE_TOKENS);
        let queries: Vec<Query<'_>> =
            tables.zip(q.chunks_exact(heads * (latent + rope))).map(|(pages, q)| Query { q, pages, context }).collect();
        let (mut out, mut alone) = (vec![0.0; rows * heads * latent], vec![0.0; heads * latent]);
        mla_attend(&bench.pool, &cache, 0, &queries, heads, 0.1, &mut out);
        mla_attend(&bench.pool, &cache, 0, &queries[..1], heads, 0.1, &mut alone);
        assert_eq!(bits(&alone), bits(&out[..heads * latent]));
        let work = Work { bytes: cache.bytes() as f64, fma: (rows * context * heads * (2 * latent + rope)) as f64 };
        bench.time(&format!("attention {rows} rows at {context}, 16 heads"), 4, work, |_| {
            mla_attend(&bench.pool, &cache, 0, &queries, heads, 0.1, &mut out);
        });
    }
}

/// Rows of a prompt behind what is cached already: 16 heads of 64 + 32 and 64, made of a latent of 256.
fn prompt_attention(bench: &Bench) {
    if !bench.wants("prompt attention") {
        return;
    }
    let (heads, latent, rope, nope, v, rows) = (16, 256, 32, 64, 64, 512);
    let n = bench.n;
    let per_head = |out: usize, seed| PerHead::pack_f32(heads, out, latent, &values(heads * out * latent, seed), n);
    let (key, value) = (per_head(nope, 1), per_head(v, 2));
    let expand = Expand { key: &key, value: &value };
    for start in [0usize, 1536] {
        let (cache, pages) = cached(n, start + rows, latent, rope);
        let q = values(rows * heads * (nope + rope), 9);
        let mut out = vec![0.0; rows * heads * v];
        let mut attend = |rows: std::ops::Range<usize>| {
            let span = Span { start: start + rows.start, rows, pages: &pages };
            mla_attend_expanded(&bench.pool, &cache, 0, &[span], expand, &q, 0.1, &mut out);
            bits(&out[(out.len() - heads * v)..])
        };
        let alone = attend(rows - 1..rows);
        assert_eq!(alone, attend(0..rows));
        let keys: usize = (0..rows).map(|row| start + row + 1).sum();
        let work = Work {
            bytes: cache.bytes() as f64,
            fma: (heads * (keys * (nope + rope + v) + (start + rows) * latent * (nope + v))) as f64,
        };
        bench.time(&format!("prompt attention {rows} rows behind {start}"), 4, work, |_| {
            attend(0..rows);
        });
    }
}

/// A token of DeepSeek-V3's vocabulary.
fn draws(bench: &Bench) {
    if !bench.wants("draw") {
        return;
    }
    let logits: Vec<f32> = values(129_280, 5).into_iter().map(|x| 10.0 * x).collect();
    let all = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 1 << 63, edits: Vec::new() };
    let cases = [
        ("the best", Draw { temperature: 0.0, ..all.clone() }),
        ("of all", all.clone()),
        ("top-k 50", Draw { top_k: 50, ..all.clone() }),
        ("top-p 0.95", Draw { top_p: 0.95, ..all }),
    ];
    for (name, how) in cases {
        let work = Work { bytes: (logits.len() * size_of::<f32>()) as f64, fma: 0.0 };
        bench.time(&format!("draw {name}"), 16, work, |_| {
            draw(&logits, &how);
        });
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let filter = arguments.next();
    let n = arguments.next().map_or(DtypeChoice::Bf16, |dtype| dtype.parse().unwrap()).numerics();
    let pool = Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let roof = Roof::measure(&pool);
    let bench = Bench { pool, roof, filter, n };
    println!(
        "{} on {}, {} threads; roof: reads {:.1} GB/s, {:.0} GFLOP/s\n",
        n.name(),
        n.isa(),
        roof.threads,
        roof.read / 1e9,
        2.0 * bench.fma_roof() / 1e9
    );
    linear(&bench, false);
    linear(&bench, true);
    experts(&bench);
    attention(&bench);
    prompt_attention(&bench);
    draws(&bench);
}
