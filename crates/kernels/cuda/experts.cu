// The experts of a layer in three launches: h = silu(x gateᵀ) * (x upᵀ), then y = h downᵀ, then the outputs that were asked for.
#include "tile.h"

/// A strip has the same 16 columns of h twice: its first m-tile makes gate of them, its second up.
struct GateUp {
    Grouped grouped;
    /// Columns of h; a multiple of 8.
    u32 width;
    /// bf16 [rows, width]
    u16* h;
};

struct Down {
    Grouped grouped;
    u32 out;
    /// [rows, out]
    float* y;
};

struct AddUp {
    /// [rows, out]
    const float* y;
    u32 out;
    /// Output i adds up terms firsts[i]..firsts[i + 1]: w * y of the first, then fused multiply-adds, in order. One without
    /// terms is not written.
    u32 outputs;
    const u32* firsts;
    const u32* rows;
    const float* weights;
    /// [outputs, out]
    float* sums;
};

template <class T>
DEVICE void gate_up(const GateUp& call) {
    WorkList list = T::list(call.grouped);
    T::run(call.grouped, list, [&](const typename T::Place& place, const T& tile) {
        tile.each(call.grouped, place, [&](u32 strip, u32 row, u32 i, float gate, float up) {
            u32 column = strip * 16 + i;
            if (column < call.width) {
                call.h[static_cast<u64>(row) * call.width + column] = bf16_of(fast_divide(gate, 1 + fast_exp(-gate)) * up);
            }
        });
    });
}

template <class T>
DEVICE void down(const Down& call) {
    WorkList list = T::list(call.grouped);
    T::run(call.grouped, list, [&](const typename T::Place& place, const T& tile) {
        tile.each_output(call.grouped, place, call.out, [&](u32 row, u32 output, float y) {
            call.y[static_cast<u64>(row) * call.out + output] = y;
        });
    });
}

/// Over all blocks: a thread has an output's column.
KERNEL(add_up_outputs, 256, 6, AddUp) {
    for (u32 at = block() * 256 + thread(); at < call.outputs * call.out; at += blocks() * 256) {
        u32 output = at / call.out, column = at % call.out;
        u32 first = call.firsts[output], last = call.firsts[output + 1];
        if (first == last) continue;
        float sum = call.weights[first] * call.y[static_cast<u64>(call.rows[first]) * call.out + column];
        for (u32 term = first + 1; term < last; term++) {
            sum = fused(call.weights[term], call.y[static_cast<u64>(call.rows[term]) * call.out + column], sum);
        }
        call.sums[at] = sum;
    }
}

#define EXPERTS(name, blocks, ...)                                                                           \
    KERNEL(gate_up_##name, (__VA_ARGS__::THREADS), blocks, GateUp) { gate_up<__VA_ARGS__>(call); }          \
    KERNEL(down_##name, (__VA_ARGS__::THREADS), blocks, Down) { down<__VA_ARGS__>(call); }

TILES(EXPERTS, fp8, Fp8)
TILES(EXPERTS, bf16, Bf16)
