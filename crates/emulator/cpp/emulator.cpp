#include "emulator.h"

#include <algorithm>
#include <csetjmp>
#include <map>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

namespace emulator {

u32 thread_index, block_index, block_count;
u8* shared_memory;

namespace {

constexpr u32 STACK_BYTES = 256 << 10;

struct Copy {
    void* to;
    const void* from;
    u32 bytes;
    bool live;
    u32 group;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<u8[]> stack{new u8[STACK_BYTES]};
    jmp_buf at;
    bool has_begun = false, is_over = false;
    std::vector<Copy> copies;
    u32 groups = 0;
};

/// Those who wait for each other: the lanes of a warp, or the threads of a block.
struct Meeting {
    u32 arrived = 0, generation = 0;
};

struct Warp {
    Meeting meeting;
    Offer offers[32];
};

struct Known {
    u32 threads, call_bytes;
    Body body;
};

std::map<std::string, Known>& kernels() {
    static std::map<std::string, Known> all;
    return all;
}

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Meeting everybody;
u32 thread_count;
jmp_buf scheduler;
ucontext_t scheduler_context;
/// Threads that went on since it was last set to 0.
u64 progress;
u64 chance;
std::string error;
Body body;
const void* call_argument;

u32 below(u32 n) {
    chance = chance * 6364136223846793005u + 1442695040888963407u;
    return static_cast<u32>((chance >> 33) % n);
}

void yield() {
    u32 self = thread_index;
    if (_setjmp(fibers[self]->at) == 0) _longjmp(scheduler, 1);
}

/// Waits for `count` to arrive; the last one does `finish` first.
template <class Finish>
void meet(Meeting& meeting, u32 count, Finish finish) {
    u32 generation = meeting.generation;
    if (++meeting.arrived == count) {
        finish();
        meeting.arrived = 0;
        meeting.generation++;
    } else {
        while (meeting.generation == generation) yield();
    }
    progress++;
}

void fiber_main() {
    body(call_argument);
    Fiber& self = *fibers[thread_index];
    if (std::any_of(self.copies.begin(), self.copies.end(), [](const Copy& copy) { return copy.live; })) {
        error = "a thread ends with copies on their way";
    }
    self.is_over = true;
    progress++;
    _longjmp(scheduler, 1);
}

void resume(u32 index) {
    thread_index = index;
    Fiber& fiber = *fibers[index];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.has_begun) _longjmp(fiber.at, 1);
    fiber.has_begun = true;
    setcontext(&fiber.context);
}

bool run_block() {
    for (u32 i = 0; i < thread_count; i++) {
        Fiber& fiber = *fibers[i];
        fiber.has_begun = fiber.is_over = false;
        fiber.copies.clear();
        fiber.groups = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = &scheduler_context;
        makecontext(&fiber.context, fiber_main, 0);
    }
    warps.assign((thread_count + 31) / 32, Warp{});
    everybody = Meeting{};
    u32 warp_count = static_cast<u32>(warps.size());
    for (;;) {
        u64 before = progress;
        bool is_over = true;
        // A warp at a time goes as far as it can, in another order each time.
        u32 first = below(warp_count);
        for (u32 w = 0; w < warp_count; w++) {
            u32 warp = (first + w) % warp_count;
            for (u64 last = ~0ull; last != progress;) {
                last = progress;
                u32 turn = below(32);
                for (u32 i = 0; i < 32; i++) {
                    u32 index = warp * 32 + (turn + i) % 32;
                    if (index < thread_count && !fibers[index]->is_over) resume(index);
                }
            }
        }
        for (u32 i = 0; i < thread_count; i++) is_over = is_over && fibers[i]->is_over;
        if (is_over) return true;
        if (before == progress) {
            error = "the threads of a block wait for each other for ever";
            return false;
        }
    }
}

}  // namespace

void block_barrier() {
    meet(everybody, thread_count, [] {});
}

void together(Offer offer, Together operation) {
    Warp& warp = warps[thread_index / 32];
    warp.offers[thread_index % 32] = offer;
    u32 lanes = std::min(32u, thread_count - thread_index / 32 * 32);
    meet(warp.meeting, lanes, [&] { operation(warp.offers); });
}

void start_copy(void* to, const void* from, u32 bytes, bool live) {
    if ((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from)) % bytes != 0) error = "a copy that is not aligned";
    if (to < shared_memory) error = "a copy to below the shared memory";
    std::memset(to, 0xff, bytes);
    Fiber& self = *fibers[thread_index];
    self.copies.push_back({to, from, bytes, live, self.groups});
}

void end_copies() { fibers[thread_index]->groups++; }

void wait_for_copies(int groups_left) {
    Fiber& self = *fibers[thread_index];
    auto is_due = [&](const Copy& copy) { return copy.group + groups_left < self.groups; };
    for (const Copy& copy : self.copies) {
        if (!is_due(copy)) continue;
        if (copy.live) {
            std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
            std::memset(copy.to, 0, copy.bytes);
        }
    }
    self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), is_due), self.copies.end());
}

Kernel::Kernel(const char* name, u32 threads, u32 call_bytes, Body body) { kernels()[name] = {threads, call_bytes, body}; }

}  // namespace emulator

/// Runs a kernel to its end, its threads in an order that `seed` draws. What is wrong, or nothing.
extern "C" const char* emulator_launch(const char* name, u32 blocks, u32 threads, u32 shared_bytes, const void* call,
                                       u32 call_bytes, u64 seed) {
    using namespace emulator;
    auto known = kernels().find(name);
    error.clear();
    if (known == kernels().end()) {
        error = std::string("there is no kernel ") + name;
    } else if (known->second.threads != threads) {
        error = std::string(name) + " has " + std::to_string(known->second.threads) + " threads, not " + std::to_string(threads);
    } else if (known->second.call_bytes != call_bytes) {
        error = std::string(name) + " takes " + std::to_string(known->second.call_bytes) + " bytes, not " + std::to_string(call_bytes);
    }
    if (!error.empty()) return error.c_str();
    thread_count = threads;
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    body = known->second.body;
    call_argument = call;
    chance = seed;
    block_count = blocks;
    // Copies are of 16 bytes; the rest is a guard.
    std::vector<u8> memory(shared_bytes + 256);
    shared_memory = reinterpret_cast<u8*>((reinterpret_cast<u64>(memory.data()) + 127) / 128 * 128);
    for (block_index = 0; block_index < blocks; block_index++) {
        std::fill(memory.begin(), memory.end(), 0xff);
        if (!run_block()) break;
        u8* end = shared_memory + shared_bytes;
        if (std::any_of(end, end + 64, [](u8 byte) { return byte != 0xff; })) error = "a write behind the shared memory";
        if (!error.empty()) break;
    }
    return error.empty() ? nullptr : error.c_str();
}
