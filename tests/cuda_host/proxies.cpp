// Shared memory as the async proxy sees it: its addresses, and what was written there through the
// generic proxy without a fence since.
//
// Known are the writes of cp.async and of store_for_async_proxy, by chunks of 16 bytes. A fence
// counts for the writes of the thread that calls it which have landed before. Ordinary stores
// cannot be seen.
#include "machine.h"

#include <limits>

namespace cupaged_host {
namespace {

constexpr unsigned kWindowBytes = 1 << 18;
constexpr size_t kChunkBytes = 16;
constexpr uint64_t kUnderWay = std::numeric_limits<uint64_t>::max();

struct Write {
    uint64_t number;  // of the write, 0 for none
    int thread;
};
std::vector<Write> writes;  // by chunk, the last one
uint64_t last_write = 0;
bool any_writes = true;  // since the reset

// Static shared memory and behind it dynamic, each at its address modulo kPatternBytes.
struct Window {
    uintptr_t static_base, static_end, dynamic_base, dynamic_end;
    unsigned dynamic_offset;
};

Window window() {
    const auto begin = reinterpret_cast<uintptr_t>(machine.kernel->shared_begin);
    const auto end = reinterpret_cast<uintptr_t>(machine.kernel->shared_end);
    const auto dynamic = reinterpret_cast<uintptr_t>(machine.dynamic);
    const uintptr_t base = begin / kPatternBytes * kPatternBytes;
    const uintptr_t patterns = (end - base + kPatternBytes - 1) / kPatternBytes;
    return {base, end, dynamic / kPatternBytes * kPatternBytes, dynamic + machine.dynamic_bytes,
            static_cast<unsigned>(patterns * kPatternBytes)};
}

// The chunks that bytes at an address of shared memory touch.
template <typename Function>
void for_chunks(const void* address, size_t bytes, Function function) {
    const unsigned offset = shared_offset(address);
    any_writes = true;
    for (size_t chunk = offset / kChunkBytes; chunk * kChunkBytes < offset + bytes; ++chunk)
        function(writes[chunk]);
}

}  // namespace

void reset_proxies() {
    if (any_writes) writes.assign(kWindowBytes / kChunkBytes, {0, 0});
    any_writes = false;
}

unsigned shared_offset(const void* address) {
    const auto p = reinterpret_cast<uintptr_t>(address);
    const Window w = window();
    if (p >= w.static_base && p < w.static_end) return static_cast<unsigned>(p - w.static_base);
    if (p >= w.dynamic_base && p < w.dynamic_end)
        return static_cast<unsigned>(p - w.dynamic_base) + w.dynamic_offset;
    fail("%p is not in shared memory", address);
}

const unsigned char* shared_pointer(unsigned offset) {
    const Window w = window();
    const uintptr_t p = offset < w.dynamic_offset ? w.static_base + offset
                                                  : w.dynamic_base + (offset - w.dynamic_offset);
    const auto begin = reinterpret_cast<uintptr_t>(machine.kernel->shared_begin);
    const auto dynamic = reinterpret_cast<uintptr_t>(machine.dynamic);
    const bool inside = offset < w.dynamic_offset
                            ? p >= begin && p + kChunkBytes <= w.static_end
                            : p >= dynamic && p + kChunkBytes <= w.dynamic_end;
    return inside ? reinterpret_cast<const unsigned char*>(p) : nullptr;
}

void copy_starts(const void* address, size_t bytes) {
    const int thread = thread_number(*machine.current);
    for_chunks(address, bytes, [&](Write& write) { write = {kUnderWay, thread}; });
}

void write_lands(const Thread& thread, const void* address, size_t bytes) {
    ++last_write;
    for_chunks(address, bytes, [&](Write& write) { write = {last_write, thread_number(thread)}; });
}

std::string shared_place(unsigned offset) {
    const Window w = window();
    if (offset < w.dynamic_offset)
        return "byte " + std::to_string(offset) + " of its static shared memory";
    const auto byte = static_cast<std::ptrdiff_t>(w.dynamic_base + (offset - w.dynamic_offset) -
                                                  reinterpret_cast<uintptr_t>(machine.dynamic));
    return "byte " + std::to_string(byte) + " of its dynamic shared memory";
}

std::string hidden_write(unsigned offset) {
    const Write& write = writes[offset / kChunkBytes];
    const Thread& thread = machine.threads[write.thread];
    if (write.number <= thread.fenced) return {};
    char text[160];
    std::snprintf(text, sizeof(text),
                  write.number == kUnderWay
                      ? "which thread (%u, %u, %u) is still copying there"
                      : "which thread (%u, %u, %u) wrote and did not fence for the async proxy",
                  thread.index.x, thread.index.y, thread.index.z);
    return text;
}

void fence_proxy_async() {
    machine.current->fenced = last_write;
}

void store_for_async_proxy(void* target, const void* value, size_t bytes) {
    require_shared(target, bytes, bytes, "store_for_async_proxy");
    std::memcpy(target, value, bytes);
    write_lands(*machine.current, target, bytes);
}

}  // namespace cupaged_host
