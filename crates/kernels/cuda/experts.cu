// The experts of a layer in two launches: h = silu(x gateᵀ) * (x upᵀ), then y = h downᵀ and the outputs that were asked for.
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
    /// Output i adds up terms firsts[i]..firsts[i + 1]: w * y of the first, then fused multiply-adds, in order. One without
    /// terms is not written. No outputs are asked for: y is all.
    u32 outputs;
    const u32* firsts;
    const u32* rows;
    const float* weights;
    /// [outputs, out]
    float* sums;
    /// Tiles that are done, of each block of outputs; zeros, and left as such.
    u32* done;
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

/// The sums of a block of outputs, by the block that has done the last of its tiles.
template <class T>
DEVICE void add_up(const Down& call, u32 output_block) {
    constexpr u32 WIDTH = T::STRIPS * STRIP;
    for (u32 at = thread(); at < call.outputs * WIDTH; at += T::THREADS) {
        u32 output = at / WIDTH, column = output_block * WIDTH + at % WIDTH;
        if (column >= call.out) continue;
        u32 first = call.firsts[output], last = call.firsts[output + 1];
        if (first == last) continue;
        float sum = call.weights[first] * load_fresh(call.y + static_cast<u64>(call.rows[first]) * call.out + column);
        for (u32 term = first + 1; term < last; term++) {
            sum = fused(call.weights[term], load_fresh(call.y + static_cast<u64>(call.rows[term]) * call.out + column), sum);
        }
        call.sums[static_cast<u64>(output) * call.out + column] = sum;
    }
}

template <class T>
DEVICE void down(const Down& call) {
    WorkList list = T::list(call.grouped);
    u32 chunks = list.tiles[call.grouped.groups] / T::output_blocks(call.grouped);
    u32* is_last = list.end(call.grouped.groups);
    T::run(call.grouped, list, [&](const typename T::Place& place, const T& tile) {
        tile.each_output(call.grouped, place, call.out, [&](u32 row, u32 output, float y) {
            call.y[static_cast<u64>(row) * call.out + output] = y;
        });
        if (call.outputs == 0) return;
        publish();
        block_sync();
        if (thread() == 0) *is_last = count_up(call.done + place.output_block, chunks - 1) == chunks - 1;
        block_sync();
        if (*is_last) {
            publish();
            add_up<T>(call, place.output_block);
        }
    });
}

#define EXPERTS(name, blocks, ...)                                                                           \
    KERNEL(gate_up_##name, (__VA_ARGS__::THREADS), blocks, GateUp) { gate_up<__VA_ARGS__>(call); }          \
    KERNEL(down_##name, (__VA_ARGS__::THREADS), blocks, Down) { down<__VA_ARGS__>(call); }

TILES(EXPERTS, fp8, Fp8)
TILES(EXPERTS, bf16, Bf16)
