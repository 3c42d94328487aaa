// Products of weights and rows, many at once: y[row, o] = sum over k of w[o, k] x[row, k].
//
// A call has groups, each with weights of its own and some rows. A tile is some outputs of one group for up to TOKENS of
// its rows; the grid's blocks take tiles in turn. In a tile the weights are the matrix instruction's rows and the rows of x
// its columns, so that eight rows are enough to fill it.
//
// Weights come in strips of 32 outputs, and a strip in steps of 4096 bytes, in the order in which lanes use them:
//   FP8,  a step is 128 k:  [k / 64][m-tile][half][lane][16 bytes]   row g (or g+8) of the m-tile, k = 16t..16t+15 of the 64
//   BF16, a step is 64 k:   [m-tile][k / 16][lane][16 bytes]         the four registers of a, k = 16t+4s..16t+4s+3 at step s
// with lane = 4g + t. Which k meets which does not matter to a sum, as long as x is read by the same rule: lane t reads its 16
// values in one piece. Of four FP8 codes the order is k, k+2, k+1, k+3, so that two masks take them apart.
//
// Rule 1: the sum of an output goes through the steps in ascending order, 16 k at a time, in FP8 with a new sum for each 128
// k that is then scaled and added. Neither the tile's size nor the rows beside it come into that.
#pragma once
#include "device.h"

constexpr u32 STEP_BYTES = 4096;
constexpr u32 STRIP = 32;

/// e4m3 codes with a scale for each 16 outputs and 128 k.
struct Fp8 {
    static constexpr u32 STEP = 128;
    static constexpr bool SCALED = true;
};

struct Bf16 {
    static constexpr u32 STEP = 64;
    static constexpr bool SCALED = false;
};

/// The same for all groups.
struct Grouped {
    /// A group's strips, one after the other, each of all its steps.
    const u8* const* weights;
    /// A group's scales: [strips][steps][2 m-tiles]. None in BF16.
    const float* const* scales;
    /// Rows of each group; rows lie group after group. None: all have `count`.
    const u32* counts;
    u32 count;
    u32 groups;
    /// Strips of a group.
    u32 strips;
    /// Values of a row of x; a multiple of 8.
    u32 in;
    /// bf16
    const u16* x;
    /// Which row of x each row is; none: row i is row i of x.
    const u32* pick;
};

/// The last two of four codes: of `codes`, what the second and fourth byte hold, as bf16 2^-120 too small.
DEVICE u32 odd_codes(u32 codes) { return (codes & 0x80008000) | ((codes >> 4) & 0x07f007f0); }
DEVICE u32 even_codes(u32 codes) { return ((codes << 8) & 0x80008000) | ((codes << 4) & 0x07f007f0); }

/// 2^120 twice.
constexpr u32 WIDEN = 0x7b807b80;

/// Groups of a call.
constexpr u32 GROUPS_MAX = 256;

/// Counts of all groups added up: where a group's rows and its tiles begin.
struct WorkList {
    u32* rows;
    u32* tiles;

    DEVICE explicit WorkList(u8* at, u32 groups) : rows(reinterpret_cast<u32*>(at)), tiles(rows + groups + 1) {}

    static constexpr u32 bytes(u32 groups) { return (groups + 1) * 2 * sizeof(u32); }

    /// By all threads of a block. `tiles` is chunks of rows times blocks of outputs.
    DEVICE void fill(const Grouped& call, u32 tokens, u32 output_blocks) {
        if (thread() < 32) {
            u32 lane = thread(), row_sum = 0, tile_sum = 0;
            for (u32 first = 0; first < call.groups; first += 32) {
                u32 group = first + lane;
                u32 own_rows = group >= call.groups ? 0 : call.counts ? call.counts[group] : call.count;
                u32 own_tiles = (own_rows + tokens - 1) / tokens * output_blocks;
                u32 row_end = sum_up_to_lane(own_rows), tile_end = sum_up_to_lane(own_tiles);
                if (group < call.groups) {
                    rows[group] = row_sum + row_end - own_rows;
                    tiles[group] = tile_sum + tile_end - own_tiles;
                }
                // The sums of all 32 are the last lane's.
                row_sum += from_last_lane(row_end);
                tile_sum += from_last_lane(tile_end);
            }
            if (lane == 0) {
                rows[call.groups] = row_sum;
                tiles[call.groups] = tile_sum;
            }
        }
        block_sync();
    }

