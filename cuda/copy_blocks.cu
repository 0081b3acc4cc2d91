// Copy whole blocks inside a cache: copy-on-write, for all layers at once.
//
//   cache          [num_blocks, ...]: each block is block_units units long, block_stride units
//   apart block_mapping  int64 [N, 2]: source and destination block, in no order
//
// Grid (x, N): the blocks of column y copy pair y together, neighbouring threads neighbouring
// units. No shared memory.
//
// Macro CUPAGED_UNIT_BYTES: 16, or 1 where the blocks' size or addresses are no multiple of 16.
#include "common.cuh"

#if CUPAGED_UNIT_BYTES == 16
using unit_t = uint4;
#elif CUPAGED_UNIT_BYTES == 1
using unit_t = unsigned char;
#else
#error "CUPAGED_UNIT_BYTES must be 16 or 1"
#endif

extern "C" __global__ void __launch_bounds__(256)
    copy_blocks(unit_t* cache, const cupaged::int64* __restrict__ block_mapping,
                cupaged::int64 block_stride, cupaged::int64 block_units) {
    using cupaged::int64;
    const int64 pair = blockIdx.x;
    const unit_t* const source = cache + block_mapping[2 * pair] * block_stride;
    unit_t* const target = cache + block_mapping[2 * pair + 1] * block_stride;
    const int64 step = static_cast<int64>(gridDim.y) * blockDim.x;
    for (int64 i = static_cast<int64>(blockIdx.y) * blockDim.x + threadIdx.x; i < block_units;
         i += step)
        target[i] = source[i];
}
