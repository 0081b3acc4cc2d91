// What the emulated threads of a kernel ask of the runtime (runtime.cpp).
#pragma once

#include <cstddef>

#include <vector_types.h>

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cupaged_host {

// A line of the kernel; default arguments fill it in at the call.
struct Site {
    const char* file;
    int line;
};

#define CUPAGED_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// End the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Wait for all threads of the block that have not exited. All must come from one line.
// Returns how many of them came with a true predicate.
int block_barrier(bool predicate, const char* name, Site site);

// Wait for the lanes in `mask`, all from one line. The last to come resolves the operation: it gets
// the operands that the lanes passed, indexed by lane, null for lanes outside the mask.
using Resolve = void (*)(void* const* operands, unsigned mask);
void warp_collective(Resolve resolve, void* operands, unsigned mask, const char* name, Site site);
int current_lane();

// Asynchronous copies of this thread. The target is poisoned at once; the source is read and the
// target written when this thread waits for the copy's group (in some blocks: at any time up to
// then, or after, if it never waits).
void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int newest_in_flight);

// Fails unless the range lies in this block's static or dynamic shared memory.
void require_shared(const void* address, size_t bytes, size_t alignment, const char* name);
unsigned char* dynamic_shared(size_t alignment);

// A kernel as its module describes it to the launcher.
struct Kernel {
    void (*call)(void** args);
    int num_params;
    const int* param_sizes;
    const char* param_kinds;  // 'p' pointer, 'c' pointer to const, 'i' integer, 'f' floating point
    int max_threads;          // of a block
    char* shared_begin;       // static shared memory
    char* shared_end;
};

}  // namespace cupaged_host
