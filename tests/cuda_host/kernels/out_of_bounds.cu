// output[i] = input[i] for i < n. FAULT 1 reads one element beyond the input, 2 writes one beyond
// the output, 3 reads and 4 writes one element before; 5 writes through a pointer to const.
extern "C" __global__ void out_of_bounds(const float* input, float* output, int n) {
    const int i = threadIdx.x;
    if (i >= n) return;
    output[i] = input[i];
#if FAULT == 1
    output[i] = input[i + 1];
#elif FAULT == 2
    output[i + 1] = input[i];
#elif FAULT == 3
    output[i] = input[i - 1];
#elif FAULT == 4
    output[i - 1] = input[i];
#elif FAULT == 5
    const_cast<float*>(input)[i] = 0.0f;
#endif
}
