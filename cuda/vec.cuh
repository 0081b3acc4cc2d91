// 16-byte loads and stores, and their conversion to and from float.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace cupaged {

// Elements of T in 16 bytes.
template <typename T>
constexpr int kVecSize = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ void unpack_word(unsigned word, float* x, float) {
    x[0] = bit_cast<float>(word);
}
__device__ __forceinline__ unsigned pack_word(const float* x, float) {
    return bit_cast<unsigned>(x[0]);
}
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

#if defined(CUPAGED_DTYPE) && CUPAGED_DTYPE == CUPAGED_FP16
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
__device__ __forceinline__ void unpack_word(unsigned word, float* x, __half) {
    const float2 pair = __half22float2(bit_cast<__half2>(word));
    x[0] = pair.x;
    x[1] = pair.y;
}
__device__ __forceinline__ unsigned pack_word(const float* x, __half) {
    return bit_cast<unsigned>(__floats2half2_rn(x[0], x[1]));
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
#endif

#if defined(CUPAGED_DTYPE) && CUPAGED_DTYPE == CUPAGED_BF16
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
// A bfloat16 is the upper half of a float.
__device__ __forceinline__ void unpack_word(unsigned word, float* x, __nv_bfloat16) {
    x[0] = bit_cast<float>(word << 16);
    x[1] = bit_cast<float>(word & 0xffff0000u);
}
__device__ __forceinline__ unsigned pack_word(const float* x, __nv_bfloat16) {
    return bit_cast<unsigned>(__floats2bfloat162_rn(x[0], x[1]));
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
#endif

// kVecSize<T> floats from 16 bytes.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float* x) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    unpack_word(raw.x, x, T());
    unpack_word(raw.y, x + kPerWord, T());
    unpack_word(raw.z, x + 2 * kPerWord, T());
    unpack_word(raw.w, x + 3 * kPerWord, T());
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float* x) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    return make_uint4(pack_word(x, T()), pack_word(x + kPerWord, T()),
                      pack_word(x + 2 * kPerWord, T()), pack_word(x + 3 * kPerWord, T()));
}

// 16 bytes from global memory. Tensors of the caller may have any strides: where `aligned` is false
// (their rows do not all start at a multiple of 16 bytes) it reads one element at a time.
template <typename T>
__device__ __forceinline__ uint4 load_vec(const T* source, bool aligned) {
    if (aligned) return *reinterpret_cast<const uint4*>(source);
    T elements[kVecSize<T>];
#pragma unroll
    for (int i = 0; i < kVecSize<T>; ++i) elements[i] = source[i];
    return bit_cast<uint4>(elements);
}

template <typename T>
__device__ __forceinline__ void store_vec(T* target, const uint4& raw, bool aligned) {
    if (aligned) {
        store_global_16(target, raw);
        return;
    }
    T elements[kVecSize<T>];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kVecSize<T>; ++i) target[i] = elements[i];
}

}  // namespace cupaged
