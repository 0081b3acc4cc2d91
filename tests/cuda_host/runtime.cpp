// Runs the threads of one CUDA block after another as fibers on one CPU thread.
//
// A fiber runs until it waits (barrier, warp collective) or exits; then the scheduler picks a warp.
// Which one is drawn from the launch's seed, as are the order of lanes in a warp and of blocks in
// the grid: a kernel that lacks a barrier gives different results under different seeds.
//
// Asynchronous copies land when they are waited for, not before, or never; in every fourth block at
// any time, so that also a target that is used again too early shows.
//
// Shared memory is filled with 0xFF (NaN) before each block. Dynamic shared memory ends at an
// inaccessible page. A fault in a kernel ends the launch with an error.
#include "machine.h"

#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <algorithm>
#include <iterator>
#include <numeric>

#include <sys/mman.h>
#include <sys/syscall.h>
#include <ctime>
#include <unistd.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cupaged_host {

Machine machine;

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;  // of a thread, with the guard page below it

size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

// Record the error of the launch, said by the thread that runs.
void record(const char* text) {
    char head[384];
    const Thread* const thread = machine.current;
    if (thread != nullptr)
        std::snprintf(head, sizeof(head),
                      "%s, block (%u, %u, %u), thread (%u, %u, %u): ", machine.name, blockIdx.x,
                      blockIdx.y, blockIdx.z, thread->index.x, thread->index.y, thread->index.z);
    else
        std::snprintf(head, sizeof(head), "%s, block (%u, %u, %u): ", machine.name, blockIdx.x,
                      blockIdx.y, blockIdx.z);
    machine.error = std::string(head) + text;
}

void land(const Thread& thread, const std::vector<AsyncCopy>& group) {
    for (const AsyncCopy& copy : group) {
        if (copy.valid)
            std::memcpy(copy.target, copy.source, copy.bytes);
        else
            std::memset(copy.target, 0, copy.bytes);
        write_lands(thread, copy.target, copy.bytes);
    }
}

void land_oldest(Thread& thread) {
    const std::vector<AsyncCopy> group = std::move(thread.groups.front());
    thread.groups.pop_front();
    land(thread, group);
}

void to_scheduler() {
    switch_fiber(machine.current->fiber, machine.scheduler);
}

void release_barrier() {
    for (int i = 0; i < machine.num_threads; ++i) {
        Thread& thread = machine.threads[i];
        Warp& warp = machine.warps[i / kLanes];
        const unsigned bit = 1u << (i % kLanes);
        if ((warp.live & bit) == 0) continue;
        thread.waits_in = nullptr;
        thread.barrier_result = machine.barrier_count;
        warp.ready |= bit;
    }
    machine.at_barrier = machine.barrier_count = 0;
    machine.first_at_barrier = nullptr;
}

// A lane that has exited never comes to a collective that waits for it.
void check_collectives(const Warp& warp, int first_thread) {
    for (int lane = 0; lane < kLanes; ++lane) {
        if ((warp.waiting >> lane & 1u) == 0) continue;
        const Thread& thread = machine.threads[first_thread + lane];
        if ((thread.mask & ~warp.live) != 0)
            fail("%s waits with mask 0x%08x for lanes 0x%08x, which have exited",
                 place(thread).c_str(), thread.mask, thread.mask & ~warp.live);
    }
}

void thread_main() {
    machine.kernel->call(machine.args);
    Thread& thread = *machine.current;
    while (machine.eager_copies && !thread.groups.empty()) land_oldest(thread);
    const int number = thread_number(thread);
    Warp& warp = machine.warps[number / kLanes];
    const unsigned bit = 1u << (number % kLanes);
    warp.live &= ~bit;
    warp.ready &= ~bit;
    check_collectives(warp, number / kLanes * kLanes);
    --machine.live;
    if (machine.live > 0 && machine.at_barrier == machine.live) release_barrier();
    to_scheduler();
    __builtin_unreachable();
}

[[noreturn]] void fail_stuck() {
    std::string text = "no thread can go on: ";
    int shown = 0;
    const Thread* previous = nullptr;
    for (int i = 0; i < machine.num_threads && shown < 4; ++i) {
        const Thread& thread = machine.threads[i];
        if (thread.waits_in == nullptr) continue;
        if (previous != nullptr && previous->site.line == thread.site.line &&
            previous->site.file == thread.site.file)
            continue;
        if (shown++ > 0) text += "; ";
        text += place(thread);
        previous = &thread;
    }
    fail("%s", text.c_str());
}

