// out = 1 + 2 * a * b by one warpgroup, a [64, depth], both at most 256 columns. Not transposed:
// both in shared memory, b's columns are its rows there, [columns, depth]. Transposed: a in
// registers, b [depth, columns].
#include "common.cuh"
#include "ptx_sm90.cuh"

namespace cupaged {

constexpr int kRowBytes = 1024;

// [rows, columns] into panels of 64 columns, zeros beyond the columns.
__device__ void store_panels(const scalar_t* matrix, uint4* panels, int rows, int columns) {
    const int chunks = ceil_div(columns, 64) * 8;
    for (int i = threadIdx.x; i < rows * chunks; i += kWarpgroupSize) {
        const int row = i / chunks, chunk = i % chunks;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (8 * chunk < columns) memcpy(&raw, matrix + row * columns + 8 * chunk, 16);
        uint4* const panel = panels + chunk / 8 * rows * 8;
        store_for_async_proxy(panel + row * 8 + swizzle_chunk(row, chunk % 8), raw);
    }
}

template <int kColumns, bool kTransposed>
__device__ void multiply(const scalar_t* a, const uint4* a_panels, const uint4* b_panels,
                         float* out, int depth) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
    float d[kColumns / 8][4];
    for (int n = 0; n < kColumns / 8; ++n)
        for (int i = 0; i < 4; ++i) d[n][i] = 1.0f;
    wgmma_fence();
    for (int k = 0; k < 2 * depth; k += 16) {
        const int step = k % depth;
        if constexpr (kTransposed) {
            unsigned registers[4];
            for (int r = 0; r < 4; ++r) {
                const int row = 16 * warp + g + 8 * (r % 2), column = step + 8 * (r / 2) + 2 * t;
                memcpy(&registers[r], a + row * depth + column, 4);
            }
            Wgmma<scalar_t, kColumns>::registers(
                d, registers, wgmma_descriptor(b_panels + step * 8, kRowBytes, depth * 128), true);
        } else {
            const int panel = step / 64, chunk = step % 64 / 8;
            Wgmma<scalar_t, kColumns>::shared(
                d, wgmma_descriptor(a_panels + panel * 64 * 8 + chunk, kRowBytes, 0),
                wgmma_descriptor(b_panels + panel * kColumns * 8 + chunk, kRowBytes, 0), true);
        }
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int n = 0; n < kColumns / 8; ++n)
        for (int i = 0; i < 4; ++i)
            out[(16 * warp + g + 8 * (i / 2)) * kColumns + 8 * n + 2 * t + i % 2] = d[n][i];
}

}  // namespace cupaged

extern "C" __global__ void wgmma_product(const scalar_t* a, const scalar_t* b, float* out,
                                         int depth, int columns, int transposed) {
    using namespace cupaged;
    CUPAGED_DYNAMIC_SMEM(bytes, 1024);
    uint4* const a_panels = reinterpret_cast<uint4*>(bytes);
    uint4* const b_panels = a_panels + ceil_div(depth, 64) * 64 * 8;
    store_panels(a, a_panels, 64, depth);
    if (transposed)
        store_panels(b, b_panels, depth, columns);
    else
        store_panels(b, b_panels, columns, depth);
    fence_proxy_async();
    __syncthreads();
    switch (columns) {
#define MULTIPLY(columns)                                                            \
    case columns:                                                                    \
        if (transposed)                                                              \
            multiply<columns, columns % 64 == 0>(a, a_panels, b_panels, out, depth); \
        else                                                                         \
            multiply<columns, false>(a, a_panels, b_panels, out, depth);             \
        break;
        MULTIPLY(64)
        MULTIPLY(80)
        MULTIPLY(96)
        MULTIPLY(128)
        MULTIPLY(192)
        MULTIPLY(256)
    }
}
