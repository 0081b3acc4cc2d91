// The steps that the four warps of a warpgroup take together.
#pragma once

#include "machine.h"

#include <algorithm>
#include <iterator>

namespace cupaged_host {

constexpr int kWarpgroupWarps = 4;

inline int current_warp() {
    return thread_number(*machine.current) / kLanes;
}

// Its operands are the same in all threads.
struct Step {
    const char* name;
    uint64_t operands[3];
    Site site;
};

// The calling warp comes to a step: it must be the one that the other warps have come to.
void take_step(const Step& step);

// What a lane of a warp passes at a step.
struct StepCall {
    Step step;
    float* begin = nullptr;  // of the accumulators that a wait is given
    float* end = nullptr;
};

// One of the calls of a whole warp, all with the same operands.
template <typename Call>
const Call& common_call(void* const* operands, unsigned mask) {
    const auto& first = *static_cast<const Call*>(operands[current_lane()]);
    if (mask != 0xffffffffu)
        fail("%s at %s:%d by a part of a warp", first.step.name, base_name(first.step.site.file),
             first.step.site.line);
    for (int lane = 0; lane < kLanes; ++lane) {
        const auto& mine = *static_cast<const Call*>(operands[lane]);
        if (!std::equal(std::begin(first.step.operands), std::end(first.step.operands),
                        std::begin(mine.step.operands)))
            fail("the lanes of a warp come to %s at %s:%d with different operands", mine.step.name,
                 base_name(mine.step.site.file), mine.step.site.line);
    }
    return first;
}

inline void collective(Resolve resolve, StepCall call) {
    warp_collective(resolve, &call, machine.warps[current_warp()].live, call.step.name,
                    call.step.site);
}

}  // namespace cupaged_host
