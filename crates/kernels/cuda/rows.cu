// The residual stream: embedding, norms, sums, and the gate's logits. A block has a row.
#include "rows.h"

constexpr u32 THREADS = 256;

struct Embed {
    const u32* tokens;
    /// bf16 [vocabulary, hidden]
    const u16* table;
    u32 rows, hidden;
    /// [rows, hidden]
    float* h;
};

KERNEL(embed_rows, 256, 4, Embed) {
    for (u32 row = block(); row < call.rows; row += blocks()) {
        const u16* from = call.table + static_cast<u64>(call.tokens[row]) * call.hidden;
        float* to = call.h + static_cast<u64>(row) * call.hidden;
        for (u32 i = thread(); i < call.hidden; i += THREADS) to[i] = bf16_value(from[i]);
    }
}

struct Norm {
    /// [.., hidden]; first changed to h + (y + shared), where those are.
    float* h;
    const float* y;
    const float* shared;
    /// The row of h that each row is; none: row i is row i.
    const u32* pick;
    const float* weight;
    u32 rows, hidden;
    float eps;
    /// norm(h): bf16 [rows, hidden], and where it is wanted as it is before rounding.
    u16* x;
    float* exact;
};

KERNEL(norm_rows, 256, 4, Norm) {
    for (u32 row = block(); row < call.rows; row += blocks()) {
        u64 of_h = static_cast<u64>(call.pick ? call.pick[row] : row) * call.hidden, at = static_cast<u64>(row) * call.hidden;
        float* h = call.h + of_h;
        if (call.y) {
            for (u32 i = thread(); i < call.hidden; i += THREADS) {
                float y = call.y[of_h + i];
                h[i] = h[i] + (call.shared ? y + call.shared[of_h + i] : y);
            }
            // Each thread reads what it wrote.
        }
        if (!call.weight) continue;
        float factor = norm_factor(h, call.hidden, call.eps);
        for (u32 i = thread(); i < call.hidden; i += THREADS) {
            float x = h[i] * factor * call.weight[i];
            call.x[at + i] = bf16_of(x);
            if (call.exact) call.exact[at + i] = x;
        }
    }
}

/// Rows that read a weight together.
constexpr u32 GATE_ROWS = 8;

struct Gate {
    /// [rows, hidden]
    const float* x;
    /// [experts, hidden]
    const float* weight;
    u32 rows, hidden, experts;
    /// [rows, experts]
    float* logits;
};

/// A warp has an expert for GATE_ROWS rows; each lane adds up every 32nd product.
KERNEL(gate_rows, 256, 4, Gate) {
    u32 lane = thread() % 32, row_blocks = (call.rows + GATE_ROWS - 1) / GATE_ROWS;
    for (u32 item = block() * 8 + thread() / 32; item < row_blocks * call.experts; item += blocks() * 8) {
        u32 expert = item % call.experts, first = item / call.experts * GATE_ROWS;
        const float* weight = call.weight + static_cast<u64>(expert) * call.hidden;
        float sum[GATE_ROWS] = {};
        for (u32 i = lane; i < call.hidden; i += 32) {
            float w = weight[i];
#pragma unroll
            for (u32 r = 0; r < GATE_ROWS; r++) {
                u32 row = first + r < call.rows ? first + r : call.rows - 1;
                sum[r] = fused(call.x[static_cast<u64>(row) * call.hidden + i], w, sum[r]);
            }
        }
#pragma unroll
        for (u32 r = 0; r < GATE_ROWS; r++) {
            for (u32 mask = 16; mask > 0; mask /= 2) sum[r] = sum[r] + from_lane(sum[r], mask);
            if (lane == 0 && first + r < call.rows) call.logits[static_cast<u64>(first + r) * call.experts + expert] = sum[r];
        }
    }
}

/// What random weights are.
constexpr u32 RANDOM_FP8 = 0, RANDOM_BF16 = 1;

struct Fill {
    u8* to;
    /// A multiple of 4.
    u64 bytes;
    u64 seed;
    /// RANDOM_FP8: any code that is a number. RANDOM_BF16: numbers below `size` in magnitude.
    u32 kind;
    float size;
};

/// splitmix64
DEVICE u64 scrambled(u64 x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

/// Weights to measure with, the same for the same seed.
KERNEL(fill_random, 256, 4, Fill) {
    u32* to = reinterpret_cast<u32*>(call.to);
    for (u64 i = static_cast<u64>(block()) * THREADS + thread(); i < call.bytes / 4; i += static_cast<u64>(blocks()) * THREADS) {
        u32 word = static_cast<u32>(scrambled(call.seed + i));
        if (call.kind == RANDOM_FP8) {
            // NaNs are the codes with all seven low bits: those lose one.
            u32 all = word & (word >> 1);
            all = all & (all >> 2) & (word >> 4) & (word >> 5) & (word >> 6) & 0x01010101;
            to[i] = word & ~all;
        } else {
            float low = (static_cast<float>(word & 0xffff) / 32768 - 1) * call.size;
            float high = (static_cast<float>(word >> 16) / 32768 - 1) * call.size;
            to[i] = bf16_of(low) | static_cast<u32>(bf16_of(high)) << 16;
        }
    }
}
