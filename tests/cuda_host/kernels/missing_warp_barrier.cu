// Reverse the values of one warp through shared memory. With FAULT the warp's barrier is missing.
extern "C" __global__ void missing_warp_barrier(const float* input, float* output) {
    __shared__ float values[32];
    values[threadIdx.x] = input[threadIdx.x];
#if !FAULT
    __syncwarp();
#endif
    output[threadIdx.x] = values[31 - threadIdx.x];
}