// The warp to run next. With depth first a warp runs as far as it can before another starts, which
// shows a missing barrier best; the other way mixes them at every collective.
int pick_warp(const std::vector<int>& order, bool depth_first) {
    const int count = static_cast<int>(order.size());
    const int start = depth_first ? 0 : static_cast<int>(machine.random() % count);
    for (int i = 0; i < count; ++i) {
        const int warp = order[(start + i) % count];
        if (machine.warps[warp].ready != 0) return warp;
    }
    return -1;
}

// Now and then only a part of the lanes: nothing but a collective holds them together.
void run_warp(int number) {
    Warp& warp = machine.warps[number];
    const unsigned draw = static_cast<unsigned>(machine.random());
    const unsigned start = draw % kLanes;
    const unsigned step = (draw >> 8) % 2 != 0 ? 1 : kLanes - 1;
    const unsigned count = (draw >> 16) % 4 == 0 ? 1 + (draw >> 24) % kLanes : kLanes;
    const unsigned visit = warp.ready;
    for (unsigned i = 0, lane = start; i < count; ++i, lane = (lane + step) % kLanes) {
        if ((visit >> lane & 1u) == 0 || (warp.ready >> lane & 1u) == 0) continue;
        Thread& thread = machine.threads[number * kLanes + lane];
        machine.current = &thread;
        threadIdx = thread.index;
        switch_fiber(machine.scheduler, thread.fiber);
        machine.current = nullptr;
    }
}

void start_block() {
    const int warps = (machine.num_threads + kLanes - 1) / kLanes;
    machine.warps.assign(warps, Warp());
    for (int i = 0; i < machine.num_threads; ++i) {
        Thread& thread = machine.threads[i];
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        thread.waits_in = nullptr;
        thread.groups.clear();
        thread.open.clear();
        thread.barrier = nullptr;
        thread.fenced = 0;
        init_fiber(thread.fiber, machine.stacks + (i + 1) * kStackBytes, kStackBytes - page_bytes(),
                   thread_main);
        machine.warps[i / kLanes].live |= 1u << (i % kLanes);
        machine.warps[i / kLanes].ready |= 1u << (i % kLanes);
    }
    machine.live = machine.num_threads;
    machine.at_barrier = machine.barrier_count = 0;
    machine.first_at_barrier = nullptr;
    std::memset(machine.kernel->shared_begin, kPoison,
                machine.kernel->shared_end - machine.kernel->shared_begin);
    std::memset(machine.dynamic_mapping, kPoison, machine.dynamic_mapping_bytes);
    reset_barriers();
    reset_proxies();
    reset_warpgroups();
    reset_products();
}

void check_dynamic_margin() {
    const unsigned char* const end = machine.dynamic_mapping + machine.dynamic_mapping_bytes;
    for (const unsigned char* p = machine.dynamic_mapping; p < end; ++p) {
        if (p == machine.dynamic) p += machine.dynamic_bytes;
        if (p < end && *p != kPoison)
            fail("wrote outside its dynamic shared memory, at byte %td of %zu", p - machine.dynamic,
                 machine.dynamic_bytes);
    }
}

void run_block() {
    start_block();
    std::vector<int> order(machine.warps.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), machine.random);
    const bool depth_first = machine.random() % 2 != 0;
    machine.eager_copies = machine.random() % 4 == 0;
    machine.early_reads = machine.random() % 2 == 0;
    while (machine.live > 0) {
        const int warp = pick_warp(order, depth_first);
        if (warp < 0) fail_stuck();
        run_warp(warp);
    }
    check_dynamic_margin();
    check_warpgroups();
}

void on_signal(int signal, siginfo_t* info, void*) {
    char text[256];
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    const uintptr_t stacks = reinterpret_cast<uintptr_t>(machine.stacks);
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(machine.dynamic);
    const uintptr_t dynamic_end =
        reinterpret_cast<uintptr_t>(machine.dynamic_mapping) + machine.dynamic_mapping_bytes;
    if (signal == SIGVTALRM)
        std::snprintf(text, sizeof(text), "the launch does not end");
    else if (signal == SIGFPE)
        std::snprintf(text, sizeof(text), "integer division by zero");
    else if (address >= stacks && address < stacks + kMaxThreads * kStackBytes)
        std::snprintf(text, sizeof(text), "stack overflow");
    else if (address >= dynamic_end && address < dynamic_end + page_bytes())
        std::snprintf(text, sizeof(text),
                      "access beyond its dynamic shared memory, at byte %zu of %zu",
                      address - dynamic, machine.dynamic_bytes);
    else
        std::snprintf(text, sizeof(text), "access out of bounds, at address %p", info->si_addr);
    record(text);
    siglongjmp(machine.abort, 1);
}

