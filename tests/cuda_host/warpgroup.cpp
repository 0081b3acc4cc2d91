// The four warps of a warpgroup must take the same steps: a log of those that not all of them have
// taken. And the numbers of registers.
#include "warpgroup.h"

#include <cstring>

namespace cupaged_host {
namespace {

// Of a multiprocessor. A block that fills it is launched with as many for each thread as they
// allow, a multiple of 8, and has no others.
constexpr int kRegisters = 65536;

struct Warpgroup {
    std::deque<Step> steps;  // that not all warps have taken
    uint64_t taken[kWarpgroupWarps] = {};
    uint64_t first = 0;  // the number of the first of `steps`
    int registers = 0;   // of a thread, 0 if it has not said
};

std::vector<Warpgroup> warpgroups;

void resolve_registers(void* const* operands, unsigned mask) {
    const Step& step = common_call<StepCall>(operands, mask).step;
    take_step(step);
    warpgroups[current_warp() / kWarpgroupWarps].registers = static_cast<int>(step.operands[0]);
    int sum = 0;
    for (const Warpgroup& group : warpgroups) {
        if (group.registers == 0) return;
        sum += group.registers * kWarpgroupWarps * kLanes;
    }
    const int threads = machine.num_threads, launched = kRegisters / threads / 8 * 8 * threads;
    if (sum > launched)
        fail("%s at %s:%d: the block has %d registers then, it was launched with %d", step.name,
             base_name(step.site.file), step.site.line, sum, launched);
}

}  // namespace

void reset_warpgroups() {
    warpgroups.clear();
    warpgroups.resize((machine.warps.size() + kWarpgroupWarps - 1) / kWarpgroupWarps);
}

void check_warpgroups() {
    for (size_t i = 0; i < warpgroups.size(); ++i) {
        if (warpgroups[i].steps.empty()) continue;
        const Step& step = warpgroups[i].steps.front();
        fail("divergent warpgroup %zu: not all of its warps come to %s at %s:%d", i, step.name,
             base_name(step.site.file), step.site.line);
    }
}

void take_step(const Step& step) {
    const int warp = current_warp();
    if ((warp / kWarpgroupWarps + 1) * kWarpgroupWarps * kLanes > machine.num_threads)
        fail("%s at %s:%d in a warpgroup of less than 4 warps", step.name,
             base_name(step.site.file), step.site.line);
    Warpgroup& group = warpgroups[warp / kWarpgroupWarps];
    const uint64_t index = group.taken[warp % kWarpgroupWarps]++ - group.first;
    if (index == group.steps.size()) {
        group.steps.push_back(step);
    } else {
        const Step& other = group.steps[index];
        if (other.site.line != step.site.line || std::strcmp(other.site.file, step.site.file) != 0)
            fail(
                "divergent warpgroup: it comes to %s at %s:%d, where another warp was in %s at "
                "%s:%d",
                step.name, base_name(step.site.file), step.site.line, other.name,
                base_name(other.site.file), other.site.line);
        if (!std::equal(std::begin(step.operands), std::end(step.operands),
                        std::begin(other.operands)))
            fail("divergent warpgroup: the warps come to %s at %s:%d with different operands",
                 step.name, base_name(step.site.file), step.site.line);
    }
    while (!group.steps.empty() && std::all_of(group.taken, group.taken + kWarpgroupWarps,
                                               [&](uint64_t t) { return t > group.first; })) {
        group.steps.pop_front();
        ++group.first;
    }
}

void set_registers(int registers, const char* name, Site site) {
    collective(resolve_registers, {{name, {static_cast<uint64_t>(registers)}, site}});
}

}  // namespace cupaged_host
