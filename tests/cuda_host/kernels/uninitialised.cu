// The sum of 64 values in shared memory. FAULT 1: one is never written. 2: the same in dynamic
// shared memory. 4: in that of a template. 3: the sum in the register starts as it is.
#include "common.cuh"

template <typename T>
__device__ T* shared_values() {
    __shared__ T values[64];
    return values;
}

// Unused, a variable of another kind of function.
__device__ inline int* more_values() {
    __shared__ int values[64];
    return values;
}

extern "C" __global__ void uninitialised(const float* input, float* output) {
#if FAULT == 2
    CUPAGED_DYNAMIC_SMEM(bytes, 16);
    float* const values = reinterpret_cast<float*>(bytes);
#elif FAULT == 4
    float* const values = shared_values<float>();
    more_values()[0] = 0;
#else
    __shared__ float values[64];
#endif
    const int i = threadIdx.x;
#if FAULT == 1 || FAULT == 2 || FAULT == 4
    if (i != 17) values[i] = input[i];
#else
    values[i] = input[i];
#endif
    __syncthreads();
#if FAULT == 3
    float sum;
#else
    float sum = 0.0f;
#endif
    for (int j = 0; j < 64; ++j) sum += values[j];
    output[i] = sum;
}