    /// The last group that begins at or before `tile`, which has tiles.
    DEVICE u32 group_of(u32 tile, u32 groups) const {
        u32 low = 0, high = groups;
        while (high - low > 1) {
            u32 middle = (low + high) / 2;
            (tiles[middle] <= tile ? low : high) = middle;
        }
        return low;
    }
};

/// WARPS_M warps share the tile's outputs (32 each), WARPS_N its rows.
template <class Weight, u32 WARPS_M, u32 WARPS_N, u32 TOKENS, u32 BYTES>
struct Tile {
    static constexpr u32 THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr u32 STRIPS = WARPS_M;
    static constexpr u32 STEP = Weight::STEP;
    /// Columns of eight rows that a warp has.
    static constexpr u32 COLUMNS = TOKENS / 8 / WARPS_N;
    static constexpr u32 WEIGHT_BYTES = WARPS_M * STEP_BYTES;
    static constexpr u32 ROW_BYTES = STEP * 2;
    static constexpr u32 SCALE_BYTES = Weight::SCALED ? WARPS_M * 8 : 0;
    static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + TOKENS * ROW_BYTES + SCALE_BYTES;
    /// The list of a call's groups and a word come behind the stages.
    static constexpr u32 FIT = (BYTES - WorkList::bytes(GROUPS_MAX)) / STAGE_BYTES;
    static constexpr u32 STAGES = FIT < 8 ? FIT : 8;
    static_assert(STAGES >= 2, "shared memory holds no two stages");
    static_assert(COLUMNS * 8 * WARPS_N == TOKENS, "warps do not share the rows evenly");
    static_assert(STAGE_BYTES % 16 == 0, "stages are not aligned");

