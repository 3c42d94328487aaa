// The next tokens of rows of logits, by the rule in `draw.rs`: the same tokens that the processor draws from the same logits.
#include "device.h"

constexpr u32 THREADS = 1024, WARPS = THREADS / 32;
/// The digits of a key, highest first, and the bins that count them.
constexpr u32 DIGITS = 3, DIGIT_BITS = 11, BINS = 1 << DIGIT_BITS, BINS_EACH = BINS / 32;

struct Edit {
    u32 token;
    float bias, repetition, penalty;
};

struct Draw {
    /// Shares of 2^64.
    u64 random;
    /// All of them: nothing is taken away.
    u64 top_p;
    u64 least_weight;
    float temperature;
    /// 0: nothing is taken away.
    u32 top_k;
    u32 first_edit, edits;
};

struct Draws {
    /// [rows, vocabulary]; edited.
    float* logits;
    const Draw* draws;
    const Edit* edits;
    u32 rows, vocabulary;
    u32* tokens;
};

/// What a block shares.
struct Shared {
    u64 bins[BINS];
    u64 of_warps[WARPS];
    u32 equals[WARPS];
    /// What one thread found.
    u64 sum, target;
    u32 place, left;
};

/// A row, as its block sees it.
struct Row {
    Shared* s;
    const float* logits;
    u32 vocabulary;
    float largest, temperature;
    u64 least_weight;
};

/// What is kept: keys above `key`, and of those that equal it the first `equals`.
struct Cut {
    u32 key;
    u64 equals;
};