// While this lives, faults of the kernel come to on_signal, and so does the end of this thread's
// time.
class Signals {
  public:
    explicit Signals(double seconds) {
        static char stack[64 * 1024];
        stack_t alternate{};
        alternate.ss_sp = stack;
        alternate.ss_size = sizeof(stack);
        sigaltstack(&alternate, &old_stack_);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &old_[i]);

        sigevent event{};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = SIGVTALRM;
        event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
        timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
        itimerspec time{};
        time.it_value.tv_sec = static_cast<time_t>(seconds);
        time.it_value.tv_nsec = static_cast<long>(1e9 * (seconds - std::floor(seconds)));
        timer_settime(timer_, 0, &time, nullptr);
    }
    ~Signals() {
        timer_delete(timer_);
        for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

  private:
    static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
    struct sigaction old_[4];
    stack_t old_stack_;
    timer_t timer_;
};

void allocate(size_t dynamic_bytes) {
    const size_t page = page_bytes();
    if (machine.stacks == nullptr) {
        const size_t bytes = kMaxThreads * kStackBytes;
        machine.stacks =
            static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        for (int i = 0; i < kMaxThreads; ++i)
            mprotect(machine.stacks + i * kStackBytes, page, PROT_NONE);
        machine.threads.resize(kMaxThreads);
    }
    if (machine.dynamic_mapping != nullptr)
        munmap(machine.dynamic_mapping, machine.dynamic_mapping_bytes + page);
    machine.dynamic_mapping_bytes = (dynamic_bytes + page - 1) / page * page;
    machine.dynamic_mapping = static_cast<unsigned char*>(
        mmap(nullptr, machine.dynamic_mapping_bytes + page, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    unsigned char* const end = machine.dynamic_mapping + machine.dynamic_mapping_bytes;
    mprotect(end, page, PROT_NONE);
    machine.dynamic_bytes = dynamic_bytes;
    machine.dynamic = dynamic_shared(16);
}

void run_grid() {
    const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
    std::vector<uint64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), machine.random);
    for (const uint64_t i : order) {
        blockIdx = {static_cast<unsigned>(i % gridDim.x),
                    static_cast<unsigned>(i / gridDim.x % gridDim.y),
                    static_cast<unsigned>(i / gridDim.x / gridDim.y)};
        run_block();
    }
}

}  // namespace

const char* base_name(const char* path) {
    const char* const slash = std::strrchr(path, '/');
    return slash != nullptr ? slash + 1 : path;
}

std::string place(const Thread& thread) {
    char text[256];
    std::snprintf(text, sizeof(text), "thread (%u, %u, %u) in %s at %s:%d", thread.index.x,
                  thread.index.y, thread.index.z, thread.waits_in, base_name(thread.site.file),
                  thread.site.line);
    return text;
}

void wait() {
    to_scheduler();
    Thread& thread = *machine.current;
    if (machine.eager_copies && !thread.groups.empty() && machine.random() % 4 == 0)
        land_oldest(thread);
}

void wait_for(const void* barrier, const char* name, Site site) {
    Thread& thread = *machine.current;
    const int number = thread_number(thread);
    thread.barrier = barrier;
    thread.waits_in = name;
    thread.site = site;
    machine.warps[number / kLanes].ready &= ~(1u << (number % kLanes));
    wait();
}

void wake(const void* barrier) {
    for (int i = 0; i < machine.num_threads; ++i) {
        Thread& thread = machine.threads[i];
        if (thread.barrier != barrier) continue;
        thread.barrier = nullptr;
        thread.waits_in = nullptr;
        machine.warps[i / kLanes].ready |= 1u << (i % kLanes);
    }
}

void fail(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    record(text);
    siglongjmp(machine.abort, 1);
}

int block_barrier(bool predicate, const char* name, Site site) {
    Thread& thread = *machine.current;
    thread.waits_in = name;
    thread.site = site;
    if (Thread* const first = machine.first_at_barrier; first != nullptr) {
        if (first->site.line != site.line || std::strcmp(first->site.file, site.file) != 0)
            fail("divergent barrier: it waits in %s at %s:%d, but %s", name, base_name(site.file),
                 site.line, place(*first).c_str());
    } else {
        machine.first_at_barrier = &thread;
    }
    machine.barrier_count += predicate;
    const int number = thread_number(thread);
    machine.warps[number / kLanes].ready &= ~(1u << (number % kLanes));
    if (++machine.at_barrier == machine.live) release_barrier();
    wait();
    return thread.barrier_result;
}

