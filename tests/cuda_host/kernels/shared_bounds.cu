// Copy through dynamic shared memory of n floats and a static array of 32. FAULT 1 reads the
// element beyond the dynamic memory, 2 writes the one before it, 3 is beyond the static array, 4
// beyond an array in registers, 5 copies asynchronously to memory that is not shared.
#include "common.cuh"
#include "ptx.cuh"

extern "C" __global__ void shared_bounds(const float* input, float* output, int n) {
    CUPAGED_DYNAMIC_SMEM(bytes, 16);
    float* const values = reinterpret_cast<float*>(bytes);
    __shared__ float fixed[32];
    float registers[4];
    const int i = threadIdx.x;
    if (i >= n) return;
    values[i] = input[i];
    fixed[i % 32] = values[i];
    registers[i % 4] = fixed[i % 32];
#if FAULT == 1
    registers[i % 4] = values[i + 1];
#elif FAULT == 2
    values[i - 1] = input[i];
#elif FAULT == 3
    fixed[i + 1] = values[i];
#elif FAULT == 4
    registers[i] = values[i];
#elif FAULT == 5
    cupaged::cp_async_16(output, input);
#endif
    output[i] = registers[i % 4];
}
