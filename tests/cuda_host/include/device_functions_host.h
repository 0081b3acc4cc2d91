// Atomics, loads with cache hints, and the mathematics that CUDA adds to C's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Threads switch at barriers and collectives only, so a plain operation is atomic.
template <typename T, typename U>
T cupaged_host_exchange(T* address, U value) {
    const T old = *address;
    *address = static_cast<T>(value);
    return old;
}
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, *address + value);
}
template <typename T>
T atomicSub(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, *address - value);
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, value < *address ? value : *address);
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, *address < value ? value : *address);
}
template <typename T>
T atomicAnd(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, *address & value);
}
template <typename T>
T atomicOr(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, *address | value);
}
template <typename T>
T atomicXor(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, *address ^ value);
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, value);
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
    return cupaged_host_exchange(address, *address == compare ? value : *address);
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
    return cupaged_host_exchange(address, *address >= limit ? 0u : *address + 1);
}
inline unsigned atomicDec(unsigned* address, unsigned limit) {
    return cupaged_host_exchange(address, *address == 0 || *address > limit ? limit : *address - 1);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
T __ldcs(const T* address) {
    return *address;
}
template <typename T>
void __stcs(T* address, std::common_type_t<T> value) {
    *address = value;
}
template <typename T>
void __stcg(T* address, std::common_type_t<T> value) {
    *address = value;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    static_assert(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>);
    return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    static_assert(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>);
    return a < b ? b : a;
}

inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline float __expf(float x) {
    return expf(x);
}
inline float __exp2f(float x) {
    return exp2f(x);
}
inline float __logf(float x) {
    return logf(x);
}
inline float __log2f(float x) {
    return log2f(x);
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
inline float __saturatef(float x) {
    return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}

template <typename To, typename From>
To cupaged_host_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline unsigned __float_as_uint(float x) {
    return cupaged_host_bits<unsigned>(x);
}
inline int __float_as_int(float x) {
    return cupaged_host_bits<int>(x);
}
inline float __uint_as_float(unsigned x) {
    return cupaged_host_bits<float>(x);
}
inline float __int_as_float(int x) {
    return cupaged_host_bits<float>(x);
}
// Byte i of the result is the byte of y:x that nibble i of the selector names; its high bit asks
// for eight copies of that byte's sign instead.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i);
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
