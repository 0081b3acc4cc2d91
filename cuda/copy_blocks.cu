// Copy whole blocks, for all layers at once: inside a cache (copy-on-write), or from one cache to
// another (swapping).
//
//   source         [num_blocks, ...]: each block is block_units units, source_stride units apart
//   target         the same, target_stride units apart; may be source
//   block_mapping  int64 [N, 2]: block of source and block of target, in no order
//
// Either may be pinned memory of the CPU, which a GPU reads and writes at the CPU's address.
//
// Grid (N, y): the y blocks of row x copy pair x together, neighbouring threads neighbouring units.
// No shared memory.
//
// Macro CUPAGED_UNIT_BYTES: 16, or 1 where the blocks' size or addresses are no multiple of 16.
//
// Predicted for pinned memory, not measured yet: every thread has 16 bytes in flight, 4 MB on an
// H100, many times the latency-bandwidth product of a link of 50 GB/s and some us. A copy engine
// sets up every copy, which for blocks of some KB takes longer than moving them.
#include "common.cuh"

#if CUPAGED_UNIT_BYTES == 16
using unit_t = uint4;
#elif CUPAGED_UNIT_BYTES == 1
using unit_t = unsigned char;
#else
#error "CUPAGED_UNIT_BYTES must be 16 or 1"
#endif

namespace cupaged {

struct CopyBlocksArguments {
    const unit_t* source;
    unit_t* target;
    const int64* block_mapping;
    int64 source_stride;
    int64 target_stride;
    int64 block_units;
};

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS)
    copy_blocks(const __grid_constant__ cupaged::CopyBlocksArguments args) {
    using namespace cupaged;
    const int64* __restrict__ const block_mapping = args.block_mapping;
    const int64 pair = blockIdx.x;
    const unit_t* const from = args.source + block_mapping[2 * pair] * args.source_stride;
    unit_t* const to = args.target + block_mapping[2 * pair + 1] * args.target_stride;
    const int64 step = static_cast<int64>(gridDim.y) * blockDim.x;
    for (int64 i = static_cast<int64>(blockIdx.y) * blockDim.x + threadIdx.x; i < args.block_units;
         i += step)
        to[i] = from[i];
}
