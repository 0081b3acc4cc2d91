// Every PTX instruction the kernels use, one thin function each.
//
// Asynchronous copies exist from sm_80 on. Before that they are plain 16-byte copies that are
// complete when the function returns; the commits and waits around them are then empty, and the
// same kernels are correct on both.
#pragma once

#ifdef CUPAGED_HOST
#include "ptx_host.h"
#else

namespace cupaged {

#if __CUDA_ARCH__ >= 800
#define CUPAGED_HAS_CP_ASYNC 1
#else
#define CUPAGED_HAS_CP_ASYNC 0
#endif

// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ unsigned smem_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copy 16 bytes from global to shared memory; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem) {
#if CUPAGED_HAS_CP_ASYNC
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(smem)), "l"(gmem)
                 : "memory");
#else
    *static_cast<uint4*>(smem) = *static_cast<const uint4*>(gmem);
#endif
}

// The same, or 16 zero bytes where valid is false: then nothing is read from gmem.
__device__ __forceinline__ void cp_async_16_zfill(void* smem, const void* gmem, bool valid) {
#if CUPAGED_HAS_CP_ASYNC
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)),
                 "l"(gmem), "r"(bytes)
                 : "memory");
#else
    *static_cast<uint4*>(smem) = valid ? *static_cast<const uint4*>(gmem) : make_uint4(0, 0, 0, 0);
#endif
}

// Close this thread's group of copies issued since the last commit. A group may be empty.
__device__ __forceinline__ void cp_async_commit() {
#if CUPAGED_HAS_CP_ASYNC
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most N of this thread's newest groups are still in flight. Only this thread sees
// what arrived; a barrier shows it to the others.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if CUPAGED_HAS_CP_ASYNC
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace cupaged

#endif  // CUPAGED_HOST
