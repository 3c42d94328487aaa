// Latent attention in the absorbed form: every head reads the same key (latent and rotated part) and the same value (the
// latent), as `crates/kernels/src/attend.rs` has it. A row's context is cut at fixed multiples of the page; parts are merged
// in ascending order, so the bits depend on the context alone.
#include "rows.h"

constexpr u32 PAGE_TOKENS = 64;
/// Pages of a part of a context.
constexpr u32 PART_PAGES = 16;
constexpr u32 WARPS = 8;
constexpr u32 THREADS = 32 * WARPS;
/// Of a latent; a warp has 64 of them.
constexpr u32 LATENT_MAX = 512;
constexpr u32 WIDTH_MAX = LATENT_MAX + 64;
/// Values from one row to the next in shared memory: rows begin in different banks.
constexpr u32 PITCH = WIDTH_MAX + 8;
constexpr u32 SCORE_PITCH = PAGE_TOKENS + 4;

constexpr u32 attend_bytes(u32 heads) { return (heads + PAGE_TOKENS) * PITCH * 2 + heads * SCORE_PITCH * 4 + heads * 8; }
/// Heads of a block: as many as shared memory has room for.
constexpr u32 HEADS = attend_bytes(64) <= SHARED_BYTES ? 64 : attend_bytes(32) <= SHARED_BYTES ? 32 : 16;
constexpr u32 M_TILES = HEADS / 16;
static_assert(attend_bytes(HEADS) <= SHARED_BYTES, "shared memory holds no 16 heads");

struct Attend {
    /// bf16 [rows, heads, latent + rope]
    const u16* q;
    /// One layer's pages, bf16 [pages, PAGE_TOKENS, latent + rope].
    const u16* cache;
    /// Of each row, the tokens that it attends to: at least one.
    const u32* contexts;
    /// Where in `pages` each row's pages are.
    const u32* firsts;
    const u32* pages;
    u32 rows, heads, latent, width;
    /// Parts of the longest context.
    u32 parts;
    float scale;
    /// Of each part: its sums of weighted latents [rows, parts, heads, latent], its maxima and its sums of weights [rows, parts, heads, 2].
    float* sums;
    float* weights;
};

/// Values that are read by the matrix instruction in blocks of 16.
DEVICE u32 padded(u32 width) { return (width + 15) / 16 * 16; }

/// Starts the copies of `live` of `rows` rows; zeros behind them, and behind their ends.
DEVICE void copy_rows(u16* to, const u16* from, u32 rows, u32 live, u32 width) {
    u32 pieces = padded(width) / 8;
    for (u32 i = thread(); i < rows * pieces; i += THREADS) {
        u32 row = i / pieces, at = i % pieces * 8;
        bool is_live = row < live && at < width;
        copy_16(to + row * PITCH + at, from + (is_live ? row * width + at : 0), is_live);
    }
}

