// How paged_decode divides a sequence's keys among blocks, and merge_splits finds the pieces again.
#pragma once

#include "common.cuh"

namespace cupaged {

// Pieces are multiples of this many tokens: about 64 KB of one KV head at D = 128 in 16 bits.
constexpr int kSplitTokens = 256;

// The visible tokens [first, end) of a decoding sequence in `count` pieces of `size` tokens, the
// last one shorter. It depends on the sequence alone and never on the rest of the batch, and so
// does the rounding of the result.
struct SplitPlan {
    int first, end, size, count;

    __device__ __forceinline__ int begin_of(int split) const { return first + split * size; }
    __device__ __forceinline__ int end_of(int split) const {
        return min(end, begin_of(split) + size);
    }
};

// window is 0 for none. max_splits bounds the count: beyond it pieces grow.
__device__ __forceinline__ SplitPlan plan_splits(int seq_len, int window, int max_splits) {
    const int first = window > 0 ? max(0, seq_len - window) : 0;
    const int tokens = seq_len - first;
    const int units = (tokens + kSplitTokens - 1) / kSplitTokens;
    const int size = (units + max_splits - 1) / max_splits * kSplitTokens;
    const int count = tokens > 0 ? (tokens + size - 1) / size : 0;
    return {first, seq_len, size, count};
}

}  // namespace cupaged
