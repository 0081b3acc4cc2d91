// FAULT 1: the halves of the block wait at two barriers. 2: half of the block waits for the other
// at a barrier, which waits for it in a shuffle. 3: a shuffle names lanes that have exited. 4:
// lanes wait in two shuffles for each other. 5: a lane calls a shuffle whose mask it is not in.
extern "C" __global__ void divergent_barrier(const int* input, int* output) {
    const int i = threadIdx.x;
    int x = input[i];
#if FAULT == 1
    if (i < 32)
        __syncthreads();
    else
        __syncthreads();
#elif FAULT == 2
    if (i % 2 == 0)
        __syncthreads();
    else
        x = __shfl_xor_sync(0xffffffffu, x, 1);
#elif FAULT == 3
    if (i % 32 >= 16) return;
    x = __shfl_xor_sync(0xffffffffu, x, 1);
#elif FAULT == 4
    if (i % 2 == 0)
        x = __shfl_xor_sync(0xffffffffu, x, 1);
    else
        x = __shfl_xor_sync(0xffffffffu, x, 1);
#elif FAULT == 5
    x = __shfl_xor_sync(0x0000ffffu, x, 1);
#else
    if (i >= 32) return;  // waits for those that have not exited
    __syncthreads();
    x = __shfl_xor_sync(0xffffffffu, x, 1);
#endif
    output[i] = x;
}
