// Store the result of a KV split (work.cuh): in the output if it is the only one of its sequence,
// else as a partial in the workspace that merge_splits reads.
#pragma once

#include "common.cuh"
#include "softmax.cuh"
#include "vec.cuh"

namespace cupaged {

// Floats from one partial in the workspace to the next: its output, and after it its lse.
__host__ __device__ constexpr int partial_stride(int head_size) {
    return head_size + CUPAGED_PARTIAL_PADDING;  // outputs begin at 16 bytes
}

// The partial of a KV split of one row; `slot` is the row's token, or its sequence where each has
// one.
__device__ __forceinline__ float* partial_of(float* partials, int64 slot, int num_heads, int head,
                                             int max_splits, int split, int head_size) {
    return partials + ((slot * num_heads + head) * max_splits + split) * partial_stride(head_size);
}

struct SplitOutput {
    scalar_t* out;                    // [T, H, D]
    float* lse;                       // [T, H] or null
    float* partials;                  // [T or S, H, max_splits, D + 4]; lse in base 2
    const float* sinks;               // [H] or null
    int64 token_stride, head_stride;  // of out
    int num_heads, head_size, max_splits;
    bool aligned;
};

// Merge what the warps of a block have of one row: kVecSize<scalar_t> elements of their weighted
// sums. Each pointer is to the first warp's; the strides lead to the next warp's.
template <int kWarps>
__device__ __forceinline__ SoftmaxState merge_warps(const SoftmaxState* states, int state_stride,
                                                    const float* sums, int sum_stride,
                                                    float* result) {
    constexpr int kVec = kVecSize<scalar_t>;
    SoftmaxState state = softmax_empty();
#pragma unroll
    for (int i = 0; i < kVec; ++i) result[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const float2 factors = softmax_merge(state, states[w * state_stride]);
#pragma unroll
        for (int i = 0; i < kVec; ++i)
            result[i] = fmaf(result[i], factors.x, sums[w * sum_stride + i] * factors.y);
    }
    return state;
}

// Write kVecSize<scalar_t> elements of one row, starting at `element`. `sums` are the weighted sums
// of values that belong to `state`. See partial_of for the slot.
__device__ __forceinline__ void store_split(const SplitOutput& output, int64 token, int64 slot,
                                            int head, int split, int splits, int element,
                                            SoftmaxState state, float* sums) {
    constexpr int kVec = kVecSize<scalar_t>;
    float factor = 1.0f;
    if (splits <= 1 && output.sinks != nullptr && !softmax_is_empty(state))
        factor = softmax_add_sink(state, output.sinks[head] * kLog2E);
    factor *= softmax_normaliser(state);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] *= factor;
    if (splits <= 1) {
        store_vec(output.out + token * output.token_stride + head * output.head_stride + element,
                  pack<scalar_t>(sums), output.aligned);
        if (output.lse != nullptr && element == 0)
            output.lse[token * output.num_heads + head] = softmax_lse_log2(state) * kLn2;
        return;
    }
    float* const partial = partial_of(output.partials, slot, output.num_heads, head,
                                      output.max_splits, split, output.head_size);
    float4* const target = reinterpret_cast<float4*>(partial + element);
#pragma unroll
    for (int i = 0; i < kVec; i += 4)
        target[i / 4] = make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
    if (element == 0) partial[output.head_size] = softmax_lse_log2(state);
}

}  // namespace cupaged
