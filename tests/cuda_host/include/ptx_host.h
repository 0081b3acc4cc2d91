// The functions of ptx.cuh for the emulation. Copies land as late as PTX allows.
#pragma once

#include "host_runtime.h"
#include "mma_host.h"

// The conversions of sm_89; kernels have the same in plain arithmetic.
#define CUPAGED_HAS_FP8 0

namespace cupaged {

inline void cp_async_16(void* smem, const void* gmem) {
    cupaged_host::copy_async(smem, gmem, 16, true);
}
inline void cp_async_16_zfill(void* smem, const void* gmem, bool valid) {
    cupaged_host::copy_async(smem, gmem, 16, valid);
}
inline void cp_async_commit() {
    cupaged_host::copy_async_commit();
}
template <int N>
inline void cp_async_wait() {
    cupaged_host::copy_async_wait(N);
}
inline void store_global_16(void* target, const uint4& raw) {
    *static_cast<uint4*>(target) = raw;
}

}  // namespace cupaged
