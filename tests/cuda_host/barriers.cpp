// Barriers in shared memory (mbarrier) and named barriers.
#include "machine.h"

#include <array>
#include <cstring>

namespace cupaged_host {
namespace {

// What the 8 bytes of a barrier hold. The tag tells it from poison and from data.
struct MBarrier {
    static constexpr uint64_t kTag = 0x2b5a71;
    static constexpr int kMaxCount = (1 << 20) - 1;

    unsigned count;    // of arrivals in a phase
    unsigned pending;  // still to come in this one
    int parity;        // of this phase

    static bool is_valid(const unsigned long long* address) { return *address >> 41 == kTag; }
    static MBarrier load(unsigned long long* address, const char* name, Site site) {
        require_shared(address, 8, 8, name);
        if (!is_valid(address))
            fail("%s at %s:%d on a barrier that is not initialised", name, base_name(site.file),
                 site.line);
        const uint64_t bits = *address;
        return {static_cast<unsigned>(bits & kMaxCount),
                static_cast<unsigned>(bits >> 20 & kMaxCount), static_cast<int>(bits >> 40 & 1)};
    }
    void store(unsigned long long* address) const {
        *address = kTag << 41 | static_cast<uint64_t>(parity) << 40 |
                   static_cast<uint64_t>(pending) << 20 | count;
    }
};

struct NamedBarrier {
    int threads = 0;     // of this round, 0 before the first
    int arrived = 0;     // in this round
    unsigned warps = 0;  // that have arrived in this round
    int round = 0;
    Site site{};  // of the first arrival
};
constexpr int kNamedBarriers = 16;
std::array<NamedBarrier, kNamedBarriers> named_barriers;

struct Arrival {
    int id;
    int threads;
    int round;
    Site site;
};

// A whole warp arrives.
void resolve_arrival(void* const* operands, unsigned) {
    const Arrival* first = nullptr;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (operands[lane] == nullptr) continue;
        const auto* const mine = static_cast<const Arrival*>(operands[lane]);
        if (first == nullptr) first = mine;
        if (mine->id != first->id || mine->threads != first->threads)
            fail("lanes of a warp come to named barriers %d of %d threads and %d of %d", first->id,
                 first->threads, mine->id, mine->threads);
    }
    NamedBarrier& barrier = named_barriers[first->id];
    const unsigned warp = 1u << (thread_number(*machine.current) / kLanes);
    if (barrier.arrived == 0) {
        barrier.threads = first->threads;
        barrier.site = first->site;
    } else if (barrier.threads != first->threads) {
        fail("comes to named barrier %d of %d threads at %s:%d, at %s:%d it has %d", first->id,
             first->threads, base_name(first->site.file), first->site.line,
             base_name(barrier.site.file), barrier.site.line, barrier.threads);
    } else if ((barrier.warps & warp) != 0) {
        fail("the warp comes to named barrier %d at %s:%d, where it has been in this round",
             first->id, base_name(first->site.file), first->site.line);
    }
    for (int lane = 0; lane < kLanes; ++lane)
        if (operands[lane] != nullptr) static_cast<Arrival*>(operands[lane])->round = barrier.round;
    barrier.warps |= warp;
    barrier.arrived += kLanes;
    if (barrier.arrived < barrier.threads) return;
    barrier.arrived = 0;
    barrier.warps = 0;
    ++barrier.round;
    wake(&barrier);
}

}  // namespace

void reset_barriers() {
    named_barriers.fill({});
}

void mbarrier_init(unsigned long long* barrier, int count, Site site) {
    require_shared(barrier, 8, 8, "mbarrier_init");
    if (count < 1 || count > MBarrier::kMaxCount)
        fail("mbarrier_init at %s:%d with a count of %d", base_name(site.file), site.line, count);
    if (MBarrier::is_valid(barrier))
        fail("mbarrier_init at %s:%d on a barrier that is in use", base_name(site.file), site.line);
    const auto unsigned_count = static_cast<unsigned>(count);
    MBarrier{unsigned_count, unsigned_count, 0}.store(barrier);
}

void mbarrier_arrive(unsigned long long* barrier, Site site) {
    MBarrier state = MBarrier::load(barrier, "mbarrier_arrive", site);
    const bool last = --state.pending == 0;
    if (last) {
        state.pending = state.count;
        state.parity ^= 1;
    }
    state.store(barrier);
    if (last) wake(barrier);
    wait_sometimes();
}

void mbarrier_wait(unsigned long long* barrier, int parity, Site site) {
    const char* const name = "mbarrier_wait";
    if (parity != 0 && parity != 1)
        fail("%s at %s:%d with a parity of %d", name, base_name(site.file), site.line, parity);
    if (MBarrier::load(barrier, name, site).parity != parity) return wait_sometimes();
    wait_for(barrier, name, site);
    if (MBarrier::load(barrier, name, site).parity == parity)
        fail("%s at %s:%d misses a phase: the one after it has ended, too", name,
             base_name(site.file), site.line);
}

void named_barrier(int id, int threads, bool waits, const char* name, Site site) {
    if (id < 1 || id >= kNamedBarriers)
        fail("%s at %s:%d on barrier %d, 1 to 15 are possible", name, base_name(site.file),
             site.line, id);
    if (threads < kLanes || threads % kLanes != 0 || threads > machine.num_threads)
        fail("%s at %s:%d of %d threads, the block has %d and whole warps take part", name,
             base_name(site.file), site.line, threads, machine.num_threads);
    Arrival arrival{id, threads, 0, site};
    const int warp = thread_number(*machine.current) / kLanes;
    warp_collective(resolve_arrival, &arrival, machine.warps[warp].live, name, site);
    const NamedBarrier& barrier = named_barriers[id];
    if (waits && barrier.round == arrival.round) wait_for(&barrier, name, site);
}

}  // namespace cupaged_host
