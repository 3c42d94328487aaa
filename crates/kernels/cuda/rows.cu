// The residual stream: embedding, norms, sums, and the gate. A block has a row, or a warp has.
#include "rows.h"

constexpr u32 THREADS = ROW_THREADS;

struct Embed {
    const u32* tokens;
    /// bf16 [vocabulary, hidden]
    const u16* table;
    u32 rows, hidden;
    /// [rows, hidden]
    float* h;
};

KERNEL(embed_rows, 256, 4, Embed) {
    for (u32 row = block(); row < call.rows; row += blocks()) {
        const u16* from = call.table + static_cast<u64>(call.tokens[row]) * call.hidden;
        float* to = call.h + static_cast<u64>(row) * call.hidden;
        each_of_row(call.hidden, [&](u32 i) { return bf16_value(from[i]); }, [&](u32 i, float x) { to[i] = x; });
    }
}

struct Norm {
    /// [.., hidden]; first changed to h + (y + shared), where those are.
    float* h;
    const float* y;
    const float* shared;
    /// The row of h that each row is; none: row i is row i.
    const u32* pick;
    const float* weight;
    u32 rows, hidden;
    float eps;
    /// norm(h): bf16 [rows, hidden], and where it is wanted as it is before rounding.
    u16* x;
    float* exact;
};

KERNEL(norm_rows, 256, 4, Norm) {
    for (u32 row = block(); row < call.rows; row += blocks()) {
        u64 of_h = static_cast<u64>(call.pick ? call.pick[row] : row) * call.hidden, at = static_cast<u64>(row) * call.hidden;
        float* h = call.h + of_h;
        if (call.y) {
            auto sum = [&](u32 i) {
                float y = call.y[of_h + i];
                return h[i] + (call.shared ? y + call.shared[of_h + i] : y);
            };
            each_of_row(call.hidden, sum, [&](u32 i, float x) { h[i] = x; });
            // Each thread reads what it wrote.
        }
        if (!call.weight) continue;
        float factor = norm_factor(h, call.hidden, call.eps);
        auto store = [&](u32 i, float x) {
            call.x[at + i] = bf16_of(x);
            if (call.exact) call.exact[at + i] = x;
        };
        each_of_row(call.hidden, [&](u32 i) { return h[i] * factor * call.weight[i]; }, store);
    }
}

/// A block has so many experts for so many rows, and a thread so many products of each on their way.
constexpr u32 GATE_EXPERTS = 4, GATE_ROWS = 8, GATE_AHEAD = 4;

struct Gate {
    /// [rows, hidden]
    const float* x;
    /// [experts, hidden]
    const float* weight;
    u32 rows, hidden, experts;
    /// [rows, experts]
    float* logits;
};

/// Each thread adds up every 256th product, then warps their lanes, then one thread all the warps in order.
KERNEL(gate_rows, 256, 2, Gate) {
    float(*of_warps)[32] = reinterpret_cast<float(*)[32]>(shared());
    u32 lane = thread() % 32, warp = thread() / 32;
    u32 row_blocks = (call.rows + GATE_ROWS - 1) / GATE_ROWS, expert_blocks = (call.experts + GATE_EXPERTS - 1) / GATE_EXPERTS;
    for (u32 item = block(); item < row_blocks * expert_blocks; item += blocks()) {
        u32 first_expert = item % expert_blocks * GATE_EXPERTS, first_row = item / expert_blocks * GATE_ROWS;
        // Where there are fewer, the last is taken more than once.
        auto row = [&](u32 r) { return first_row + r < call.rows ? first_row + r : call.rows - 1; };
        auto expert = [&](u32 e) { return first_expert + e < call.experts ? first_expert + e : call.experts - 1; };
        float sums[GATE_EXPERTS * GATE_ROWS] = {};
        for (u32 first = thread(); first < call.hidden; first += GATE_AHEAD * THREADS) {
            float w[GATE_AHEAD][GATE_EXPERTS], x[GATE_AHEAD][GATE_ROWS];
#pragma unroll
            for (u32 j = 0; j < GATE_AHEAD; j++) {
                u32 i = first + j * THREADS;
                bool is_one = i < call.hidden;
#pragma unroll
                for (u32 e = 0; e < GATE_EXPERTS; e++) w[j][e] = is_one ? call.weight[static_cast<u64>(expert(e)) * call.hidden + i] : 0;
#pragma unroll
                for (u32 r = 0; r < GATE_ROWS; r++) x[j][r] = is_one ? call.x[static_cast<u64>(row(r)) * call.hidden + i] : 0;
            }
#pragma unroll
            for (u32 j = 0; j < GATE_AHEAD; j++)
#pragma unroll
                for (u32 e = 0; e < GATE_EXPERTS; e++)
#pragma unroll
                    for (u32 r = 0; r < GATE_ROWS; r++) sums[e * GATE_ROWS + r] = fused(x[j][r], w[j][e], sums[e * GATE_ROWS + r]);
        }
        float sum = sum_for_lane(sums);
        // Of the item before nobody reads any more.
        block_sync();
        of_warps[warp][lane] = sum;
        block_sync();
        u32 r = first_row + lane % GATE_ROWS, e = first_expert + lane / GATE_ROWS;
        if (warp > 0 || r >= call.rows || e >= call.experts) continue;
        sum = 0;
        for (u32 i = 0; i < THREADS / 32; i++) sum = sum + of_warps[i][lane];
        call.logits[static_cast<u64>(r) * call.experts + e] = sum;
    }
}

