// An asynchronous copy may read its source as late as the wait: overwriting the source before that
// is a fault, waiting first is not.
#include "ptx.cuh"

extern "C" __global__ void source_changes(float4* data, float4* output) {
    __shared__ float4 values[32];
    const int i = threadIdx.x;
    cupaged::cp_async_16(values + i, data + i);
    cupaged::cp_async_commit();
#if FAULT
    data[i] = make_float4(0, 0, 0, 0);
    cupaged::cp_async_wait<0>();
#else
    cupaged::cp_async_wait<0>();
    data[i] = make_float4(0, 0, 0, 0);
#endif
    output[i] = values[i];
}
