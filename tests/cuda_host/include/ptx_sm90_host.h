// The functions of ptx_sm90.cuh for the emulation. Products end as late as the waits allow, and
// registers that they write are NaN until a wait is given them.
#pragma once

#include <type_traits>

#include "host_runtime.h"

struct __half;
struct __nv_bfloat16;

namespace cupaged {

inline void mbarrier_init(unsigned long long* barrier, int count, CUPAGED_HOST_SITE) {
    cupaged_host::mbarrier_init(barrier, count, {file, line});
}
inline void mbarrier_arrive(unsigned long long* barrier, CUPAGED_HOST_SITE) {
    cupaged_host::mbarrier_arrive(barrier, {file, line});
}
inline void mbarrier_wait(unsigned long long* barrier, int parity, CUPAGED_HOST_SITE) {
    cupaged_host::mbarrier_wait(barrier, parity, {file, line});
}

// What ordinary stores write the emulation cannot see: without the fence they pass for fenced.
inline void fence_proxy_async() {
    cupaged_host::fence_proxy_async();
}
inline void store_for_async_proxy(uint4* target, const uint4& value) {
    cupaged_host::store_for_async_proxy(target, &value, sizeof(value));
}

inline void named_barrier_sync(int id, int threads, CUPAGED_HOST_SITE) {
    cupaged_host::named_barrier(id, threads, true, "named_barrier_sync", {file, line});
}
inline void named_barrier_arrive(int id, int threads, CUPAGED_HOST_SITE) {
    cupaged_host::named_barrier(id, threads, false, "named_barrier_arrive", {file, line});
}

template <int kRegisters>
inline void increase_registers(CUPAGED_HOST_SITE) {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    cupaged_host::set_registers(kRegisters, "increase_registers", {file, line});
}
template <int kRegisters>
inline void decrease_registers(CUPAGED_HOST_SITE) {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    cupaged_host::set_registers(kRegisters, "decrease_registers", {file, line});
}

template <typename T, int kCount>
inline void keep_in_order(T (&)[kCount][4]) {}
inline void wgmma_fence(CUPAGED_HOST_SITE) {
    cupaged_host::wgmma_fence({file, line});
}
inline void wgmma_commit(CUPAGED_HOST_SITE) {
    cupaged_host::wgmma_commit({file, line});
}
template <int N, int kCount>
inline void wgmma_wait(float (&accumulators)[kCount][4], CUPAGED_HOST_SITE) {
    cupaged_host::wgmma_wait(N, accumulators[0], accumulators[0] + 4 * kCount, {file, line});
}
inline unsigned long long wgmma_descriptor(const void* start, int row_bytes, int panel_bytes,
                                           CUPAGED_HOST_SITE) {
    return cupaged_host::wgmma_descriptor(start, row_bytes, panel_bytes, {file, line});
}

inline unsigned long long wgmma_advance(unsigned long long descriptor, int bytes) {
    return descriptor + bytes / 16;
}

template <typename T, int N>
struct Wgmma {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
    static_assert(N == 64 || N == 80 || N == 96 || N == 128 || N == 192 || N == 256,
                  "those of ptx_sm90.cuh");
    static constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;

    static void shared(float (&d)[N / 8][4], unsigned long long a, unsigned long long b,
                       bool accumulate, CUPAGED_HOST_SITE) {
        cupaged_host::wgmma({d[0], nullptr, a, b, N, kBfloat16, false, accumulate}, {file, line});
    }
    static void registers(float (&d)[N / 8][4], const unsigned (&a)[4], unsigned long long b,
                          bool accumulate, CUPAGED_HOST_SITE) {
        static_assert(N % 64 == 0, "whole panels");
        cupaged_host::wgmma({d[0], a, 0, b, N, kBfloat16, true, accumulate}, {file, line});
    }
};

}  // namespace cupaged
