// The names of device.h for a processor: a block's threads are fibers that take turns, and what a warp does together is done
// by the last of its lanes to arrive. Copies from global to shared memory happen when they are waited for, and until then
// their place holds NaNs; so does all shared memory at first.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

#define DEVICE inline

DEVICE float bits_as_float(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
DEVICE u32 float_as_bits(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

namespace emulator {

/// What the running thread is, and what its block shares.
extern u32 thread_index, block_index, block_count;
extern u8* shared_memory;

void block_barrier();

/// What a lane brings to an operation of its warp, and the operation, for the last one to arrive.
struct Offer {
    const void* in[2];
    void* inout;
};
using Together = void (*)(Offer (&lanes)[32]);
void together(Offer offer, Together operation);

void start_copy(void* to, const void* from, u32 bytes, bool live);
void end_copies();
void wait_for_copies(int groups_left);

using Body = void (*)(const void* call);
/// Where kernels make themselves known.
struct Kernel {
    Kernel(const char* name, u32 threads, u32 call_bytes, Body body);
};

template <class T>
T take_from(T value, u32 (*source)(u32 lane)) {
    static u32 (*of)(u32);
    of = source;
    T result{};
    together({{&value, nullptr}, &result}, [](Offer(&lanes)[32]) {
        for (u32 lane = 0; lane < 32; lane++) {
            *static_cast<T*>(lanes[lane].inout) = *static_cast<const T*>(lanes[of(lane)].in[0]);
        }
    });
    return result;
}

inline float bf16(u32 bits) { return bits_as_float(bits << 16); }

inline u16 to_bf16(float x) {
    u32 bits = float_as_bits(x);
    if (x != x) return static_cast<u16>(bits >> 16 | 0x40);
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void mma_of_warp(Offer (&lanes)[32]) {
    float a[16][16], b[16][8];
    for (u32 lane = 0; lane < 32; lane++) {
        const u32* a_of = static_cast<const u32*>(lanes[lane].in[0]);
        const u32* b_of = static_cast<const u32*>(lanes[lane].in[1]);
        u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 4; i++) {
            for (u32 j = 0; j < 2; j++) a[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = bf16(a_of[i] >> 16 * j & 0xffff);
        }
        for (u32 i = 0; i < 2; i++) {
            for (u32 j = 0; j < 2; j++) b[2 * t + i * 8 + j][g] = bf16(b_of[i] >> 16 * j & 0xffff);
        }
    }
    for (u32 lane = 0; lane < 32; lane++) {
        float* c = static_cast<float*>(lanes[lane].inout);
        for (u32 i = 0; i < 4; i++) {
            u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (u32 k = 0; k < 16; k++) c[i] = std::fma(a[row][k], b[k][column], c[i]);
        }
    }
}

inline u16 value_at(const Offer (&lanes)[32], u32 matrix, u32 row, u32 column) {
    u16 value;
    std::memcpy(&value, static_cast<const u8*>(lanes[matrix * 8 + row].in[0]) + column * 2, 2);
    return value;
}

/// ldmatrix, turned or not.
template <bool TURNED>
void matrices_of_warp(Offer (&lanes)[32]) {
    for (u32 lane = 0; lane < 32; lane++) {
        u32* to = static_cast<u32*>(lanes[lane].inout);
        u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 4; i++) {
            u32 low = TURNED ? value_at(lanes, i, 2 * t, g) : value_at(lanes, i, g, 2 * t);
            u32 high = TURNED ? value_at(lanes, i, 2 * t + 1, g) : value_at(lanes, i, g, 2 * t + 1);
            to[i] = low | high << 16;
        }
    }
}

}  // namespace emulator

#define KERNEL(name, threads, blocks, Call)                                                                \
    static void name(const Call& call);                                                                    \
    static const emulator::Kernel name##_known(SUITE #name, (threads), sizeof(Call),                             \
                                               [](const void* call) { name(*static_cast<const Call*>(call)); }); \
    static void name(const Call& call)

DEVICE u32 thread() { return emulator::thread_index; }
DEVICE u32 block() { return emulator::block_index; }
DEVICE u32 blocks() { return emulator::block_count; }
DEVICE u8* shared() { return emulator::shared_memory; }
DEVICE void block_sync() { emulator::block_barrier(); }
DEVICE void warp_sync() {
    emulator::together({}, [](emulator::Offer(&)[32]) {});
}

template <class T>
T from_lane(T value, u32 mask) {
    static u32 by;
    by = mask;
    return emulator::take_from(value, +[](u32 lane) { return lane ^ by; });
}
template <class T>
T from_lane_before(T value, u32 delta) {
    static u32 by;
    by = delta;
    return emulator::take_from(value, +[](u32 lane) { return lane >= by ? lane - by : lane; });
}
template <class T>
T from_last_lane(T value) {
    return emulator::take_from(value, +[](u32) { return 31u; });
}

DEVICE void copy_16(void* to, const void* from, bool live) { emulator::start_copy(to, from, 16, live); }
DEVICE void copy_16_once(void* to, const void* from) { emulator::start_copy(to, from, 16, true); }
DEVICE void copy_8(void* to, const void* from) { emulator::start_copy(to, from, 8, true); }
DEVICE void copies_end() { emulator::end_copies(); }
template <int N>
void copies_wait() {
    emulator::wait_for_copies(N);
}

DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    emulator::together({{a, b}, c}, emulator::mma_of_warp);
}

DEVICE void load_matrices(u32 (&to)[4], const void* row) {
    emulator::together({{row, nullptr}, to}, emulator::matrices_of_warp<false>);
}
DEVICE void load_matrices_turned(u32 (&to)[4], const void* row) {
    emulator::together({{row, nullptr}, to}, emulator::matrices_of_warp<true>);
}

DEVICE u16 bf16_of(float x) { return emulator::to_bf16(x); }
DEVICE u32 multiply_bf16_pairs(u32 x, u32 y) {
    u32 low = bf16_of(emulator::bf16(x & 0xffff) * emulator::bf16(y & 0xffff));
    u32 high = bf16_of(emulator::bf16(x >> 16) * emulator::bf16(y >> 16));
    return low | high << 16;
}

DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float fast_exp(float x) { return std::exp(x); }
DEVICE float fast_divide(float x, float y) { return x / y; }
DEVICE float reciprocal_root(float x) { return 1 / std::sqrt(x); }
DEVICE float nearest(float x) { return std::nearbyint(x); }
DEVICE u64 product_high(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }

struct alignas(16) Four {
    u32 x[4];
};
DEVICE Four load_four(const void* from) {
    Four four;
    std::memcpy(&four, from, 16);
    return four;
}
DEVICE void add_shared(u64* to, u64 value) { *to += value; }
