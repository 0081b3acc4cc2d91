// Merge attention states: outputs over disjoint keys into the output over all keys.
#pragma once

#include "common.cuh"
#include "softmax.cuh"
#include "vec.cuh"

namespace cupaged {

constexpr int kMergeElems = CUPAGED_MERGE_ELEMENTS;  // neighbours in a row that one thread merges

// One row's N states: partial outputs and the logarithms of their sums.
template <typename T>
struct StateRow {
    const T* outs;      // D elements a state
    const float* lses;  // one a state
    int64 out_stride;   // from state to state, in elements
    int64 lse_stride;
    int count;
    float log2_unit;  // log2 of the logarithms' base
};

// The weighted sum of kMergeElems elements of the states, starting at `element`. Outputs of empty
// states are not read. Returns what to divide by, and the maximum in the logarithms' own base.
template <typename T>
__device__ __forceinline__ SoftmaxState merge_row(const StateRow<T>& row, int element, bool aligned,
                                                  float* result) {
    SoftmaxState state = softmax_empty();
    for (int n = 0; n < row.count; ++n) state.max = fmaxf(state.max, row.lses[n * row.lse_stride]);
#pragma unroll
    for (int i = 0; i < kMergeElems; ++i) result[i] = 0.0f;
    if (softmax_is_empty(state)) return state;
    for (int n = 0; n < row.count; ++n) {
        const float lse = row.lses[n * row.lse_stride];
        if (lse == negative_infinity()) continue;
        const float weight = exp2f((lse - state.max) * row.log2_unit);
        state.sum += weight;
        const T* const source = row.outs + n * row.out_stride + element;
#pragma unroll
        for (int i = 0; i < kMergeElems; i += kVecSize<T>) {
            float x[kVecSize<T>];
            unpack<T>(load_vec(source + i, aligned), x);
#pragma unroll
            for (int j = 0; j < kVecSize<T>; ++j) result[i + j] += weight * x[j];
        }
    }
    return state;
}

// Store kMergeElems elements, scaled.
template <typename T>
__device__ __forceinline__ void store_row(T* target, bool aligned, float* result, float factor) {
#pragma unroll
    for (int i = 0; i < kMergeElems; ++i) result[i] *= factor;
#pragma unroll
    for (int i = 0; i < kMergeElems; i += kVecSize<T>)
        store_vec(target + i, pack<T>(result + i), aligned);
}

}  // namespace cupaged
