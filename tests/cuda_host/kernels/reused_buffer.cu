// Each round rotates the values through one buffer. With FAULT a round may overwrite what the round
// before still reads.
extern "C" __global__ void reused_buffer(const float* input, float* output, int rounds) {
    __shared__ float values[128];
    float x = input[threadIdx.x];
    for (int round = 0; round < rounds; ++round) {
        values[threadIdx.x] = x;
        __syncthreads();
        x = values[(threadIdx.x + 32) % 128];
#if !FAULT
        __syncthreads();
#endif
    }
    output[threadIdx.x] = x;
}
