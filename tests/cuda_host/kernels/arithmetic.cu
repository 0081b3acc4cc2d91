// output[i] = input[i] shifted by `offset` words. FAULT 1: the offset overflows 32 bits. 2: a
// vector load from an address that is no multiple of its size. 3: division by zero. 4: endless
// recursion.
__device__ __noinline__ int descend(int n) {
    volatile int pad[64];
    pad[n % 64] = n;
    return descend(n + 1) + pad[n % 64];
}

extern "C" __global__ void arithmetic(const int* input, int* output, int offset) {
    const int i = threadIdx.x;
    output[i] = input[offset + i];
#if FAULT == 1
    output[i] = input[offset * 1000000000 * 3];
#elif FAULT == 2
    const int4 four = *reinterpret_cast<const int4*>(input + offset);
    output[i] = four.x;
#elif FAULT == 3
    output[i] = input[offset] / (offset - 1);
#elif FAULT == 4
    output[i] = descend(offset);
#endif
}
