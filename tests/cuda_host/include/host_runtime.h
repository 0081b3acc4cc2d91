// What the emulated threads of a kernel ask of the runtime (see machine.h for its parts).
#pragma once

#include <cstddef>
#include <cstdint>

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

// Barriers of 8 bytes in shared memory. A wait for a phase is over when that phase is.
void mbarrier_init(unsigned long long* barrier, int count, Site site);
void mbarrier_arrive(unsigned long long* barrier, Site site);
void mbarrier_wait(unsigned long long* barrier, int parity, Site site);

// Whole warps arrive at barrier `id`, and wait or go on.
void named_barrier(int id, int threads, bool waits, const char* name, Site site);

// An address of shared memory as 18 bits, as it is modulo 1024.
unsigned shared_offset(const void* address);

// What the calling thread's writes are to the async proxy.
void fence_proxy_async();
void store_for_async_proxy(void* target, const void* value, size_t bytes);

// The steps of a warpgroup, which all of its threads take.
void set_registers(int registers, const char* name, Site site);
uint64_t wgmma_descriptor(const void* start, int row_bytes, int panel_bytes, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
// Wait for all groups but the newest. What has ended then of [begin, end) gets its values.
void wgmma_wait(int newest_in_flight, float* begin, float* end, Site site);

struct Product {
    float* d;           // [columns / 8][4]
    const unsigned* a;  // [4] in registers, or null
    uint64_t a_matrix;  // descriptor, if not in registers
    uint64_t b_matrix;  // descriptor
    int columns;
    bool bfloat16;
    bool transposed;  // b's rows in memory are its rows
    bool accumulate;
};
void wgmma(const Product& product, Site site);

// A kernel as its module describes it to the launcher.
// What a launch gives a kernel.
struct Argument {
    int offset;  // in the struct that is the only parameter; 0 of a parameter of its own
    int size;
    char kind;  // 'p' pointer, 'c' pointer to const, 'i' integer, 'f' floating point
};

struct Kernel {
    void (*call)(void** args);
    int num_arguments;
    const Argument* arguments;
    int struct_size;     // 0: each argument is a parameter of its own
    int max_threads;     // of a block
    char* shared_begin;  // static shared memory
    char* shared_end;
};

}  // namespace cupaged_host
