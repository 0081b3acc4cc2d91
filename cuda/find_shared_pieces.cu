// Which sequences of a decode batch have the same blocks, so that decode reads those once.
//
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1], or null: one query token a sequence
//   counts           int32 [max_splits], out: tiles of query rows for each piece of keys
//   tiles            int32 [max_splits, capacity], out: the tiles, see pack_tile in work.cuh
//
// A block of the grid looks at one piece (work.cuh) of all sequences. Neighbours join a run if the
// piece has the same block ids for them, begins and ends at the same token, and lies wholly before
// their queries; what the blocks before it are does not matter. The tokens of a run, one after the
// other, are cut into tiles of tile_tokens. A run ends at a multiple of 32 sequences at the latest,
// so that it lies in one warp. There are never more tiles than without runs.
//
// Grid (max_splits), kThreads threads; no dynamic shared memory.
#include "common.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kThreads = 128;
constexpr int kUnroll = 8;  // comparisons before one of them may end the search

// Whether two parts of block tables are equal.
__device__ __forceinline__ bool same_blocks(const int* a, const int* b, int count) {
    for (int i = 0; i < count; i += kUnroll) {
        int different = 0;
#pragma unroll
        for (int j = 0; j < kUnroll; ++j)
            if (i + j < count) different |= a[i + j] ^ b[i + j];
        if (different != 0) return false;
    }
    return true;
}

// Whether the piece is one of several, and all tokens of the sequence see the whole of it.
__device__ __forceinline__ bool can_share(const Sequence& sequence, const SplitPlan& plan,
                                          int piece) {
    return plan.count > 1 && piece < plan.count &&
           plan.begin_of(piece) + plan.size <= sequence.seq_len - max(1, sequence.query_len) + 1;
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads)
    find_shared_pieces(const int* __restrict__ block_tables, const int* __restrict__ seq_lens,
                       const int* __restrict__ query_start_loc, int* __restrict__ counts,
                       int* __restrict__ tiles, cupaged::int64 table_stride, int num_tokens,
                       int num_seqs, int block_shift, int split_tokens, int max_splits,
                       int tile_tokens, int capacity) {
    using namespace cupaged;
    __shared__ int sums[kThreads];
    const Batch batch{seq_lens, query_start_loc, num_seqs, num_tokens, 0, split_tokens, max_splits};
    const int lane = threadIdx.x % kWarpSize;
    const int piece = blockIdx.x;
    int* const list = tiles + static_cast<int64>(piece) * capacity;
    const int num_sequences = num_seqs + (query_start_loc != nullptr ? 1 : 0);
    int listed = 0;
    for (int base = 0; base < num_sequences; base += kThreads) {
        const int mine = base + threadIdx.x;
        Sequence sequence{0, 0, 0};
        bool has_piece = false, joins = false;
        if (mine < num_sequences) {
            sequence = sequence_of(batch, mine);
            const SplitPlan plan = plan_splits(batch, sequence);
            has_piece = piece < max(1, plan.count);  // without keys: zeros are to be written
            if (lane > 0 && can_share(sequence, plan, piece)) {
                const Sequence before = sequence_of(batch, mine - 1);
                const SplitPlan before_plan = plan_splits(batch, before);
                const int* const table =
                    block_tables + mine * table_stride + (plan.begin_of(piece) >> block_shift);
                joins = before_plan.size == plan.size && can_share(before, before_plan, piece) &&
                        same_blocks(table, table - table_stride, plan.size >> block_shift);
            }
        }
        // The run that this sequence is in, from lane to lane.
        const unsigned starts = ~__ballot_sync(kFullMask, joins);
        const int first_lane = 31 - __clz(starts & ((2u << lane) - 1));
        const unsigned later = lane < 31 ? starts >> (lane + 1) : 0;
        const int last_lane = later != 0 ? lane + __ffs(later) - 1 : 31;
        const int first = __shfl_sync(kFullMask, sequence.first_token, first_lane);
        const int end =
            __shfl_sync(kFullMask, sequence.first_token + sequence.query_len, last_lane);
        // Its tiles that begin in this sequence.
        const int offset = sequence.first_token - first;
        const int tile = (offset + tile_tokens - 1) / tile_tokens;
        const int end_tile = (offset + sequence.query_len + tile_tokens - 1) / tile_tokens;
        const int count = has_piece ? end_tile - tile : 0;
        __syncthreads();  // the sums before have been read
        block_scan<kThreads>(count, sums);
        int* const target = list + listed + sums[threadIdx.x] - count;
        for (int i = 0; i < count; ++i) {
            const int token = first + (tile + i) * tile_tokens;
            target[i] = pack_tile(token, min(tile_tokens, end - token));
        }
        listed += sums[kThreads - 1];
    }
    if (threadIdx.x == 0) counts[piece] = listed;
}
