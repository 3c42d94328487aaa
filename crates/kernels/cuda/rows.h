// What blocks of 256 threads do with a row.
#pragma once
#include "device.h"

constexpr u32 ROW_THREADS = 256;
/// Values that a thread has on their way from memory at a time: a load that waits for the store before it would take as long alone.
constexpr u32 AHEAD = 8;

/// Calls `store(i, load(i))` for all values of a row, by all threads of a block. What is loaded may not be what another index stores.
template <class Load, class Store>
DEVICE void each_of_row(u32 len, Load load, Store store) {
    for (u32 first = thread(); first < len; first += AHEAD * ROW_THREADS) {
        decltype(load(0)) values[AHEAD];
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) values[j] = first + j * ROW_THREADS < len ? load(first + j * ROW_THREADS) : 0;
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) {
            if (first + j * ROW_THREADS < len) store(first + j * ROW_THREADS, values[j]);
        }
    }
}

/// Of 32 values that each lane has, lane i gets the sum of the i-th ones: of each value by the same tree.
DEVICE float sum_for_lane(float (&values)[32]) {
    u32 lane = thread() % 32;
#pragma unroll
    for (u32 half = 16; half > 0; half /= 2) {
        bool is_upper = (lane & half) != 0;
#pragma unroll
        for (u32 i = 0; i < half; i++) {
            float kept = is_upper ? values[i + half] : values[i], given = is_upper ? values[i] : values[i + half];
            values[i] = kept + from_lane(given, half);
        }
    }
    return values[0];
}

/// 1 / sqrt(mean of squares + eps), by all threads of a block: each adds up every 256th value, then warps their lanes, then all
/// the warps in order.
DEVICE float norm_factor(const float* x, u32 len, float eps) {
    float sum = 0;
    for (u32 i = thread(); i < len; i += ROW_THREADS) sum = fused(x[i], x[i], sum);
    for (u32 mask = 16; mask > 0; mask /= 2) sum = sum + from_lane(sum, mask);
    float* of_warps = reinterpret_cast<float*>(shared());
    // Of the row before nobody reads any more.
    block_sync();
    if (thread() % 32 == 0) of_warps[thread() / 32] = sum;
    block_sync();
    sum = 0;
    for (u32 warp = 0; warp < ROW_THREADS / 32; warp++) sum = sum + of_warps[warp];
    return reciprocal_root(fast_divide(sum, static_cast<float>(len)) + eps);
}
