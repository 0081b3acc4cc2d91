// The scalar type, conversions and dynamic shared memory, for all kernels.
//
// NVRTC compiles the sources for a GPU. With CUPAGED_HOST a C++ compiler compiles the same sources
// for the CPU, after a header that defines the CUDA keywords and built-in variables; only this file
// and ptx.cuh distinguish the two.
//
// Macros passed with -D: CUPAGED_DTYPE, one of the three names below, is the type of queries and
// outputs, and of the cache unless CUPAGED_CACHE_DTYPE (quant.cuh) is given. The other macros are
// documented at the head of their kernel.
#pragma once

#define CUPAGED_FP32 0
#define CUPAGED_FP16 1
#define CUPAGED_BF16 2

#ifdef CUPAGED_DTYPE
#if CUPAGED_DTYPE == CUPAGED_FP32
using scalar_t = float;
#elif CUPAGED_DTYPE == CUPAGED_FP16
#include <cuda_fp16.h>
using scalar_t = __half;
#elif CUPAGED_DTYPE == CUPAGED_BF16
#include <cuda_bf16.h>
using scalar_t = __nv_bfloat16;
#else
#error "CUPAGED_DTYPE must be CUPAGED_FP32, CUPAGED_FP16 or CUPAGED_BF16"
#endif
#endif

#ifdef CUPAGED_CACHE_DTYPE  // codes of 8 bits become fp16
#include <cuda_fp16.h>
#endif

#ifdef CUPAGED_HOST
#define CUPAGED_DYNAMIC_SMEM(name, alignment) \
    unsigned char* const name = cupaged_host_dynamic_smem(alignment)
#else
// Dynamic shared memory of the launch.
#define CUPAGED_DYNAMIC_SMEM(name, alignment) \
    extern __shared__ __align__(alignment)    \
    uint4 cupaged_dynamic_smem[];             \
    unsigned char* const name = reinterpret_cast<unsigned char*>(cupaged_dynamic_smem)
#endif

namespace cupaged {

// Offsets into a cache: larger than 2^31 elements as soon as a block id is multiplied.
using int64 = long long;

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

__device__ __forceinline__ float negative_infinity() {
    return bit_cast<float>(0xff800000u);
}

__host__ __device__ constexpr int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

// The smallest power of two that is at least n.
__host__ __device__ constexpr int next_power_of_two(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

}  // namespace cupaged
