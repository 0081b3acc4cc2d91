// The type of the cache, and conversions of 8-bit codes to halves, to floats, and back.
//
// Macro CUPAGED_CACHE_DTYPE, one of the three names below. Without it the cache holds scalar_t.
//
// A stored code represents code * scale, with one scale per KV head. Unpacking omits the scale and,
// where that saves instructions, a power of two as well: code = unpacked * kUnpackedScale. A kernel
// multiplies logits and outputs by both, instead of every element.
#pragma once

#include "common.cuh"
#include "ptx.cuh"
#include "vec.cuh"

#define CUPAGED_FP8_E4M3 3
#define CUPAGED_FP8_E5M2 4
#define CUPAGED_INT8 5

// Whether fp16 comes from e4m3 by the instruction of sm_89. Where rows are many (row groups)
// registers are too scarce for it, by ptxas' count.
#if CUPAGED_HAS_FP8 && !defined(CUPAGED_ROW_GROUPS)
#define CUPAGED_CONVERTS_E4M3 1
#else
#define CUPAGED_CONVERTS_E4M3 0
#endif

namespace cupaged {

template <typename T>
constexpr float kUnpackedScale = 1.0f;

}  // namespace cupaged

#ifndef CUPAGED_CACHE_DTYPE
using cache_t = scalar_t;
#else

