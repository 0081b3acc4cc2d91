// The PTX instructions of Hopper (sm_90a), one thin function each: barriers in shared memory,
// matrix products of a warpgroup, and the fences that order the two.
//
// The products read shared memory through the async proxy. Stores and cp.async of threads go
// through the generic proxy: a writer waits for its copies, calls fence_proxy_async(), and then
// signals the reader through a barrier.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace cupaged {

constexpr int kWarpgroupSize = 128;

// A matrix in shared memory for wgmma, in panels of 64 elements of 16 bits: a row of a panel has
// 128 bytes, 8 rows are 1024, and the panel starts at a multiple of that. The 16-byte chunk c of
// row r lies where chunk swizzle_chunk(r, c) would without the swizzle.
//
//   rows are M or N (K-major)   16 columns from one panel; 8 rows further is row_bytes further
//   rows are K (transposed)     16 rows; 8 rows further is row_bytes further, and 64 columns
//                               further is panel_bytes further. N is a multiple of 64: nowhere is
//                               it said that a product may end inside a panel
__device__ __forceinline__ int swizzle_chunk(int row, int chunk) {
    return chunk ^ (row % 8);
}

}  // namespace cupaged

#ifdef CUPAGED_HOST
#include "ptx_sm90_host.h"
#else

namespace cupaged {

// A barrier in shared memory. Its phase ends when `count` threads have arrived, and the next one
// begins at once. All threads see it after a block barrier.
__device__ __forceinline__ void mbarrier_init(unsigned long long* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count)
                 : "memory");
}

// What this thread did before is seen by those who have waited for the phase.
__device__ __forceinline__ void mbarrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier))
                 : "memory");
}

// Wait for the end of the current phase if it has this parity, else it is over: return at once. The
// first phase has parity 0; before it, that of parity 1 counts as over.
__device__ __forceinline__ void mbarrier_wait(unsigned long long* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "waiting:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra waiting;\n"
        "}" ::"r"(smem_address(barrier)),
        "r"(parity)
        : "memory");
}

// What this thread wrote to shared memory is there for the async proxy.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A store to shared memory that the async proxy will read, after the fence.
__device__ __forceinline__ void store_for_async_proxy(uint4* target, const uint4& value) {
    *target = value;
}

