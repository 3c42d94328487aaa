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
    T::run(call.grouped, T::list(call.grouped), [&](const typename T::Place& place, const T& tile) {
        tile.each_output(call.grouped, place, call.out, [&](u32 row, u32 output, float y) {
            call.y[static_cast<u64>(row) * call.out + output] = y;
        });
    });
}

template <class T>
DEVICE void per_head(const PerHead& call) {
    T::run(call.grouped, T::list(call.grouped), [&](const typename T::Place& place, const T& tile) {
        tile.each_output(call.grouped, place, call.out, [&](u32 row, u32 output, float y) {
            u32 of_head = row - place.group * call.grouped.count;
            call.y[static_cast<u64>(of_head) * call.row_stride + place.group * call.head_stride + output] = bf16_of(y);
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