/// In the order of values; both zeros are equal, and what is no number is the lowest.
DEVICE u32 key_of(float x) {
    x = number_or_least(x);
    u32 bits = x == 0 ? 0 : float_as_bits(x);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

DEVICE float value_of(u32 key) { return bits_as_float(key >> 31 ? key & 0x7fffffff : ~key); }

DEVICE u64 weight_of(const Row& row, u32 key) {
    float e = exact_exp((value_of(key) - row.largest) / row.temperature);
    u64 weight = static_cast<u64>(e * 1099511627776.0f);
    return weight >= row.least_weight ? weight : 0;
}

/// Of all threads of the block.
DEVICE u64 largest_of(Shared* s, u64 value) {
    for (u32 mask = 16; mask > 0; mask /= 2) {
        u64 other = from_lane(value, mask);
        value = other > value ? other : value;
    }
    if (thread() % 32 == 0) s->of_warps[thread() / 32] = value;
    block_sync();
#pragma unroll 4
    for (u32 warp = 0; warp < WARPS; warp++) value = s->of_warps[warp] > value ? s->of_warps[warp] : value;
    block_sync();
    return value;
}

DEVICE u64 sum_of(Shared* s, u64 value) {
    for (u32 mask = 16; mask > 0; mask /= 2) value += from_lane(value, mask);
    if (thread() % 32 == 0) s->of_warps[thread() / 32] = value;
    block_sync();
    u64 sum = 0;
#pragma unroll 4
    for (u32 warp = 0; warp < WARPS; warp++) sum += s->of_warps[warp];
    block_sync();
    return sum;
}

/// The bin, from the highest down, at which `before` and the bins' sum reach `need`. By a warp; one lane says it.
DEVICE void find_bin(Shared* s, u64 before, u64 need) {
    u32 lane = thread() % 32, first = BINS - 1 - lane * BINS_EACH;
    u64 own = 0;
#pragma unroll 4
    for (u32 i = 0; i < BINS_EACH; i++) own += s->bins[first - i];
    u64 sum = before + sum_up_to_lane(own) - own;
    if (sum >= need || sum + own < need) return;
    u32 bin = first;
    for (; sum + s->bins[bin] < need; bin--) sum += s->bins[bin];
    s->place = bin;
    s->sum = sum;
}

/// The key at which what tokens count, the first in order first, sums up to `need`, which all with keys from `lowest` do; and
/// what those before count, in `s->sum`.
template <class Count>
DEVICE u32 key_at(const Row& row, u32 lowest, u64 need, Count count) {
    Shared* s = row.s;
    u32 prefix = 0, known = 0;
    u64 before = 0;
#pragma unroll 1
    for (u32 digit = 0; digit < DIGITS; digit++) {
        // 11, 11 and 10 bits.
        u32 shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, mask = digit == 2 ? BINS / 2 - 1 : BINS - 1;
        for (u32 i = thread(); i < BINS; i += THREADS) s->bins[i] = 0;
        block_sync();
        for (u32 i = thread(); i < row.vocabulary; i += THREADS) {
            u32 key = key_of(row.logits[i]);
            if (key < lowest || (key & known) != prefix) continue;
            u64 counts = count(key);
            if (counts > 0) add_shared(&s->bins[key >> shift & mask], counts);
        }
        block_sync();
        if (thread() < 32) find_bin(s, before, need);
        block_sync();
        prefix |= s->place << shift;
        known |= mask << shift;
        before = s->sum;
    }
    return prefix;
}

/// The most keys first, as top-k and top-p say.
DEVICE Cut cut_of(const Row& row, const Draw& draw) {
    Cut cut = {0, 0};
    if (draw.top_k > 0 && draw.top_k < row.vocabulary) {
        cut.key = key_at(row, 0, draw.top_k, [](u32) -> u64 { return 1; });
        cut.equals = draw.top_k - row.s->sum;
    }
    if (draw.top_p == ~0ull) return cut;
    u64 total = 0;
    for (u32 i = thread(); i < row.vocabulary; i += THREADS) {
        u32 key = key_of(row.logits[i]);
        if (key > cut.key) total += weight_of(row, key);
    }
    total = sum_of(row.s, total) + (cut.equals > 0 ? cut.equals * weight_of(row, cut.key) : 0);
    u64 need = product_high(total, draw.top_p);
    if (need == 0) need = 1;
    cut.key = key_at(row, cut.key, need, [&](u32 key) { return weight_of(row, key); });
    u64 each = weight_of(row, cut.key);
    cut.equals = (need - row.s->sum + each - 1) / each;
    return cut;
}

/// The token at `random` of the total weight of what is kept. Each warp has a piece of the vocabulary.
DEVICE void pick(const Row& row, Cut cut, u64 random, u32* token) {
    Shared* s = row.s;
    u32 lane = thread() % 32, warp = thread() / 32;
    u32 piece = (row.vocabulary + THREADS - 1) / THREADS * 32, first = warp * piece;
    u32 end = first + piece < row.vocabulary ? first + piece : row.vocabulary;
    u64 sum = 0;
    u32 equals = 0;
    for (u32 i = first + lane; i < end; i += 32) {
        u32 key = key_of(row.logits[i]);
        if (key > cut.key) sum += weight_of(row, key);
        equals += key == cut.key;
    }
    for (u32 mask = 16; mask > 0; mask /= 2) {
        sum += from_lane(sum, mask);
        equals += from_lane(equals, mask);
    }
    if (lane == 0) {
        s->of_warps[warp] = sum;
        s->equals[warp] = equals;
    }
    block_sync();
    u64 each = cut.equals > 0 ? weight_of(row, cut.key) : 0;
    if (thread() == 0) {
        u64 total = 0;
        u32 left = static_cast<u32>(cut.equals);
#pragma unroll 1
        for (u32 w = 0; w < WARPS; w++) {
            u32 kept = s->equals[w] < left ? s->equals[w] : left;
            left -= kept;
            s->of_warps[w] += kept * each;
            total += s->of_warps[w];
        }
        s->target = product_high(total, random);
        s->left = static_cast<u32>(cut.equals);
        u32 w = 0;
        u64 before = 0;
#pragma unroll 1
        for (; w < WARPS - 1 && before + s->of_warps[w] <= s->target; w++) {
            before += s->of_warps[w];
            s->left -= s->equals[w] < s->left ? s->equals[w] : s->left;
        }
        s->place = w;
        s->sum = before;
    }
    block_sync();
    if (warp != s->place) return;
    u64 before = s->sum;
    u32 left = s->left;
    for (u32 at = first; at < end; at += 32) {
        u32 key = at + lane < end ? key_of(row.logits[at + lane]) : 0;
        bool is_equal = at + lane < end && key == cut.key;
        u32 rank = sum_up_to_lane(static_cast<u32>(is_equal));
        u64 own = 0;
        if (at + lane < end && key > cut.key) own = weight_of(row, key);
        if (is_equal && rank <= left) own = each;
        u64 up_to = before + sum_up_to_lane(own);
        u32 found = up_to > s->target ? lane : 32;
        for (u32 mask = 16; mask > 0; mask /= 2) {
            u32 other = from_lane(found, mask);
            found = other < found ? other : found;
        }
        if (found < 32) {
            if (lane == found) *token = at + lane;
            return;
        }
        before = from_last_lane(up_to);
        u32 equal = from_last_lane(rank);
        left -= equal < left ? equal : left;
    }
}

/// A block has a row.
KERNEL(draw_tokens, 1024, 1, Draws) {
    Shared* s = reinterpret_cast<Shared*>(shared());
    for (u32 r = block(); r < call.rows; r += blocks()) {
        const Draw draw = call.draws[r];
        float* logits = call.logits + static_cast<u64>(r) * call.vocabulary;
        for (u32 i = thread(); i < draw.edits; i += THREADS) {
            Edit edit = call.edits[draw.first_edit + i];
            float x = logits[edit.token];
            x = number_or_least(x) + edit.bias;
            x = x > 0 ? x / edit.repetition : x * edit.repetition;
            logits[edit.token] = x - edit.penalty;
        }
        block_sync();
        u64 best = 0;
        for (u32 i = thread(); i < call.vocabulary; i += THREADS) {
            u64 candidate = static_cast<u64>(key_of(logits[i])) << 32 | (0xffffffff - i);
            best = candidate > best ? candidate : best;
        }
        best = largest_of(s, best);
        float largest = value_of(static_cast<u32>(best >> 32));
        if (draw.temperature == 0 || largest - largest != 0) {
            if (thread() == 0) call.tokens[r] = 0xffffffff - static_cast<u32>(best);
        } else {
            Row row = {s, logits, call.vocabulary, largest, draw.temperature, 0};
            // min-p looks at what the others have kept.
            Cut cut = cut_of(row, draw);
            row.least_weight = draw.least_weight;
            pick(row, cut, draw.random, &call.tokens[r]);
        }
        block_sync();
    }
}