// Barrier `id` (1 to 15) of `threads` threads of the block, whole warps: wait for all of them, or
// only be counted.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Change the registers that each thread of this warpgroup may have.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The compiler must neither move what computes these registers past this point, nor what changes
// them before it: it does not see that products under way use them. For before wgmma_fence() and
// after wgmma_wait().
template <int kCount>
__device__ __forceinline__ void keep_in_order(float (&registers)[kCount][4]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(registers[n][i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keep_in_order(unsigned (&registers)[kCount][4]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(registers[n][i])::"memory");
}

// Before a warpgroup's first product, and whenever it has touched registers that the next takes.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Close this warpgroup's group of products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most N of the newest groups are under way. The accumulators of the others are
// valid then; give those that are used next, so that the compiler does not read them before.
template <int N, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&accumulators)[kCount][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    keep_in_order(accumulators);
}

// The descriptor of a matrix as above, from its first element on.
__device__ __forceinline__ unsigned long long wgmma_descriptor(const void* start, int row_bytes,
                                                               int panel_bytes) {
    const unsigned long long swizzle_128_bytes = 1;
    return static_cast<unsigned long long>((smem_address(start) & 0x3ffff) >> 4) |
           static_cast<unsigned long long>(panel_bytes >> 4) << 16 |
           static_cast<unsigned long long>(row_bytes >> 4) << 32 | swizzle_128_bytes << 62;
}

// The descriptor of a matrix that begins so many bytes after another one. Its address is in the low
// word and cannot overflow there, which the compiler does not know.
__device__ __forceinline__ unsigned long long wgmma_advance(unsigned long long descriptor,
                                                            int bytes) {
    unsigned long long result;
    asm("{\n.reg .b32 low, high;\nmov.b64 {low, high}, %1;\nadd.u32 low, low, %2;\n"
        "mov.b64 %0, {low, high};\n}"
        : "=l"(result)
        : "l"(descriptor), "r"(bytes / 16));
    return result;
}

// Products of a warpgroup: d += a * b, or d = a * b, for a 64x16, b 16xN, d 64xN in float32. T is
// the type of a and b, __half or __nv_bfloat16. Warp w holds rows 16w to 16w + 15 of d, and of a
// where it is in registers: each 8 columns of d as mma_m16n8k16 lays out its c, each 16 columns of
// a as its a.
template <typename T, int N>
struct Wgmma;
//  static void shared(float (&d)[N / 8][4], uint64 a, uint64 b, bool accumulate)
//      a K-major, b's rows in memory are its columns (K-major)
//  static void registers(float (&d)[N / 8][4], const unsigned (&a)[4], uint64 b, bool accumulate)
//      b's rows in memory are its rows (transposed)

// clang-format off
#define CUPAGED_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CUPAGED_D16 CUPAGED_D8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define CUPAGED_D24 CUPAGED_D16 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define CUPAGED_D32 CUPAGED_D24 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define CUPAGED_D40 CUPAGED_D32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define CUPAGED_D48 CUPAGED_D40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define CUPAGED_D56 CUPAGED_D48 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define CUPAGED_D64 CUPAGED_D56 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define CUPAGED_D72 CUPAGED_D64 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define CUPAGED_D80 CUPAGED_D72 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define CUPAGED_D88 CUPAGED_D80 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define CUPAGED_D96 CUPAGED_D88 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define CUPAGED_D104 CUPAGED_D96 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define CUPAGED_D112 CUPAGED_D104 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define CUPAGED_D120 CUPAGED_D112 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define CUPAGED_D128 CUPAGED_D120 ", " "%120, %121, %122, %123, %124, %125, %126, %127"
#define CUPAGED_OF_1(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define CUPAGED_OF_2(d, n) CUPAGED_OF_1(d, n), CUPAGED_OF_1(d, n + 1)
#define CUPAGED_OF_8(d) CUPAGED_OF_2(d, 0)
#define CUPAGED_OF_16(d) CUPAGED_OF_8(d), CUPAGED_OF_2(d, 2)
#define CUPAGED_OF_24(d) CUPAGED_OF_16(d), CUPAGED_OF_2(d, 4)
#define CUPAGED_OF_32(d) CUPAGED_OF_24(d), CUPAGED_OF_2(d, 6)
#define CUPAGED_OF_40(d) CUPAGED_OF_32(d), CUPAGED_OF_2(d, 8)
#define CUPAGED_OF_48(d) CUPAGED_OF_40(d), CUPAGED_OF_2(d, 10)
#define CUPAGED_OF_56(d) CUPAGED_OF_48(d), CUPAGED_OF_2(d, 12)
#define CUPAGED_OF_64(d) CUPAGED_OF_56(d), CUPAGED_OF_2(d, 14)
#define CUPAGED_OF_72(d) CUPAGED_OF_64(d), CUPAGED_OF_2(d, 16)
#define CUPAGED_OF_80(d) CUPAGED_OF_72(d), CUPAGED_OF_2(d, 18)
#define CUPAGED_OF_88(d) CUPAGED_OF_80(d), CUPAGED_OF_2(d, 20)
#define CUPAGED_OF_96(d) CUPAGED_OF_88(d), CUPAGED_OF_2(d, 22)
#define CUPAGED_OF_104(d) CUPAGED_OF_96(d), CUPAGED_OF_2(d, 24)
#define CUPAGED_OF_112(d) CUPAGED_OF_104(d), CUPAGED_OF_2(d, 26)
#define CUPAGED_OF_120(d) CUPAGED_OF_112(d), CUPAGED_OF_2(d, 28)
#define CUPAGED_OF_128(d) CUPAGED_OF_120(d), CUPAGED_OF_2(d, 30)
// clang-format on

// M registers of d, then the numbers of the operands after them.
#define CUPAGED_WGMMA(T, NAME, N, M, O1, O2, O3, O4, O5)                                          \
    template <>                                                                                   \
    struct Wgmma<T, N> {                                                                          \
        __device__ __forceinline__ static void shared(float (&d)[N / 8][4], unsigned long long a, \
                                                      unsigned long long b, bool accumulate) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2                                 \
                         ", 0;\n"                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME          \
                         " {" CUPAGED_D##M "}, %" #M ", %" #O1 ", p, 1, 1, 0, 0;\n}"              \
                         : CUPAGED_OF_##M(d)                                                      \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                    \
        }                                                                                         \
        __device__ __forceinline__ static void registers(float (&d)[N / 8][4],                    \
                                                         const unsigned (&a)[4],                  \
                                                         unsigned long long b, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5                                 \
                         ", 0;\n"                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME          \
                         " {" CUPAGED_D##M "}, {%" #M ", %" #O1 ", %" #O2 ", %" #O3 "}, %" #O4    \
                                           ", p, 1, 1, 1;\n}"                                     \
                         : CUPAGED_OF_##M(d)                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                    \
                           "r"(static_cast<int>(accumulate)));                                    \
        }                                                                                         \
    };
#define CUPAGED_WGMMAS(T, NAME)                           \
    CUPAGED_WGMMA(T, NAME, 64, 32, 33, 34, 35, 36, 37)    \
    CUPAGED_WGMMA(T, NAME, 80, 40, 41, 42, 43, 44, 45)    \
    CUPAGED_WGMMA(T, NAME, 96, 48, 49, 50, 51, 52, 53)    \
    CUPAGED_WGMMA(T, NAME, 128, 64, 65, 66, 67, 68, 69)   \
    CUPAGED_WGMMA(T, NAME, 192, 96, 97, 98, 99, 100, 101) \
    CUPAGED_WGMMA(T, NAME, 256, 128, 129, 130, 131, 132, 133)
#if CUPAGED_DTYPE == CUPAGED_FP16
CUPAGED_WGMMAS(__half, "f16")
#elif CUPAGED_DTYPE == CUPAGED_BF16
CUPAGED_WGMMAS(__nv_bfloat16, "bf16")
#endif
#undef CUPAGED_WGMMAS
#undef CUPAGED_WGMMA

}  // namespace cupaged

#endif  // CUPAGED_HOST
