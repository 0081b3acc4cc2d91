// Rows of any length, in chunks of 16 bytes. Where rows do not all begin at a multiple of 16 bytes,
// or do not end with a chunk, they are accessed one element at a time.
#pragma once

#include "common.cuh"
#include "ptx.cuh"
#include "vec.cuh"

namespace cupaged {

// 16 bytes from global memory, nothing where count is not positive. With kAligned false, `count`
// elements, one at a time, and zeros after them.
template <bool kAligned, typename T>
__device__ __forceinline__ uint4 load_chunk(const T* source, int count) {
    if (kAligned)
        return count > 0 ? *reinterpret_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
    T elements[kVecSize<T>];
#pragma unroll
    for (int i = 0; i < kVecSize<T>; ++i) elements[i] = i < count ? source[i] : from_float<T>(0.0f);
    return bit_cast<uint4>(elements);
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_chunk(T* target, const uint4& raw, int count) {
    if (kAligned) {
        if (count > 0) store_global_16(target, raw);
        return;
    }
    T elements[kVecSize<T>];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kVecSize<T>; ++i)
        if (i < count) target[i] = elements[i];
}

// kVecSize<scalar_t> floats from memory that holds them as scalar_t, or as float where is_float.
template <bool kAligned, typename T>
__device__ __forceinline__ void load_floats(const void* source, bool is_float, int first, int count,
                                            float* x) {
    if (is_float) {
        const float* const floats = static_cast<const float*>(source) + first;
#pragma unroll
        for (int i = 0; i < kVecSize<T>; i += kVecSize<float>)
            unpack<float>(load_chunk<kAligned>(floats + i, count - i), x + i);
    } else {
        unpack<T>(load_chunk<kAligned>(static_cast<const T*>(source) + first, count), x);
    }
}

}  // namespace cupaged