/// What a lane has of a row's experts: lane, lane + 32, ...
constexpr u32 ROUTE_SLOTS = 8, EXPERTS_MAX = 32 * ROUTE_SLOTS;

struct Choice {
    u32 expert;
    float weight;
};

/// `gate.rs` has the formula, and what the parameters are.
struct Route {
    /// [rows, experts]
    const float* logits;
    /// [experts] or none
    const float* bias;
    u32 rows, experts;
    u32 groups, groups_kept, top_k;
    u32 is_softmax, is_top_two, normalize;
    float mask, scale;
    /// [rows, top_k], ascending by expert
    Choice* choices;
};

/// What a warp shares of a row.
struct Routed {
    float scores[EXPERTS_MAX], keys[EXPERTS_MAX];
    float groups[32];
    Choice chosen[32];
};

/// logits become scores.
DEVICE void scores_of(const Route& call, float (&x)[ROUTE_SLOTS]) {
    u32 lane = thread() % 32;
    if (!call.is_softmax) {
#pragma unroll
        for (u32 i = 0; i < ROUTE_SLOTS; i++) x[i] = fast_divide(1, 1 + fast_exp(-x[i]));
        return;
    }
    float most = minus_infinity(), sum = 0;
#pragma unroll
    for (u32 i = 0; i < ROUTE_SLOTS; i++) most = lane + i * 32 < call.experts ? larger(most, x[i]) : most;
    for (u32 mask = 16; mask > 0; mask /= 2) most = larger(most, from_lane(most, mask));
#pragma unroll
    for (u32 i = 0; i < ROUTE_SLOTS; i++) {
        x[i] = fast_exp(x[i] - most);
        sum = lane + i * 32 < call.experts ? sum + x[i] : sum;
    }
    for (u32 mask = 16; mask > 0; mask /= 2) sum = sum + from_lane(sum, mask);
#pragma unroll
    for (u32 i = 0; i < ROUTE_SLOTS; i++) x[i] = fast_divide(x[i], sum);
}

/// Keys of groups that are not among the best become the mask.
DEVICE void mask_groups(const Route& call, float (&key)[ROUTE_SLOTS], Routed* row) {
    u32 lane = thread() % 32, members = call.experts / call.groups;
#pragma unroll
    for (u32 i = 0; i < ROUTE_SLOTS; i++) row->keys[lane + i * 32] = key[i];
    warp_sync();
    float first = minus_infinity(), second = minus_infinity();
    if (lane < call.groups) {
        for (u32 i = 0; i < members; i++) {
            float other = row->keys[lane * members + i];
            second = larger(second, other > first ? first : other);
            first = larger(first, other);
        }
        row->groups[lane] = call.is_top_two && members > 1 ? number_or_least(first + second) : first;
    }
    warp_sync();
#pragma unroll
    for (u32 i = 0; i < ROUTE_SLOTS; i++) {
        u32 own = (lane + i * 32) / members, better = 0;
        if (own >= call.groups) continue;
        for (u32 g = 0; g < call.groups; g++) {
            better += row->groups[g] > row->groups[own] || (row->groups[g] == row->groups[own] && g < own);
        }
        if (better >= call.groups_kept) key[i] = call.mask;
    }
}

