// Shared memory as the async proxy sees it: its addresses, what was written there through the
// generic proxy without a fence since, and what products under way read.
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

struct Chunk {
    // The last write: its number, 0 for none, and the thread.
    uint64_t write = 0;
    int thread = 0;
    // Products under way that read it, and where the last of them is.
    int readers = 0;
    Site reader{};
};
std::vector<Chunk> chunks;
uint64_t last_write = 0;
bool chunks_used = true;  // since the reset

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
    chunks_used = true;
    for (size_t i = offset / kChunkBytes; i * kChunkBytes < offset + bytes; ++i)
        function(chunks[i]);
}

}  // namespace

void reset_proxies() {
    if (chunks_used) chunks.assign(kWindowBytes / kChunkBytes, {});
    chunks_used = false;
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

void write_starts(const void* address, size_t bytes) {
    for_chunks(address, bytes, [&](Chunk& chunk) {
        if (chunk.readers > 0)
            fail("writes to %s, which a product at %s:%d is still reading",
                 shared_place(shared_offset(address)).c_str(), base_name(chunk.reader.file),
                 chunk.reader.line);
        chunk.write = kUnderWay;
        chunk.thread = thread_number(*machine.current);
    });
}

void write_lands(const Thread& thread, const void* address, size_t bytes) {
    ++last_write;
    for_chunks(address, bytes, [&](Chunk& chunk) {
        chunk.write = last_write;
        chunk.thread = thread_number(thread);
    });
}

std::string shared_place(unsigned offset) {
    const Window w = window();
    if (offset < w.dynamic_offset)
        return "byte " + std::to_string(offset) + " of its static shared memory";
    const auto byte = static_cast<std::ptrdiff_t>(w.dynamic_base + (offset - w.dynamic_offset) -
                                                  reinterpret_cast<uintptr_t>(machine.dynamic));
    return "byte " + std::to_string(byte) + " of its dynamic shared memory";
}

void read_starts(unsigned offset, Site site) {
    chunks_used = true;
    Chunk& chunk = chunks[offset / kChunkBytes];
    ++chunk.readers;
    chunk.reader = site;
    const Thread& thread = machine.threads[chunk.thread];
    if (chunk.write <= thread.fenced) return;
    fail("the product at %s:%d reads %s, which thread (%u, %u, %u) %s", base_name(site.file),
         site.line, shared_place(offset).c_str(), thread.index.x, thread.index.y, thread.index.z,
         chunk.write == kUnderWay ? "is still copying there"
                                  : "wrote and did not fence for the async proxy");
}

void read_ends(unsigned offset) {
    --chunks[offset / kChunkBytes].readers;
}

void fence_proxy_async() {
    machine.current->fenced = last_write;
}

void store_for_async_proxy(void* target, const void* value, size_t bytes) {
    require_shared(target, bytes, bytes, "store_for_async_proxy");
    write_starts(target, bytes);
    std::memcpy(target, value, bytes);
    write_lands(*machine.current, target, bytes);
}

}  // namespace cupaged_host
