// One linear over rows, and a linear of its own for each head.
#include "tile.h"

/// y = x Wᵀ; one group.
struct Linear {
    Grouped grouped;
    u32 out;
    /// [rows, out]
    float* y;
};

/// A group is a head with `grouped.count` rows; its results go to that head's place in the rows of y.
struct PerHead {
    Grouped grouped;
    u32 out;
    /// Values from one row of y to the next, and from one head to the next.
    u32 row_stride, head_stride;
    /// bf16
    u16* y;
};

template <class T>
DEVICE void linear(const Linear& call) {
    WorkList list(shared() + T::STAGES * T::STAGE_BYTES, call.grouped.groups);
    list.fill(call.grouped, T::ROWS, (call.grouped.strips + T::STRIPS - 1) / T::STRIPS);
    T::run(call.grouped, list, shared(), [&](const typename T::Place& place, const T& tile) {
        tile.each(call.grouped, place, [&](u32 strip, u32 row, u32 i, float low, float high) {
            u32 output = strip * STRIP + i;
            float* y = call.y + static_cast<u64>(row) * call.out + output;
            if (output < call.out) y[0] = low;
            if (output + 16 < call.out) y[16] = high;
        });
    });
}

template <class T>
DEVICE void per_head(const PerHead& call) {
    WorkList list(shared() + T::STAGES * T::STAGE_BYTES, call.grouped.groups);
    list.fill(call.grouped, T::ROWS, (call.grouped.strips + T::STRIPS - 1) / T::STRIPS);
    T::run(call.grouped, list, shared(), [&](const typename T::Place& place, const T& tile) {
        tile.each(call.grouped, place, [&](u32 strip, u32 row, u32 i, float low, float high) {
            u32 output = strip * STRIP + i, in_head = row - place.group * call.grouped.count;
            u16* y = call.y + static_cast<u64>(in_head) * call.row_stride + place.group * call.head_stride + output;
            if (output < call.out) y[0] = bf16_of(low);
            if (output + 16 < call.out) y[16] = bf16_of(high);
        });
    });
}

#define LINEAR(name, blocks, ...) \
    KERNEL(linear_##name, (__VA_ARGS__::THREADS), blocks, Linear) { linear<__VA_ARGS__>(call); }
#define PER_HEAD(name, blocks, ...) \
    KERNEL(per_head_##name, (__VA_ARGS__::THREADS), blocks, PerHead) { per_head<__VA_ARGS__>(call); }

TILES(LINEAR, fp8, Fp8)
TILES(LINEAR, bf16, Bf16)
// Heads are made of FP8 blocks by way of bf16: their rows and columns are cut between the blocks.
TILES(PER_HEAD, bf16, Bf16)
