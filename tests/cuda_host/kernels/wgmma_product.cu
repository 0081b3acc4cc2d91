// out = 1 + a * b + a * b by one warpgroup, a [64, kDepth]. TRANSPOSED 0: both in shared memory,
// b's columns are its rows there, [kColumns, kDepth]; 1: a in registers, b [kDepth, kColumns].
#include "common.cuh"
#include "ptx_sm90.cuh"

constexpr int kDepth = DEPTH, kColumns = COLUMNS;
constexpr int kRowBytes = 1024;

// [rows, columns] into panels of 64 columns, zeros beyond the columns.
__device__ void store_panels(const scalar_t* matrix, uint4* panels, int rows, int columns) {
    const int chunks = cupaged::ceil_div(columns, 64) * 8;
    for (int i = threadIdx.x; i < rows * chunks; i += cupaged::kWarpgroupSize) {
        const int row = i / chunks, chunk = i % chunks;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (8 * chunk < columns) memcpy(&raw, matrix + row * columns + 8 * chunk, 16);
        const int place = row * 8 + cupaged::swizzle_chunk(row, chunk % 8);
        cupaged::store_for_async_proxy(panels + chunk / 8 * rows * 8 + place, raw);
    }
}

extern "C" __global__ void wgmma_product(const scalar_t* a, const scalar_t* b, float* out) {
    using namespace cupaged;
    CUPAGED_DYNAMIC_SMEM(bytes, 1024);
    uint4* const a_panels = reinterpret_cast<uint4*>(bytes);
    uint4* const b_panels = a_panels + ceil_div(kDepth, 64) * 64 * 8;
    store_panels(a, a_panels, 64, kDepth);
#if TRANSPOSED
    store_panels(b, b_panels, kDepth, kColumns);
#else
    store_panels(b, b_panels, kColumns, kDepth);
#endif
    fence_proxy_async();
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
    float d[kColumns / 8][4];
    for (int n = 0; n < kColumns / 8; ++n)
        for (int i = 0; i < 4; ++i) d[n][i] = 1.0f;
    wgmma_fence();
    for (int k = 0; k < 2 * kDepth; k += 16) {
        const int step = k % kDepth;
#if TRANSPOSED
        unsigned registers[4];
        for (int r = 0; r < 4; ++r) {
            const int row = 16 * warp + g + 8 * (r % 2), column = step + 8 * (r / 2) + 2 * t;
            memcpy(&registers[r], a + row * kDepth + column, 4);
        }
        Wgmma<scalar_t, kColumns>::registers(
            d, registers, wgmma_descriptor(b_panels + step * 8, kRowBytes, kDepth * 128), true);
#else
        const int panel = step / 64, chunk = step % 64 / 8;
        Wgmma<scalar_t, kColumns>::shared(
            d, wgmma_descriptor(a_panels + panel * 64 * 8 + chunk, kRowBytes, 0),
            wgmma_descriptor(b_panels + panel * kColumns * 8 + chunk, kRowBytes, 0), true);
#endif
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int n = 0; n < kColumns / 8; ++n)
        for (int i = 0; i < 4; ++i)
            out[(16 * warp + g + 8 * (i / 2)) * kColumns + 8 * n + 2 * t + i % 2] = d[n][i];
}
