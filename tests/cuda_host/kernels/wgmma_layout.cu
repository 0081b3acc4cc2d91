// One product of matrices that lie anywhere in shared memory, which starts as `image`. Not
// transposed: a [64, 16] and b [80, 16] there; transposed: a the identity in registers, b [16, 128]
// there. Bytes from the start of shared memory, or between rows and panels.
#include "common.cuh"
#include "ptx_sm90.cuh"

namespace cupaged {

template <int kColumns>
__device__ void store(const float (&d)[kColumns / 8][4], float* out) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
    for (int n = 0; n < kColumns / 8; ++n)
        for (int i = 0; i < 4; ++i)
            out[(16 * warp + g + 8 * (i / 2)) * kColumns + 8 * n + 2 * t + i % 2] = d[n][i];
}

}  // namespace cupaged

extern "C" __global__ void wgmma_layout(const uint4* image, float* out, int chunks, int a_start,
                                        int a_row_bytes, int b_start, int b_row_bytes,
                                        int b_panel_bytes, int transposed) {
    using namespace cupaged;
    CUPAGED_DYNAMIC_SMEM(bytes, 1024);
    for (int i = threadIdx.x; i < chunks; i += kWarpgroupSize)
        store_for_async_proxy(reinterpret_cast<uint4*>(bytes) + i, image[i]);
    fence_proxy_async();
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
    const unsigned long long b = wgmma_descriptor(bytes + b_start, b_row_bytes, b_panel_bytes);
    wgmma_fence();
    if (transposed) {
        float d[16][4];
        unsigned a[4];
        for (int r = 0; r < 4; ++r) {
            scalar_t pair[2];
            for (int e = 0; e < 2; ++e)
                pair[e] = static_cast<scalar_t>(
                    warp == 0 && g + 8 * (r % 2) == 8 * (r / 2) + 2 * t + e ? 1.0f : 0.0f);
            memcpy(&a[r], pair, sizeof(pair));
        }
        Wgmma<scalar_t, 128>::registers(d, a, b, false);
        wgmma_commit();
        wgmma_wait<0>(d);
        store<128>(d, out);
    } else {
        float d[10][4];
        Wgmma<scalar_t, 80>::shared(d, wgmma_descriptor(bytes + a_start, a_row_bytes, 0), b, false);
        wgmma_commit();
        wgmma_wait<0>(d);
        store<80>(d, out);
    }
}
