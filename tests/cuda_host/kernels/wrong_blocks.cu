// Blocks count themselves. With FAULT a block relies on block 0 having run before.
extern "C" __global__ void wrong_blocks(int* counter, int* output) {
#if FAULT
    if (blockIdx.x == 0) counter[0] = 5;
    output[blockIdx.x] = counter[0];
#else
    const int mine = atomicAdd(counter, 1);
    output[mine] = 5;
#endif
}
