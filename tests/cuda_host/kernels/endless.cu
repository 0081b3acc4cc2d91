// Waits for a word that nobody writes. With FAULT 2 it meets the others in between.
extern "C" __global__ void endless(volatile int* word) {
    while (*word == 0) {
#if FAULT == 2
        __syncthreads();
#endif
    }
}
