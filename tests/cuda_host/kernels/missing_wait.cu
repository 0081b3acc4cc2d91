// Two asynchronous copies a thread, double buffered. With FAULT 1 the wait is missing, with FAULT 2
// it waits for the older group only, with FAULT 3 the second copy is never committed.
#include "ptx.cuh"

extern "C" __global__ void missing_wait(const float4* input, float4* output) {
    __shared__ float4 values[2][32];
    const int i = threadIdx.x;
    cupaged::cp_async_16(&values[0][i], input + i);
    cupaged::cp_async_commit();
    cupaged::cp_async_16_zfill(&values[1][i], input + 32 + i, i % 2 == 0);
#if FAULT != 3
    cupaged::cp_async_commit();
#endif
#if FAULT == 2
    cupaged::cp_async_wait<1>();
#elif FAULT != 1
    cupaged::cp_async_wait<0>();
#endif
    output[i] = values[0][i];
    output[32 + i] = values[1][i];
}