namespace cupaged {

struct fp8_e4m3 {
    unsigned char code;
};
struct fp8_e5m2 {
    unsigned char code;
};
struct int8_code {
    unsigned char code;
};

template <>
constexpr float kUnpackedScale<fp8_e4m3> = CUPAGED_CONVERTS_E4M3 ? 1.0f : 256.0f;

// Four codes into two pairs of fp16, in order; exact.
template <typename T>
__device__ __forceinline__ void unpack_halves(unsigned word, unsigned (&halves)[2]);

// The upper byte of an fp16 has the same sign and exponent, and the two bits of the mantissa.
template <>
__device__ __forceinline__ void unpack_halves<fp8_e5m2>(unsigned word, unsigned (&halves)[2]) {
    halves[0] = __byte_perm(word, 0, 0x1404);
    halves[1] = __byte_perm(word, 0, 0x3424);
}

// An instruction a pair, or: moved right by one bit, exponent and mantissa are those of an fp16,
// whose bias is larger by 8; subnormals too. The code of NaN, though, becomes a number: 480.
template <>
__device__ __forceinline__ void unpack_halves<fp8_e4m3>(unsigned word, unsigned (&halves)[2]) {
#if CUPAGED_CONVERTS_E4M3
    halves[0] = cvt_f16x2_e4m3x2(static_cast<unsigned short>(word));
    halves[1] = cvt_f16x2_e4m3x2(static_cast<unsigned short>(word >> 16));
#else
    unpack_halves<fp8_e5m2>(word, halves);
#pragma unroll
    for (int i = 0; i < 2; ++i)
        halves[i] = (halves[i] & 0x80008000u) | ((halves[i] & 0x7f007f00u) >> 1);
#endif
}

// 0x6400 + u is the fp16 1024 + u, with u = code + 128.
template <>
__device__ __forceinline__ void unpack_halves<int8_code>(unsigned word, unsigned (&halves)[2]) {
    const unsigned biased = word ^ 0x80808080u;
    const __half2 bias = bit_cast<__half2>(0x64806480u);  // 1152
    halves[0] = bit_cast<unsigned>(
        __hsub2(bit_cast<__half2>(__byte_perm(biased, 0x64646464u, 0x4140)), bias));
    halves[1] = bit_cast<unsigned>(
        __hsub2(bit_cast<__half2>(__byte_perm(biased, 0x64646464u, 0x4342)), bias));
}

template <typename T>
__device__ __forceinline__ void unpack_codes(unsigned word, float* x) {
    unsigned halves[2];
    unpack_halves<T>(word, halves);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float2 pair = __half22float2(bit_cast<__half2>(halves[i]));
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void unpack_word(unsigned word, float* x, fp8_e4m3) {
    unpack_codes<fp8_e4m3>(word, x);
}
__device__ __forceinline__ void unpack_word(unsigned word, float* x, fp8_e5m2) {
    unpack_codes<fp8_e5m2>(word, x);
}
__device__ __forceinline__ void unpack_word(unsigned word, float* x, int8_code) {
    unpack_codes<int8_code>(word, x);
}

// The nearest code of an 8-bit float, ties to even; beyond `largest` it saturates. NaN is 0x7f.
// What cvt.rn.satfinite does from sm_89 on.
template <int kMantissaBits, int kBias>
__device__ __forceinline__ unsigned nearest_fp8(float x, float largest) {
    constexpr int kDropped = 23 - kMantissaBits;
    constexpr unsigned kSmallestNormal = (127u + 1 - kBias) << 23;
    // A float of this exponent counts in units of the smallest subnormal.
    constexpr unsigned kUnits = (127u + 1 - kBias - kMantissaBits + 23) << 23;
    const unsigned sign = bit_cast<unsigned>(x) & 0x80000000u;
    const unsigned magnitude = bit_cast<unsigned>(x) ^ sign;
    if (magnitude > 0x7f800000u) return 0x7f;
    const float limited = fminf(bit_cast<float>(magnitude), largest);
    const unsigned bits = bit_cast<unsigned>(limited);
    const unsigned rounded = bits + ((1u << (kDropped - 1)) - 1) + ((bits >> kDropped) & 1);
    const unsigned normal = (rounded >> kDropped) - ((127u - kBias) << kMantissaBits);
    const unsigned subnormal = bit_cast<unsigned>(limited + bit_cast<float>(kUnits)) - kUnits;
    return (bits < kSmallestNormal ? subnormal : normal) | (sign >> 24);
}

// Four codes, each of the float itself: the caller has divided by the scale.
__device__ __forceinline__ unsigned pack_word(const float* x, fp8_e4m3) {
#if CUPAGED_HAS_FP8
    return cvt_e4m3x2(x[0], x[1]) | cvt_e4m3x2(x[2], x[3]) << 16;
#else
    return nearest_fp8<3, 7>(x[0], 448.0f) | nearest_fp8<3, 7>(x[1], 448.0f) << 8 |
           nearest_fp8<3, 7>(x[2], 448.0f) << 16 | nearest_fp8<3, 7>(x[3], 448.0f) << 24;
#endif
}
__device__ __forceinline__ unsigned pack_word(const float* x, fp8_e5m2) {
#if CUPAGED_HAS_FP8
    return cvt_e5m2x2(x[0], x[1]) | cvt_e5m2x2(x[2], x[3]) << 16;
#else
    return nearest_fp8<2, 15>(x[0], 57344.0f) | nearest_fp8<2, 15>(x[1], 57344.0f) << 8 |
           nearest_fp8<2, 15>(x[2], 57344.0f) << 16 | nearest_fp8<2, 15>(x[3], 57344.0f) << 24;
#endif
}
// The nearest integer from -127 to 127, ties to even; NaN is 0.
__device__ __forceinline__ unsigned pack_word(const float* x, int8_code) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float limited = x[i] == x[i] ? fminf(fmaxf(x[i], -127.0f), 127.0f) : 0.0f;
        // 1.5 * 2^23 + n has n in its low bits.
        word |= (bit_cast<unsigned>(limited + 12582912.0f) & 0xffu) << (8 * i);
    }
    return word;
}

}  // namespace cupaged

#if CUPAGED_CACHE_DTYPE == CUPAGED_FP8_E4M3
using cache_t = cupaged::fp8_e4m3;
#elif CUPAGED_CACHE_DTYPE == CUPAGED_FP8_E5M2
using cache_t = cupaged::fp8_e5m2;
#elif CUPAGED_CACHE_DTYPE == CUPAGED_INT8
using cache_t = cupaged::int8_code;
#else
#error "CUPAGED_CACHE_DTYPE must be CUPAGED_FP8_E4M3, CUPAGED_FP8_E5M2 or CUPAGED_INT8"
#endif
#endif  // CUPAGED_CACHE_DTYPE

namespace cupaged {

// What the unpacked keys or values of one KV head are to be multiplied by.
__device__ __forceinline__ float unpacked_factor(const float* scale, int kv_head) {
    return scale == nullptr ? 1.0f : scale[kv_head] * kUnpackedScale<cache_t>;
}

}  // namespace cupaged
