// What blocks of 256 threads do with a row.
#pragma once
#include "device.h"

/// 1 / sqrt(mean of squares + eps), by all threads of a block: each adds up every 256th value, then warps their lanes, then all
/// the warps in order.
DEVICE float norm_factor(const float* x, u32 len, float eps) {
    float sum = 0;
    for (u32 i = thread(); i < len; i += 256) sum = fused(x[i], x[i], sum);
    for (u32 mask = 16; mask > 0; mask /= 2) sum = sum + from_lane(sum, mask);
    float* of_warps = reinterpret_cast<float*>(shared());
    // Of the row before nobody reads any more.
    block_sync();
    if (thread() % 32 == 0) of_warps[thread() / 32] = sum;
    block_sync();
    sum = 0;
    for (u32 warp = 0; warp < 8; warp++) sum = sum + of_warps[warp];
    return reciprocal_root(fast_divide(sum, static_cast<float>(len)) + eps);
}
