// Barriers, shuffles and votes.
#pragma once

#include <cstring>

#include "host_runtime.h"

inline void __syncthreads(CUPAGED_HOST_SITE) {
    cupaged_host::block_barrier(false, "__syncthreads", {file, line});
}
inline int __syncthreads_count(int predicate, CUPAGED_HOST_SITE) {
    return cupaged_host::block_barrier(predicate != 0, "__syncthreads_count", {file, line});
}
inline int __syncthreads_or(int predicate, CUPAGED_HOST_SITE) {
    return cupaged_host::block_barrier(predicate != 0, "__syncthreads_or", {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, CUPAGED_HOST_SITE) {
    return cupaged_host::block_barrier(predicate == 0, "__syncthreads_and", {file, line}) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUPAGED_HOST_SITE) {
    cupaged_host::warp_collective([](void* const*, unsigned) {}, nullptr, mask, "__syncwarp",
                                  {file, line});
}

// Only the calling lane is certain to be converged with itself.
inline unsigned __activemask() {
    return 1u << cupaged_host::current_lane();
}

namespace cupaged_host {

template <typename T>
struct Shuffle {
    T value;
    T result;
    int source;  // lane
};

// A lane outside the mask has no value to give: poison.
template <typename T>
void resolve_shuffle(void* const* operands, unsigned mask) {
    for (int lane = 0; lane < 32; ++lane) {
        if (operands[lane] == nullptr) continue;
        auto* const mine = static_cast<Shuffle<T>*>(operands[lane]);
        if ((mask >> mine->source & 1u) != 0)
            mine->result = static_cast<const Shuffle<T>*>(operands[mine->source])->value;
        else
            memset(&mine->result, 0xff, sizeof(T));
    }
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* name, Site site) {
    Shuffle<T> operands{value, value, source};
    warp_collective(resolve_shuffle<T>, &operands, mask, name, site);
    return operands.result;
}

// The first lane of the part of the warp, `width` lanes, that this lane is in.
inline int first_of_part(int width) {
    if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
        fail("shuffle width %d is no power of two up to 32", width);
    return current_lane() & ~(width - 1);
}

struct Vote {
    bool predicate;
    unsigned ballot;
};

inline unsigned vote(unsigned mask, bool predicate, const char* name, Site site) {
    Vote operands{predicate, 0};
    warp_collective(
        [](void* const* all, unsigned) {
            unsigned ballot = 0;
            for (int lane = 0; lane < 32; ++lane)
                if (all[lane] != nullptr && static_cast<const Vote*>(all[lane])->predicate)
                    ballot |= 1u << lane;
            for (int lane = 0; lane < 32; ++lane)
                if (all[lane] != nullptr) static_cast<Vote*>(all[lane])->ballot = ballot;
        },
        &operands, mask, name, site);
    return operands.ballot;
}

}  // namespace cupaged_host

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUPAGED_HOST_SITE) {
    const int first = cupaged_host::first_of_part(width);
    return cupaged_host::shuffle(mask, value, first + (source & (width - 1)), "__shfl_sync",
                                 {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUPAGED_HOST_SITE) {
    const int first = cupaged_host::first_of_part(width);
    const int lane = cupaged_host::current_lane();
    const int source = lane - static_cast<int>(delta);
    return cupaged_host::shuffle(mask, value, source < first ? lane : source, "__shfl_up_sync",
                                 {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUPAGED_HOST_SITE) {
    const int first = cupaged_host::first_of_part(width);
    const int lane = cupaged_host::current_lane();
    const int source = lane + static_cast<int>(delta);
    return cupaged_host::shuffle(mask, value, source >= first + width ? lane : source,
                                 "__shfl_down_sync", {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUPAGED_HOST_SITE) {
    const int first = cupaged_host::first_of_part(width);
    const int lane = cupaged_host::current_lane();
    const int source = lane ^ lane_mask;
    return cupaged_host::shuffle(mask, value, source >= first + width ? lane : source,
                                 "__shfl_xor_sync", {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUPAGED_HOST_SITE) {
    return cupaged_host::vote(mask, predicate != 0, "__ballot_sync", {file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUPAGED_HOST_SITE) {
    return cupaged_host::vote(mask, predicate != 0, "__any_sync", {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUPAGED_HOST_SITE) {
    return cupaged_host::vote(mask, predicate != 0, "__all_sync", {file, line}) == mask;
}
