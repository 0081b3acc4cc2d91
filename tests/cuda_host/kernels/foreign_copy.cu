// A thread waits for its own asynchronous copy and then reads another's. With FAULT no barrier is
// between.
#include "ptx.cuh"

extern "C" __global__ void foreign_copy(const float4* input, float4* output) {
    __shared__ float4 values[64];
    const int i = threadIdx.x;
    cupaged::cp_async_16(values + i, input + i);
    cupaged::cp_async_commit();
    cupaged::cp_async_wait<0>();
#if !FAULT
    __syncthreads();
#endif
    output[i] = values[63 - i];
}
