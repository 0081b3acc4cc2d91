// Reverse the 128 values of each block through shared memory. With FAULT the barrier is missing.
extern "C" __global__ void missing_barrier(const float* input, float* output) {
    __shared__ float values[128];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    values[threadIdx.x] = input[i];
#if !FAULT
    __syncthreads();
#endif
    output[i] = values[blockDim.x - 1 - threadIdx.x];
}