    /// Pieces of 16 bytes of a row in a step; a thread copies the same piece of some rows.
    static constexpr u32 PIECES = STEP / 8;
    static constexpr u32 ROWS_AT_ONCE = THREADS / PIECES;
    static constexpr u32 ROW_COPIES = (TOKENS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;

    /// A tile's place in the call.
    struct Place {
        u32 group, output_block, first_row, live;

        DEVICE Place(const Grouped& call, const WorkList& list, u32 tile) {
            group = list.group_of(tile, call.groups);
            u32 rows = list.rows[group + 1] - list.rows[group];
            u32 chunks = (rows + TOKENS - 1) / TOKENS, within = tile - list.tiles[group];
            // Neighbours share weights, which the second-level cache then has.
            u32 chunk = within % chunks;
            output_block = within / chunks;
            first_row = list.rows[group] + chunk * TOKENS;
            live = rows - chunk * TOKENS < TOKENS ? rows - chunk * TOKENS : TOKENS;
        }
    };

    /// Starts the copies of one step after the other, across tiles.
    struct Loader {
        const Grouped& call;
        const WorkList& list;
        u32 steps, tile, step, tiles;
        u32 group, strip, live;
        u32 rows[ROW_COPIES];

        DEVICE Loader(const Grouped& call, const WorkList& list)
            : call(call), list(list), steps((call.in + STEP - 1) / STEP), tile(block()), step(0), tiles(list.tiles[call.groups]) {
            aim();
        }

        DEVICE void aim() {
            if (tile >= tiles) return;
            Place place(call, list, tile);
            group = place.group;
            strip = place.output_block * WARPS_M + thread() / 32 / WARPS_N;
            live = 0;
#pragma unroll
            for (u32 i = 0; i < ROW_COPIES; i++) {
                u32 token = thread() / PIECES + i * ROWS_AT_ONCE;
                u32 row = place.first_row + token;
                bool is_live = token < place.live;
                live |= is_live ? 1u << i : 0;
                rows[i] = !is_live ? 0 : call.pick ? call.pick[row] : row;
            }
        }

        DEVICE void next(u8* stage) {
            if (tile < tiles) {
                u32 lane = thread() % 32, warp_m = thread() / 32 / WARPS_N, warp_n = thread() / 32 % WARPS_N;
                if (strip < call.strips) {
                    u64 at = static_cast<u64>(strip) * steps + step;
                    const u8* from = call.weights[group] + at * STEP_BYTES;
                    u8* to = stage + warp_m * STEP_BYTES;
#pragma unroll
                    for (u32 i = warp_n; i < STEP_BYTES / 512; i += WARPS_N) {
                        copy_16_once(to + i * 512 + lane * 16, from + i * 512 + lane * 16);
                    }
                    if (Weight::SCALED && lane == 0 && warp_n == 0) {
                        u8* scale = stage + WEIGHT_BYTES + TOKENS * ROW_BYTES + warp_m * 8;
                        copy_8(scale, call.scales[group] + at * 2);
                    }
                }
                u32 piece = thread() % PIECES, k = step * STEP + piece * 8;
#pragma unroll
                for (u32 i = 0; i < ROW_COPIES; i++) {
                    u32 token = thread() / PIECES + i * ROWS_AT_ONCE;
                    if (ROW_COPIES * ROWS_AT_ONCE == TOKENS || token < TOKENS) {
                        bool is_live = (live >> i & 1) != 0 && k < call.in;
                        // Odd rows swap neighbouring pieces: eight lanes that read two rows meet no bank twice.
                        u8* to = stage + WEIGHT_BYTES + token * ROW_BYTES + (piece ^ (token & 1)) * 16;
                        copy_16(to, call.x + static_cast<u64>(rows[i]) * call.in + (is_live ? k : 0), is_live);
                    }
                }
                if (++step == steps) {
                    step = 0;
                    tile += blocks();
                    aim();
                }
            }
            copies_end();
        }
    };

    float acc[2][COLUMNS][4];

    /// Adds what a stage holds.
    DEVICE void add(const u8* stage) {
        u32 lane = thread() % 32, warp_m = thread() / 32 / WARPS_N, warp_n = thread() / 32 % WARPS_N;
        const u8* weights = stage + warp_m * STEP_BYTES + lane * 16;
        u32 token = warp_n * COLUMNS * 8 + lane / 4;
        const u8* x = stage + WEIGHT_BYTES + token * ROW_BYTES;
        if constexpr (Weight::SCALED) {
            float sum[2][COLUMNS][4] = {};
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 a[4][2][4];
#pragma unroll
                for (u32 m = 0; m < 2; m++) {
                    Four low = load_four(weights + (half * 4 + m * 2) * 512), high = load_four(weights + (half * 4 + m * 2 + 1) * 512);
#pragma unroll
                    for (u32 s = 0; s < 4; s++) {
                        a[s][m][0] = multiply_bf16_pairs(even_codes(low.x[s]), WIDEN);
                        a[s][m][1] = multiply_bf16_pairs(even_codes(high.x[s]), WIDEN);
                        a[s][m][2] = multiply_bf16_pairs(odd_codes(low.x[s]), WIDEN);
                        a[s][m][3] = multiply_bf16_pairs(odd_codes(high.x[s]), WIDEN);
                    }
                }
                add_64(sum, a, x, half);
            }
            const float* scale = reinterpret_cast<const float*>(stage + WEIGHT_BYTES + TOKENS * ROW_BYTES + warp_m * 8);
#pragma unroll
            for (u32 m = 0; m < 2; m++)
#pragma unroll
                for (u32 column = 0; column < COLUMNS; column++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) acc[m][column][i] = fused(sum[m][column][i], scale[m], acc[m][column][i]);
        } else {
            u32 a[4][2][4];
#pragma unroll
            for (u32 m = 0; m < 2; m++)
#pragma unroll
                for (u32 s = 0; s < 4; s++) {
                    Four four = load_four(weights + (m * 4 + s) * 512);
#pragma unroll
                    for (u32 i = 0; i < 4; i++) a[s][m][i] = four.x[i];
                }
            add_64(acc, a, x, 0);
        }
    }

