// The registers of ldmatrix for rows of 8 numbers: COUNT matrices, transposed or not. FAULT: the
// rows are not at multiples of 16 bytes.
#include "mma_host.h"

extern "C" __global__ void load_matrix(const unsigned short* rows, unsigned* output) {
    __shared__ uint4 shared[COUNT * 8 + 1];
    unsigned short* const first = reinterpret_cast<unsigned short*>(shared) + FAULT;
    const int lane = threadIdx.x;
    for (int i = lane; i < COUNT * 64; i += 32) first[i] = rows[i];
    __syncwarp();
    const unsigned short* const row = lane < 8 * COUNT ? first + 8 * lane : nullptr;
    unsigned registers[COUNT];
    cupaged::LOAD(registers, row);
    for (int m = 0; m < COUNT; ++m) output[32 * m + lane] = registers[m];
}