KERNEL(route_rows, 256, 2, Route) {
    u32 lane = thread() % 32, warp = thread() / 32;
    Routed* shared_row = reinterpret_cast<Routed*>(shared()) + warp;
    for (u32 row = block() * 8 + warp; row < call.rows; row += blocks() * 8) {
        float score[ROUTE_SLOTS], key[ROUTE_SLOTS];
        u32 free = 0;
#pragma unroll
        for (u32 i = 0; i < ROUTE_SLOTS; i++) {
            u32 expert = lane + i * 32;
            bool is_one = expert < call.experts;
            score[i] = is_one ? call.logits[static_cast<u64>(row) * call.experts + expert] : 0;
            free |= is_one ? 1u << i : 0;
        }
        scores_of(call, score);
#pragma unroll
        for (u32 i = 0; i < ROUTE_SLOTS; i++) {
            shared_row->scores[lane + i * 32] = score[i];
            bool has_bias = call.bias && (free >> i & 1);
            key[i] = number_or_least(score[i] + (has_bias ? call.bias[lane + i * 32] : 0));
        }
        if (call.groups_kept < call.groups) mask_groups(call, key, shared_row);
        for (u32 choice = 0; choice < call.top_k; choice++) {
            float best = minus_infinity();
            u32 expert = ~0u;
#pragma unroll
            for (u32 i = 0; i < ROUTE_SLOTS; i++) {
                // Of equals the lower one: it came first.
                bool is_better = (free >> i & 1) && (key[i] > best || expert == ~0u);
                best = is_better ? key[i] : best;
                expert = is_better ? lane + i * 32 : expert;
            }
            for (u32 mask = 16; mask > 0; mask /= 2) {
                float other = from_lane(best, mask);
                u32 other_expert = from_lane(expert, mask);
                bool is_better = other > best || (other == best && other_expert < expert);
                best = is_better ? other : best;
                expert = is_better ? other_expert : expert;
            }
            if (expert % 32 == lane) {
                free &= ~(1u << expert / 32);
                shared_row->chosen[choice] = {expert, shared_row->scores[expert]};
            }
        }
        warp_sync();
        if (lane < call.top_k) {
            Choice own = shared_row->chosen[lane];
            u32 place = 0;
            for (u32 i = 0; i < call.top_k; i++) place += shared_row->chosen[i].expert < own.expert;
            call.choices[static_cast<u64>(row) * call.top_k + place] = own;
        }
        warp_sync();
        // The sum goes by expert.
        if (lane == 0) {
            Choice* chosen = call.choices + static_cast<u64>(row) * call.top_k;
            float sum = 0;
            for (u32 i = 0; i < call.top_k; i++) sum = sum + chosen[i].weight;
            for (u32 i = 0; i < call.top_k; i++) {
                float weight = call.normalize ? fast_divide(chosen[i].weight, sum + 1e-20f) : chosen[i].weight;
                chosen[i].weight = weight * call.scale;
            }
        }
        warp_sync();
    }
}

/// What random weights are.
constexpr u32 RANDOM_FP8 = 0, RANDOM_BF16 = 1;

struct Fill {
    u8* to;
    /// A multiple of 4.
    u64 bytes;
    u64 seed;
    /// RANDOM_FP8: any code that is a number. RANDOM_BF16: numbers below `size` in magnitude.
    u32 kind;
    float size;
};

