// The state of the emulation, for the parts of the runtime: runtime.cpp (threads, warps, copies),
// barriers.cpp, proxies.cpp, warpgroup.cpp and products.cpp.
#pragma once

#include "host_runtime.h"

#include <csetjmp>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace cupaged_host {

constexpr int kLanes = 32;
constexpr int kPoison = 0xff;
// What the async proxy reads is swizzled in a pattern that repeats every 8 rows of 128 bytes.
constexpr unsigned kPatternBytes = 1024;

struct AsyncCopy {
    void* target;
    const void* source;
    size_t bytes;
    bool valid;
};

struct Thread {
    Fiber fiber;
    uint3 index;
    // What it waits for.
    const char* waits_in = nullptr;
    Site site{};
    Resolve resolve = nullptr;
    void* operands = nullptr;
    unsigned mask = 0;
    int barrier_result = 0;
    const void* barrier = nullptr;  // of barriers.cpp
    // Asynchronous copies: committed groups, oldest first, and the open one.
    std::deque<std::vector<AsyncCopy>> groups;
    std::vector<AsyncCopy> open;
    uint64_t fenced = 0;  // up to this write of proxies.cpp
};

struct Warp {
    unsigned live = 0;     // not exited
    unsigned ready = 0;    // not waiting
    unsigned waiting = 0;  // in a warp collective
};

struct Machine {
    // The launch.
    const Kernel* kernel = nullptr;
    const char* name = "";
    void** args = nullptr;
    size_t dynamic_bytes = 0;
    std::mt19937_64 random;
    // The block.
    int num_threads = 0;
    int live = 0;
    int at_barrier = 0;
    int barrier_count = 0;      // true predicates
    bool eager_copies = false;  // asynchronous copies may land before they are waited for
    bool early_reads = false;   // products read shared memory when they start, else when they end
    Thread* first_at_barrier = nullptr;
    std::vector<Warp> warps;
    unsigned char* dynamic = nullptr;
    // The thread that runs, null in the scheduler.
    Thread* current = nullptr;
    Fiber scheduler;
    sigjmp_buf abort;
    std::string error;
    // Kept from launch to launch.
    std::vector<Thread> threads;
    char* stacks = nullptr;
    unsigned char* dynamic_mapping = nullptr;
    size_t dynamic_mapping_bytes = 0;
};
extern Machine machine;

inline int thread_number(const Thread& thread) {
    return static_cast<int>(&thread - machine.threads.data());
}

const char* base_name(const char* path);
// The thread and what it waits in.
std::string place(const Thread& thread);

// Let other threads run. Copies of this one may land meanwhile.
void wait();
// Maybe.
inline void wait_sometimes() {
    if (machine.random() % 2 == 0) wait();
}
// Wait until another thread wakes those that wait for this barrier.
void wait_for(const void* barrier, const char* name, Site site);
void wake(const void* barrier);

// barriers.cpp: at the start of a block.
void reset_barriers();

// proxies.cpp: what the generic proxy writes to shared memory, and the async proxy reads by chunks
// of 16 bytes. Where they do not fit, these fail.
void reset_proxies();
void write_starts(const void* address, size_t bytes);
void write_lands(const Thread& thread, const void* address, size_t bytes);
// Where the block's shared memory has this offset, as shared_offset() gives it; null beyond.
const unsigned char* shared_pointer(unsigned offset);
// Its name in an error.
std::string shared_place(unsigned offset);
// By the product at this site.
void read_starts(unsigned offset, Site site);
void read_ends(unsigned offset);

// warpgroup.cpp: at the start and at the end of a block.
void reset_warpgroups();
void check_warpgroups();

// products.cpp: at the start of a block.
void reset_products();

}  // namespace cupaged_host
