// The root mean square norm: sums of squares over lanes, and what they make of a chunk of 16 bytes.
//
// Products that are added are fused by name: a row has the same bits however it lies in memory.
#pragma once

#include "chunks.cuh"
#include "common.cuh"
#include "vec.cuh"

namespace cupaged {

// The sum over `lanes` neighbouring lanes, a power of two; all lanes of the warp take part.
__device__ __forceinline__ float lanes_sum(float x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(kFullMask, x, distance);
    return x;
}

__device__ __forceinline__ float add_squares(const float* x, int count, float sum) {
#pragma unroll
    for (int i = 0; i < count; ++i) sum = fmaf(x[i], x[i], sum);
    return sum;
}

__device__ __forceinline__ float inverse_rms(float squares, int size, float epsilon) {
    return rsqrtf(squares / static_cast<float>(size) + epsilon);
}

// The weights of a norm: `values` holds scalar_t, or float where is_float.
struct NormWeights {
    const void* values;
    bool is_float;
    float offset;  // that is added to each

    template <bool kAligned, typename T>
    __device__ __forceinline__ void load(int first, int count, float* weights) const {
        load_floats<kAligned, T>(values, is_float, first, count, weights);
#pragma unroll
        for (int i = 0; i < kVecSize<T>; ++i) weights[i] += offset;
    }
};

}  // namespace cupaged