/// splitmix64
DEVICE u64 scrambled(u64 x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

/// Weights to measure with, the same for the same seed.
KERNEL(fill_random, 256, 4, Fill) {
    u32* to = reinterpret_cast<u32*>(call.to);
    for (u64 i = static_cast<u64>(block()) * THREADS + thread(); i < call.bytes / 4; i += static_cast<u64>(blocks()) * THREADS) {
        u32 word = static_cast<u32>(scrambled(call.seed + i));
        if (call.kind == RANDOM_FP8) {
            // NaNs are the codes with all seven low bits: those lose one.
            u32 all = word & (word >> 1);
            all = all & (all >> 2) & (word >> 4) & (word >> 5) & (word >> 6) & 0x01010101;
            to[i] = word & ~all;
        } else {
            float low = (static_cast<float>(word & 0xffff) / 32768 - 1) * call.size;
            float high = (static_cast<float>(word >> 16) / 32768 - 1) * call.size;
            to[i] = bf16_of(low) | static_cast<u32>(bf16_of(high)) << 16;
        }
    }
}

/// Copies rows that lie anywhere.
struct Gather {
    /// [count]
    const u32* const* rows;
    /// words of a row
    u32 count, words;
    /// [count, words]
    u32* to;
};

KERNEL(gather_rows, 256, 4, Gather) {
    for (u32 row = block(); row < call.count; row += blocks()) {
        const u32* from = call.rows[row];
        u32* to = call.to + static_cast<u64>(row) * call.words;
        each_of_row(call.words, [&](u32 i) { return from[i]; }, [&](u32 i, u32 x) { to[i] = x; });
    }
}

/// Rows for those whom their choices belong to: each taker has a table and room for some rows.
struct SplitRows {
    /// [rows, words]
    const u32* x;
    /// [rows, top_k]
    const Choice* choices;
    /// Of each expert the taker, if it has one.
    const u32* owners;
    /// rows: at most as many as a block has threads. room: rows of a taker
    u32 rows, words, top_k, takers, room;
    /// words of a table: how many rows follow, 3 words of nothing, and their choices [room, top_k]
    u32 table;
    /// [takers, table + room * words]
    u32* to;
};

KERNEL(split_rows, 256, 4, SplitRows) {
    u32* takes = reinterpret_cast<u32*>(shared());
    for (u32 item = block(); item < call.takers * call.room; item += blocks()) {
        u32 taker = item / call.room, place = item % call.room, row = thread();
        bool is_taken = false;
        for (u32 i = 0; row < call.rows && i < call.top_k; i++) {
            is_taken = is_taken || call.owners[call.choices[row * call.top_k + i].expert] == taker;
        }
        // Of the item before nobody reads any more.
        block_sync();
        takes[row] = is_taken;
        block_sync();
        // All threads find the row, which is the first with so many before it.
        u32 before = 0, from = 0;
        while (from < call.rows && (!takes[from] || before < place)) before += takes[from++];
        u32* to = call.to + taker * (call.table + static_cast<u64>(call.room) * call.words);
        if (place == 0 && row == 0) {
            u32 count = 0;
            for (u32 i = 0; i < call.rows; i++) count += takes[i];
            to[0] = count < call.room ? count : call.room;
        }
        if (from == call.rows) continue;
        Choice* choices = reinterpret_cast<Choice*>(to + 4) + place * call.top_k;
        for (u32 i = thread(); i < call.top_k; i += THREADS) choices[i] = call.choices[from * call.top_k + i];
        const u32* x = call.x + static_cast<u64>(from) * call.words;
        to += call.table + static_cast<u64>(place) * call.words;
        each_of_row(call.words, [&](u32 i) { return x[i]; }, [&](u32 i, u32 word) { to[i] = word; });
    }
}

struct Addend {
    const float* at;
    float weight;
    /// 0: it is added; 1: a sum begins with it, which is added; 2: it belongs to that sum.
    u32 kind;
};

/// Each row's addends, in their order.
struct AddUpRows {
    const Addend* addends;
    /// [rows]: where a row's addends end
    const u32* ends;
    u32 rows, width;
    /// [rows, width]
    float* y;
};

/// Columns of a row that a thread has.
constexpr u32 COLUMNS_EACH = 4;

KERNEL(add_up_rows, 256, 4, AddUpRows) {
    u32 pieces = (call.width + COLUMNS_EACH * THREADS - 1) / (COLUMNS_EACH * THREADS);
    for (u32 item = block(); item < call.rows * pieces; item += blocks()) {
        u32 row = item / pieces, column = item % pieces * COLUMNS_EACH * THREADS + thread();
        u32 first = row ? call.ends[row - 1] : 0, end = call.ends[row];
        // What a row has not is nought.
        auto of = [&](const Addend& addend, float (&values)[COLUMNS_EACH]) {
#pragma unroll
            for (u32 j = 0; j < COLUMNS_EACH; j++) {
                u32 i = column + j * THREADS;
                values[j] = i < call.width ? addend.at[i] : 0;
            }
        };
        float y[COLUMNS_EACH] = {};
        bool is_first = true;
        for (u32 at = first; at < end; is_first = false) {
            Addend addend = call.addends[at++];
            float sum[COLUMNS_EACH];
            of(addend, sum);
            if (addend.kind) {
#pragma unroll
                for (u32 j = 0; j < COLUMNS_EACH; j++) sum[j] = addend.weight * sum[j];
                for (; at < end && call.addends[at].kind == 2; at++) {
                    addend = call.addends[at];
                    float term[COLUMNS_EACH];
                    of(addend, term);
#pragma unroll
                    for (u32 j = 0; j < COLUMNS_EACH; j++) sum[j] = fused(addend.weight, term[j], sum[j]);
                }
            }
            // Not 0 + sum, which would make a zero positive.
#pragma unroll
            for (u32 j = 0; j < COLUMNS_EACH; j++) y[j] = is_first ? sum[j] : y[j] + sum[j];
        }
#pragma unroll
        for (u32 j = 0; j < COLUMNS_EACH; j++) {
            u32 i = column + j * THREADS;
            if (i < call.width) call.y[static_cast<u64>(row) * call.width + i] = y[j];
        }
    }
}
