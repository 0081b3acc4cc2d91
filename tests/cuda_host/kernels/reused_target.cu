// The memory that an asynchronous copy goes to is used for something else. With FAULT it is not
// waited for.
#include "ptx.cuh"

extern "C" __global__ void reused_target(const float4* input, float4* output) {
    __shared__ float4 values[32];
    const int i = threadIdx.x;
    cupaged::cp_async_16(values + i, input + i);
    cupaged::cp_async_commit();
#if !FAULT
    cupaged::cp_async_wait<0>();
#endif
    values[i] = make_float4(1, 2, 3, 4);
    for (int round = 0; round < 8; ++round) __syncthreads();
    output[i] = values[i];
}
