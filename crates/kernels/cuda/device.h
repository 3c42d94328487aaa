// What a GPU's thread can do beyond C++: the one file with instructions in it. The emulator that tests run these sources
// on has the same names in a header of its own.
#pragma once

#ifdef MOESAIC_EMULATOR
#include "emulator.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

/// A kernel with one argument, in blocks of `threads`, of which a multiprocessor holds `blocks` at a time.
#define KERNEL(name, threads, blocks, Call) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Call call)

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 block() { return blockIdx.x; }
DEVICE u32 blocks() { return gridDim.x; }

/// The block's dynamic shared memory.
DEVICE u8* shared() {
    extern __shared__ __align__(128) u8 bytes[];
    return bytes;
}

DEVICE void block_sync() { __syncthreads(); }
DEVICE void warp_sync() { __syncwarp(); }

/// The value of lane `lane ^ mask` of the warp.
DEVICE float from_lane(float value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE u32 from_lane(u32 value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE u64 from_lane(u64 value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
/// The value of lane `lane - delta`, of the lane itself where there is none.
DEVICE u32 from_lane_before(u32 value, u32 delta) { return __shfl_up_sync(~0u, value, delta); }
DEVICE u64 from_lane_before(u64 value, u32 delta) { return __shfl_up_sync(~0u, value, delta); }
DEVICE u32 from_last_lane(u32 value) { return __shfl_sync(~0u, value, 31); }
DEVICE u64 from_last_lane(u64 value) { return __shfl_sync(~0u, value, 31); }

/// Starts a copy of 16 bytes from global to shared memory, both aligned to 16; zeros where not `live`.
DEVICE void copy_16(void* to, const void* from, bool live) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(live ? 16 : 0) : "memory");
}

/// The same for what is read once: the second-level cache lets go of it first.
DEVICE void copy_16_once(void* to, const void* from) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "l"(policy) : "memory");
}

DEVICE void copy_8(void* to, const void* from) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
}

/// The copies that this thread has started since the last call are a group.
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most the last N groups of this thread are still on their way.
template <int N>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// c[16, 8] += a[16, 16] b[16, 8] by the warp, f32 sums of bf16 pairs. Lane 4g + t has, low half first, of a: (row g, k 2t
/// and 2t+1), (row g+8, the same k), (row g, k 2t+8 and 2t+9), (row g+8, those); of b: (k 2t and 2t+1, column g), (k 2t+8
/// and 2t+9, column g); of c: (row g, column 2t), (row g, 2t+1), (row g+8, 2t), (row g+8, 2t+1).
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four matrices of 8 rows of 8 bf16 from shared memory: lane 8i + r says where row r of matrix i begins, and lane 4g + t gets,
/// of each, columns 2t and 2t+1 of row g.
DEVICE void load_matrices(u32 (&to)[4], const void* row) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
/// The same, but of each rows 2t and 2t+1 of column g.
DEVICE void load_matrices_turned(u32 (&to)[4], const void* row) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

/// Both halves as bf16, each product rounded once; denormals are numbers like others.
DEVICE u32 multiply_bf16_pairs(u32 x, u32 y) {
    u32 product;
    // -0 leaves every product as it is.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(x), "r"(y), "r"(0x80008000));
    return product;
}

/// To nearest, ties to even.
DEVICE u16 bf16_of(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

DEVICE float bits_as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_as_bits(float x) { return __float_as_uint(x); }

DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
/// exp, off by a few units of the last place.
DEVICE float fast_exp(float x) { return __expf(x); }
DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }
DEVICE float reciprocal_root(float x) { return __frsqrt_rn(x); }
/// To the nearest integer, ties to even.
DEVICE float nearest(float x) { return rintf(x); }
/// The upper half of a * b.
DEVICE u64 product_high(u64 a, u64 b) { return __umul64hi(a, b); }

struct alignas(16) Four {
    u32 x[4];
};

/// One load of 16 bytes.
DEVICE Four load_four(const void* from) {
    const uint4 v = *static_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
}

/// Of the block's shared memory, by any of its threads. A half at a time: there is an instruction for that.
DEVICE void add_shared(u64* to, u64 value) {
    u32* halves = reinterpret_cast<u32*>(to);
    u32 low = static_cast<u32>(value), before = atomicAdd(halves, low);
    u32 high = static_cast<u32>(value >> 32) + (before + low < before);
    if (high > 0) atomicAdd(halves + 1, high);
}

#endif

DEVICE float bf16_value(u16 bits) { return bits_as_float(static_cast<u32>(bits) << 16); }
DEVICE float larger(float a, float b) { return a > b ? a : b; }
DEVICE float minus_infinity() { return bits_as_float(0xff800000); }
DEVICE float number_or_least(float x) { return x == x ? x : minus_infinity(); }

/// The sum over the lanes up to this one.
template <class T>
DEVICE T sum_up_to_lane(T value) {
    for (u32 delta = 1; delta < 32; delta *= 2) {
        T before = from_lane_before(value, delta);
        if (thread() % 32 >= delta) value += before;
    }
    return value;
}

/// exp of a number that is not above 0, with the bits of `math.rs`.
DEVICE float exact_exp(float x) {
    float inside = larger(-87, x), n = nearest(inside * 1.44269504f);
    float r = fused(n, -0.693359375f, inside);
    r = fused(n, 2.1219444e-4f, r);
    float p = 1.0f / 5040;
    p = fused(p, r, 1.0f / 720);
    p = fused(p, r, 1.0f / 120);
    p = fused(p, r, 1.0f / 24);
    p = fused(p, r, 1.0f / 6);
    p = fused(p, r, 0.5f);
    p = fused(p, r, 1);
    p = fused(p, r, 1);
    // Doubled and then scaled by 2^(n-1).
    float e = (p + p) * bits_as_float(static_cast<u32>(static_cast<int>(n) + 126) << 23);
    return x < -86.6f ? 0 : e;
}