KERNEL(attend_parts, 256, 1, Attend) {
    u16* q = reinterpret_cast<u16*>(shared());
    u16* page = q + HEADS * PITCH;
    float* scores = reinterpret_cast<float*>(page + PAGE_TOKENS * PITCH);
    // What a head's sums are multiplied by before the page's are added.
    float* factors = scores + HEADS * SCORE_PITCH;

    u32 lane = thread() % 32, warp = thread() / 32, g = lane / 4, t = lane % 4;
    u32 head_blocks = (call.heads + HEADS - 1) / HEADS, steps = padded(call.width) / 16;
    // For scores warps share heads 16 at a time, and a page's tokens; for sums, the latent.
    constexpr u32 SCORE_COLUMNS = M_TILES;
    u32 score_m = warp % M_TILES, score_token = warp / M_TILES * SCORE_COLUMNS * 8;
    u32 first_latent = warp * 64;

    for (u32 item = block(); item < call.rows * head_blocks * call.parts; item += blocks()) {
        u32 part = item % call.parts, head_block = item / call.parts % head_blocks, row = item / call.parts / head_blocks;
        u32 context = call.contexts[row], first_page = part * PART_PAGES;
        if (first_page * PAGE_TOKENS >= context) continue;
        u32 last_page = (context + PAGE_TOKENS - 1) / PAGE_TOKENS;
        last_page = last_page < first_page + PART_PAGES ? last_page : first_page + PART_PAGES;
        u32 first_head = head_block * HEADS, live_heads = call.heads - first_head < HEADS ? call.heads - first_head : HEADS;

        copy_rows(q, call.q + (static_cast<u64>(row) * call.heads + first_head) * call.width, HEADS, live_heads, call.width);
        float acc[M_TILES][8][4] = {};
        float maximum = minus_infinity(), total = 0;
        for (u32 number = first_page; number < last_page; number++) {
            u32 live = context - number * PAGE_TOKENS < PAGE_TOKENS ? context - number * PAGE_TOKENS : PAGE_TOKENS;
            u64 at = static_cast<u64>(call.pages[call.firsts[row] + number]) * PAGE_TOKENS * call.width;
            copy_rows(page, call.cache + at, PAGE_TOKENS, live, call.width);
            copies_end();
            copies_wait<0>();
            block_sync();

            float score[SCORE_COLUMNS][4] = {};
            for (u32 step = 0; step < steps; step++) {
                u32 a[4];
                load_matrices(a, q + (score_m * 16 + lane % 16) * PITCH + step * 16 + lane / 16 * 8);
#pragma unroll
                for (u32 column = 0; column < SCORE_COLUMNS; column++) {
                    // Two tokens' worth of matrices would do for two columns; the second half is not used.
                    u32 b[4];
                    u32 token = score_token + column * 8 + lane % 8;
                    load_matrices(b, page + token * PITCH + step * 16 + lane / 8 % 2 * 8);
                    mma(score[column], a, b[0], b[1]);
                }
            }
#pragma unroll
            for (u32 column = 0; column < SCORE_COLUMNS; column++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 token = score_token + column * 8 + t * 2 + i % 2;
                    float value = token < live ? score[column][i] * call.scale : minus_infinity();
                    scores[(score_m * 16 + g + i / 2 * 8) * SCORE_PITCH + token] = value;
                }
            block_sync();

            // Four threads have a head's 64 tokens.
            if (warp < HEADS * 4 / 32) {
                u32 head = thread() / 4;
                float* own = scores + head * SCORE_PITCH;
                float p[16], page_max = maximum, page_total = 0;
#pragma unroll
                for (u32 i = 0; i < 16; i++) {
                    p[i] = own[i * 4 + t];
                    page_max = p[i] > page_max ? p[i] : page_max;
                }
                page_max = larger(page_max, from_lane(page_max, 1));
                page_max = larger(page_max, from_lane(page_max, 2));
                warp_sync();
                u16* rounded = reinterpret_cast<u16*>(own);
#pragma unroll
                for (u32 i = 0; i < 16; i++) {
                    u16 weight = bf16_of(fast_exp(p[i] - page_max));
                    rounded[i * 4 + t] = weight;
                    page_total = page_total + bf16_value(weight);
                }
                page_total = page_total + from_lane(page_total, 1);
                page_total = page_total + from_lane(page_total, 2);
                float factor = fast_exp(maximum - page_max);
                total = fused(total, factor, page_total);
                maximum = page_max;
                if (t == 0) factors[head] = factor;
            }
            block_sync();

            if (first_latent < call.latent) {
                const u16* weights = reinterpret_cast<const u16*>(scores);
#pragma unroll
                for (u32 m = 0; m < M_TILES; m++) {
                    float low = factors[m * 16 + g], high = factors[m * 16 + g + 8];
#pragma unroll
                    for (u32 column = 0; column < 8; column++)
#pragma unroll
                        for (u32 i = 0; i < 4; i++) acc[m][column][i] = acc[m][column][i] * (i < 2 ? low : high);
                }
#pragma unroll
                for (u32 step = 0; step < PAGE_TOKENS / 16; step++) {
                    u32 a[M_TILES][4];
#pragma unroll
                    for (u32 m = 0; m < M_TILES; m++) {
                        load_matrices(a[m], weights + (m * 16 + lane % 16) * SCORE_PITCH * 2 + step * 16 + lane / 16 * 8);
                    }
#pragma unroll
                    for (u32 pair = 0; pair < 4; pair++) {
                        u32 latent = first_latent + pair * 16;
                        if (latent >= call.latent) continue;
                        u32 b[4];
                        load_matrices_turned(b, page + (step * 16 + lane % 16) * PITCH + latent + lane / 16 * 8);
#pragma unroll
                        for (u32 m = 0; m < M_TILES; m++) {
                            mma(acc[m][pair * 2], a[m], b[0], b[1]);
                            mma(acc[m][pair * 2 + 1], a[m], b[2], b[3]);
                        }
                    }
                }
            }
            // The page and the scores are free again.
            block_sync();
        }

        u64 at = (static_cast<u64>(row) * call.parts + part) * call.heads + first_head;
        if (warp < HEADS * 4 / 32 && t == 0 && thread() / 4 < live_heads) {
            call.weights[(at + thread() / 4) * 2] = maximum;
            call.weights[(at + thread() / 4) * 2 + 1] = total;
        }
#pragma unroll
        for (u32 m = 0; m < M_TILES; m++)
#pragma unroll
            for (u32 column = 0; column < 8; column++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 head = m * 16 + g + i / 2 * 8, latent = first_latent + column * 8 + t * 2 + i % 2;
                    if (head < live_heads && latent < call.latent) call.sums[(at + head) * call.latent + latent] = acc[m][column][i];
                }
    }
}

