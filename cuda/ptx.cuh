// The PTX instructions that the kernels use, one thin function each.
//
// Asynchronous copies exist from sm_80 on. On earlier architectures they are plain 16-byte copies
// that are complete when the function returns; commits and waits are then empty, and the same
// kernels are correct on both.
#pragma once

#include "common.cuh"

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

// 16 bytes to global memory in one access. Where the parts of a uint4 come from elsewhere, the
// compiler does not always put them together.
__device__ __forceinline__ void store_global_16(void* target, const uint4& raw) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
                 "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
                 : "memory");
}

// Load four matrices of 8x8 16-bit elements from shared memory; lane 8m + r gives the address of
// row r of matrix m. Lane 4g + t gets elements 2t and 2t + 1 of row g of each.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&registers)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(smem_address(row))
                 : "memory");
}

// The same, each matrix transposed: elements 2t and 2t + 1 of column g.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&registers)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(smem_address(row))
                 : "memory");
}

// c += a * b for a 16x16, b 16x8, c 16x8 in float32; T is the type of a and b, __half or
// __nv_bfloat16. Layouts as in tests/cuda_host/include/mma_host.h. From sm_80 on.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]);

#define CUPAGED_MMA_M16N8K16(T, NAME)                                                      \
    template <>                                                                            \
    __device__ __forceinline__ void mma_m16n8k16<T>(float (&c)[4], const unsigned (&a)[4], \
                                                    const unsigned (&b)[2]) {              \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                \
                     ".f32 "                                                               \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));  \
    }
#if (defined(CUPAGED_DTYPE) && CUPAGED_DTYPE == CUPAGED_FP16) || defined(CUPAGED_CACHE_DTYPE)
CUPAGED_MMA_M16N8K16(__half, "f16")
#elif defined(CUPAGED_DTYPE) && CUPAGED_DTYPE == CUPAGED_BF16
CUPAGED_MMA_M16N8K16(__nv_bfloat16, "bf16")
#endif
#undef CUPAGED_MMA_M16N8K16

#if __CUDA_ARCH__ >= 890
#define CUPAGED_HAS_FP8 1

// The nearest 8-bit floats of two floats, ties to even, saturating; the first in the low byte.
__device__ __forceinline__ unsigned cvt_e4m3x2(float first, float second) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
    return codes;
}
__device__ __forceinline__ unsigned cvt_e5m2x2(float first, float second) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
    return codes;
}

// Two e4m3 as a pair of fp16, the one in the low byte first; exact.
__device__ __forceinline__ unsigned cvt_f16x2_e4m3x2(unsigned short codes) {
    unsigned halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
    return halves;
}
#else
#define CUPAGED_HAS_FP8 0
#endif

}  // namespace cupaged

#endif  // CUPAGED_HOST