    DEVICE static void add_64(float (&sum)[2][COLUMNS][4], const u32 (&a)[4][2][4], const u8* x, u32 half) {
        u32 lane = thread() % 32, odd = lane / 4 & 1;
#pragma unroll
        for (u32 column = 0; column < COLUMNS; column++) {
            const u8* row = x + column * 8 * ROW_BYTES;
            u32 piece = half * 8 + lane % 4 * 2;
            Four b[2] = {load_four(row + (piece ^ odd) * 16), load_four(row + ((piece + 1) ^ odd) * 16)};
#pragma unroll
            for (u32 s = 0; s < 4; s++)
#pragma unroll
                for (u32 m = 0; m < 2; m++) mma(sum[m][column], a[s][m], b[s / 2].x[s % 2 * 2], b[s / 2].x[s % 2 * 2 + 1]);
        }
    }

    /// The list of a call, behind the stages. By all threads of a block.
    DEVICE static WorkList list(const Grouped& call) {
        WorkList list(shared() + STAGES * STAGE_BYTES, call.groups);
        list.fill(call, TOKENS, output_blocks(call));
        return list;
    }

    DEVICE static u32 output_blocks(const Grouped& call) { return (call.strips + WARPS_M - 1) / WARPS_M; }

    /// Calls `done(place, tile)` for each tile of this block, whose sums each thread has a part of: see `each`.
    template <class Done>
    DEVICE static void run(const Grouped& call, const WorkList& list, Done done) {
        u8* stages = shared();
        Loader loader(call, list);
        for (u32 i = 0; i < STAGES - 1; i++) loader.next(stages + i * STAGE_BYTES);
        u32 tiles = list.tiles[call.groups], steps = loader.steps, stage = 0;
        for (u32 tile = block(); tile < tiles; tile += blocks()) {
            Tile sums = {};
            for (u32 step = 0; step < steps; step++) {
                copies_wait<STAGES - 2>();
                // All have what they copied, and are through with the stage that is filled next.
                block_sync();
                loader.next(stages + (stage + STAGES - 1) % STAGES * STAGE_BYTES);
                sums.add(stages + stage * STAGE_BYTES);
                stage = (stage + 1) % STAGES;
            }
            done(Place(call, list, tile), sums);
        }
        copies_wait<0>();
    }

    /// Calls `store(strip, row, i, gate, up)` for this thread's sums of a tile: the output `i` of both m-tiles of its strip.
    template <class Store>
    DEVICE void each(const Grouped& call, const Place& place, Store store) const {
        u32 lane = thread() % 32, warp_m = thread() / 32 / WARPS_N, warp_n = thread() / 32 % WARPS_N;
        u32 strip = place.output_block * WARPS_M + warp_m;
        if (strip >= call.strips) return;
#pragma unroll
        for (u32 column = 0; column < COLUMNS; column++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 token = (warp_n * COLUMNS + column) * 8 + lane % 4 * 2 + i % 2;
                if (token < place.live) {
                    store(strip, place.first_row + token, lane / 4 + i / 2 * 8, acc[0][column][i], acc[1][column][i]);
                }
            }
    }

    /// The same where a strip is 32 outputs in a row, of `out`: `store(row, output, value)`.
    template <class Store>
    DEVICE void each_output(const Grouped& call, const Place& place, u32 out, Store store) const {
        each(call, place, [&](u32 strip, u32 row, u32 i, float low, float high) {
            u32 output = strip * STRIP + i;
            if (output < out) store(row, output, low);
            if (output + 16 < out) store(row, output + 16, high);
        });
    }
};

// Few rows: two blocks of four warps on a multiprocessor, so that one loads while the other begins or ends a tile. With more
// rows more outputs share them, or rows would be loaded as often as weights; the 128 of a prompt are split between warps.
template <class Weight, u32 TOKENS>
using Few = Tile<Weight, 4, 1, TOKENS, SHARED_BYTES / 2 - 1024>;
template <class Weight, u32 TOKENS>
using Many = Tile<Weight, 8, 1, TOKENS, SHARED_BYTES>;
template <class Weight>
using Prompt = Tile<Weight, 4, 2, 128, SHARED_BYTES>;

/// A kernel for each size: `define(name, blocks, Tile)`.
#define TILES(define, name, Weight)        \
    define(name##_8, 2, Few<Weight, 8>)    \
    define(name##_16, 2, Few<Weight, 16>)  \
    define(name##_32, 1, Many<Weight, 32>) \
    define(name##_64, 1, Many<Weight, 64>) \
    define(name##_128, 1, Prompt<Weight>)
