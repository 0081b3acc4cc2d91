// Online softmax: the running maximum and sum of exp2(logit) over keys that come tile by tile.
//
// Logits are multiplied by log2(e), because exp2 is one instruction and exp is two. The state
// before any visible key has max = -inf and sum = 0; no function below makes a NaN of it.
#pragma once

#include "common.cuh"

namespace cupaged {

// tanh to about 1e-7, absolute: what is capped has no more. tanhf is many times as long.
__device__ __forceinline__ float tanh_by_exp2(float x) {
    return 1.0f - __fdividef(2.0f, exp2f(2.0f * kLog2E * x) + 1.0f);
}

struct SoftmaxState {
    float max;
    float sum;  // of exp2(logit - max)
};

__device__ __forceinline__ SoftmaxState softmax_empty() {
    return {negative_infinity(), 0.0f};
}

// What exponents are taken relative to: the maximum, or 0 while nothing has been seen, as
// -inf - (-inf) is NaN.
__device__ __forceinline__ float softmax_reference(float max) {
    return max == negative_infinity() ? 0.0f : max;
}

// Raise the maximum to cover new logits; the caller then adds exp2(logit - reference) to the sum.
// Returns the factor for what was accumulated so far, which it has applied to the sum.
__device__ __forceinline__ float softmax_raise(SoftmaxState& state, float new_max) {
    const float max = fmaxf(state.max, new_max);
    const float factor = exp2f(state.max - softmax_reference(max));
    state.max = max;
    state.sum *= factor;
    return factor;
}

// Merge `other` into `state`. Returns the factors for what each has accumulated. Like what follows
// from it, fused by name: kernels that the compiler treats differently have to agree to the bit.
__device__ __forceinline__ float2 softmax_merge(SoftmaxState& state, const SoftmaxState& other) {
    const float max = fmaxf(state.max, other.max);
    const float reference = softmax_reference(max);
    const float2 factors = make_float2(exp2f(state.max - reference), exp2f(other.max - reference));
    state = {max, fmaf(state.sum, factors.x, other.sum * factors.y)};
    return factors;
}

// Add the sink, a logit without a value, to a state that has seen keys. Returns the factor for what
// was accumulated.
__device__ __forceinline__ float softmax_add_sink(SoftmaxState& state, float sink_log2) {
    const float factor = softmax_raise(state, sink_log2);
    state.sum += exp2f(sink_log2 - state.max);
    return factor;
}

__device__ __forceinline__ bool softmax_is_empty(const SoftmaxState& state) {
    return state.max == negative_infinity();
}

// 1 / sum, 0 for an empty state: its output is zeros.
__device__ __forceinline__ float softmax_normaliser(const SoftmaxState& state) {
    return softmax_is_empty(state) ? 0.0f : 1.0f / state.sum;
}

// log2 of the sum of exp2(logit), -inf for an empty state.
__device__ __forceinline__ float softmax_lse_log2(const SoftmaxState& state) {
    return softmax_is_empty(state) ? negative_infinity() : state.max + log2f(state.sum);
}

}  // namespace cupaged