void warp_collective(Resolve resolve, void* operands, unsigned mask, const char* name, Site site) {
    Thread& thread = *machine.current;
    const int number = thread_number(thread);
    const int first = number / kLanes * kLanes;
    Warp& warp = machine.warps[number / kLanes];
    const unsigned bit = 1u << (number % kLanes);
    thread.waits_in = name;
    thread.site = site;
    thread.mask = mask;
    thread.operands = operands;
    if ((mask & bit) == 0)
        fail("calls %s at %s:%d with mask 0x%08x, which it is not in", name, base_name(site.file),
             site.line, mask);
    if ((mask & ~warp.live) != 0)
        fail("calls %s at %s:%d with mask 0x%08x, but lanes 0x%08x have exited or never were", name,
             base_name(site.file), site.line, mask, mask & ~warp.live);
    // Lanes that wait with this mask must wait here.
    unsigned arrived = bit;
    void* all[kLanes] = {};
    all[number % kLanes] = operands;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (((warp.waiting & mask) >> lane & 1u) == 0) continue;
        const Thread& other = machine.threads[first + lane];
        if (other.mask != mask) continue;
        if (other.resolve != resolve || other.site.line != site.line)
            fail("divergent warp: it waits in %s at %s:%d, but %s", name, base_name(site.file),
                 site.line, place(other).c_str());
        arrived |= 1u << lane;
        all[lane] = other.operands;
    }
    thread.resolve = resolve;
    if (arrived != mask) {
        warp.waiting |= bit;
        warp.ready &= ~bit;
        wait();
        return;
    }
    resolve(all, mask);
    warp.waiting &= ~mask;
    warp.ready |= mask;
    for (int lane = 0; lane < kLanes; ++lane)
        if ((mask >> lane & 1u) != 0) machine.threads[first + lane].waits_in = nullptr;
    wait();
}

int current_lane() {
    return thread_number(*machine.current) % kLanes;
}

unsigned char* dynamic_shared(size_t alignment) {
    // As near to the inaccessible page as the alignment allows.
    unsigned char* const end = machine.dynamic_mapping + machine.dynamic_mapping_bytes;
    const uintptr_t start = reinterpret_cast<uintptr_t>(end - machine.dynamic_bytes);
    machine.dynamic = reinterpret_cast<unsigned char*>(start / alignment * alignment);
    return machine.dynamic;
}

void require_shared(const void* address, size_t bytes, size_t alignment, const char* name) {
    const char* const p = static_cast<const char*>(address);
    const char* const dynamic = reinterpret_cast<const char*>(machine.dynamic);
    const bool in_static =
        p >= machine.kernel->shared_begin && p + bytes <= machine.kernel->shared_end;
    const bool in_dynamic = p >= dynamic && p + bytes <= dynamic + machine.dynamic_bytes;
    if (!in_static && !in_dynamic) fail("%s on %p, which is not in shared memory", name, address);
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0)
        fail("%s on %p, which is no multiple of %zu", name, address, alignment);
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
    require_shared(shared, bytes, bytes, "asynchronous copy");
    if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
        fail("asynchronous copy from %p, which is no multiple of %zu", global, bytes);
    if (valid) {  // a fault belongs here, not to the wait
        const volatile char* const source = static_cast<const char*>(global);
        (void)source[0];
        (void)source[bytes - 1];
    }
    std::memset(shared, kPoison, bytes);
    write_starts(shared, bytes);
    machine.current->open.push_back({shared, global, bytes, valid});
}

void copy_async_commit() {
    Thread& thread = *machine.current;
    thread.groups.emplace_back(std::move(thread.open));
    thread.open.clear();
}

void copy_async_wait(int newest_in_flight) {
    const auto& groups = machine.current->groups;
    while (groups.size() > static_cast<size_t>(newest_in_flight)) land_oldest(*machine.current);
}

}  // namespace cupaged_host

// Returns whether the kernel ran without an error; otherwise error holds its text. `seconds` of
// this thread's time are all that it gets. An error leaves the stacks of the fibers as they are:
// what they hold on the heap is lost.
extern "C" bool cupaged_host_launch(const cupaged_host::Kernel* kernel, const char* name,
                                    void** args, const unsigned* grid, const unsigned* block,
                                    size_t dynamic_bytes, uint64_t seed, double seconds,
                                    char* error, size_t error_bytes) {
    using namespace cupaged_host;
    allocate(dynamic_bytes);
    machine.kernel = kernel;
    machine.name = name;
    machine.args = args;
    machine.random.seed(seed);
    gridDim = dim3(grid[0], grid[1], grid[2]);
    blockDim = dim3(block[0], block[1], block[2]);
    machine.num_threads = static_cast<int>(block[0] * block[1] * block[2]);
    machine.current = nullptr;
    machine.error.clear();
    const FloatMode flush_to_zero;
    const Signals signals(seconds);
    if (sigsetjmp(machine.abort, 1) == 0) run_grid();
    machine.current = nullptr;
    std::snprintf(error, error_bytes, "%s", machine.error.c_str());
    return machine.error.empty();
}