struct Merge {
    const float* sums;
    const float* weights;
    const u32* contexts;
    u32 rows, parts, heads, latent;
    /// bf16 [heads, all rows, latent], of which `rows` from `first` on are written.
    u32 all_rows, first;
    u16* o;
};

/// The parts of each row's context, as if each were a page of the online softmax.
KERNEL(merge_parts, 256, 4, Merge) {
    for (u32 item = block(); item < call.rows * call.heads; item += blocks()) {
        u32 row = item / call.heads, head = item % call.heads;
        u32 parts = (call.contexts[row] + PAGE_TOKENS * PART_PAGES - 1) / (PAGE_TOKENS * PART_PAGES);
        for (u32 i = thread(); i < call.latent; i += THREADS) {
            float maximum = minus_infinity(), total = 0, sum = 0;
            for (u32 part = 0; part < parts; part++) {
                u64 at = (static_cast<u64>(row) * call.parts + part) * call.heads + head;
                float of_part = call.weights[at * 2], next = larger(maximum, of_part);
                float before = fast_exp(maximum - next), now = fast_exp(of_part - next);
                total = fused(call.weights[at * 2 + 1], now, total * before);
                sum = fused(call.sums[at * call.latent + i], now, sum * before);
                maximum = next;
            }
            call.o[(static_cast<u64>(head) * call.all_rows + call.first + row) * call.latent + i] = bf16_of(fast_divide(sum, total));
        }
    }
}

struct Rotate {
    /// [rows, heads, nope + rope]
    const float* q;
    /// Cosine and sine of each position, [positions, rope / 2, 2].
    const float* turns;
    const u32* positions;
    u32 rows, heads, nope, rope, latent;
    /// bf16 [heads, rows, nope]
    u16* plain;
    /// bf16 [rows, heads, latent + rope], of which only the rotated parts are written
    u16* absorbed;
};

/// Pair i of a rotated part, as `crates/kernels/src/rope.rs` has it.
DEVICE void rotate_pair(const float* turns, u64 pair, float a, float b, u16* to) {
    float cosine = turns[pair * 2], sine = turns[pair * 2 + 1];
    to[0] = bf16_of(fused(a, cosine, b * -sine));
    to[1] = bf16_of(fused(b, cosine, a * sine));
}

KERNEL(rotate_queries, 256, 4, Rotate) {
    u32 width = call.nope + call.rope, pairs = call.rope / 2;
    for (u32 item = block(); item < call.rows * call.heads; item += blocks()) {
        u32 row = item / call.heads, head = item % call.heads;
        const float* q = call.q + static_cast<u64>(item) * width;
        for (u32 i = thread(); i < call.nope; i += THREADS) {
            call.plain[(static_cast<u64>(head) * call.rows + row) * call.nope + i] = bf16_of(q[i]);
        }
        u16* to = call.absorbed + static_cast<u64>(item) * (call.latent + call.rope) + call.latent;
        for (u32 i = thread(); i < pairs; i += THREADS) {
            u64 pair = static_cast<u64>(call.positions[row]) * pairs + i;
            rotate_pair(call.turns, pair, q[call.nope + i * 2], q[call.nope + i * 2 + 1], to + i * 2);
        }
    }
}

struct Append {
    /// [rows, latent + rope]
    const float* kv;
    const float* norm;
    const float* turns;
    const u32* positions;
    /// Where each row goes: its page times PAGE_TOKENS, and its place there.
    const u32* slots;
    u32 rows, latent, rope;
    float eps;
    /// One layer's pages.
    u16* cache;
};

KERNEL(append_rows, 256, 4, Append) {
    u32 width = call.latent + call.rope;
    for (u32 row = block(); row < call.rows; row += blocks()) {
        const float* kv = call.kv + static_cast<u64>(row) * width;
        u16* to = call.cache + static_cast<u64>(call.slots[row]) * width;
        float factor = norm_factor(kv, call.latent, call.eps);
        for (u32 i = thread(); i < call.latent; i += THREADS) to[i] = bf16_of(kv[i] * factor * call.norm[i]);
        for (u32 i = thread(); i < call.rope / 2; i += THREADS) {
            u64 pair = static_cast<u64>(call.positions[row]) * (call.rope / 2) + i;
            rotate_pair(call.turns, pair, kv[call.latent + i * 2], kv[call.latent + i * 2 + 1], to + call.latent + i * 2);
        }
    }
}
