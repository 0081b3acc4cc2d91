// c = a * b by one warp. a [16, 16] row-major; b [16, 8] row-major, or with B_COLUMNS column-major,
// loaded without transposition then.
#include "common.cuh"
#include "mma_host.h"

extern "C" __global__ void matrix(const scalar_t* a, const scalar_t* b, float* c) {
    using namespace cupaged;
    __shared__ uint4 shared[16 * 16 * 2 / 16 + 16 * 8 * 2 / 16];
    scalar_t* const shared_a = reinterpret_cast<scalar_t*>(shared);
    scalar_t* const shared_b = shared_a + 16 * 16;
    const int lane = threadIdx.x;
    for (int i = lane; i < 16 * 16; i += 32) shared_a[i] = a[i];
    for (int i = lane; i < 16 * 8; i += 32) shared_b[i] = b[i];
    __syncwarp();
    unsigned fragment_a[4], fragment_b[2];
    ldmatrix_x4(fragment_a, shared_a + lane % 16 * 16 + lane / 16 * 8);
#if B_COLUMNS
    ldmatrix_x2(fragment_b, shared_b + lane % 8 * 16 + lane / 8 % 2 * 8);
#else
    ldmatrix_x2_trans(fragment_b, shared_b + lane % 16 * 8);
#endif
    float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma_m16n8k16<scalar_t>(sum, fragment_a, fragment_b);
    mma_m16n8k16<scalar_t>(sum, fragment_a, fragment_b);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
