// Find the sequences of a decode batch that share blocks, so that decode reads these once.
//
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1], or null: one query token a sequence
//   counts           int32 [lists, max_splits], out: tiles of query rows for each KV split
//   tiles            uint32 [lists, max_splits, capacity], out: the tiles, see pack_tile in
//   work.cuh
//
// A block of the grid processes one KV split (work.cuh) of all sequences. Neighbouring
// sequences form a run if the split has the same block IDs in all of them, begins and ends at the
// same token, and is entirely before their queries; earlier blocks may differ. A run does not cross
// a multiple of kThreads sequences, so that the block sees it at once.
//
// The query rows of a run, or of a single sequence, are divided into tiles of kTileRows rows, in
// the first list. If there is a second list, `wide_rows` > 0, runs that would fill more than
// kMaxTiles of these are in that list instead, in tiles of wide_rows rows. There are never more
// tiles than without runs.
//
// Grid (max_splits), kThreads threads; no dynamic shared memory.
#include "common.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kThreads = CUPAGED_THREADS;
constexpr int kTileRows = CUPAGED_DECODE_TILE_ROWS;
// Tiles of these that read keys and values for themselves; more are wide.
constexpr int kMaxTiles = CUPAGED_MAX_SHARED_TILES;
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

// Whether the KV split is one of several, and all tokens of the sequence see the whole of it.
__device__ __forceinline__ bool can_share(const Sequence& sequence, const SplitPlan& plan,
                                          int split) {
    return plan.count > 1 && split < plan.count &&
           plan.begin_of(split) + plan.size <= sequence.seq_len - max(1, sequence.query_len) + 1;
}

// The first sequence of the run that this thread's is in, and the one after its last, among the
// block's.
__device__ __forceinline__ int run_start(const unsigned* starts) {
    const int lane = threadIdx.x % kWarpSize;
    int word = threadIdx.x / kWarpSize;
    unsigned bits = starts[word] & ((2u << lane) - 1);
    while (bits == 0) bits = starts[--word];  // the block's first sequence starts a run
    return word * kWarpSize + 31 - __clz(bits);
}
__device__ __forceinline__ int run_end(const unsigned* starts) {
    const int lane = threadIdx.x % kWarpSize;
    int word = threadIdx.x / kWarpSize;
    unsigned bits = lane < 31 ? starts[word] >> (lane + 1) << (lane + 1) : 0;
    while (bits == 0 && ++word < kThreads / kWarpSize) bits = starts[word];
    return bits == 0 ? kThreads : word * kWarpSize + __ffs(bits) - 1;
}

struct FindSharedSplitsArguments {
    const int* block_tables;
    const int* seq_lens;
    const int* query_start_loc;
    int* counts;
    unsigned* tiles;
    int64 table_stride;
    int num_tokens;
    int num_seqs;
    int block_shift;
    int split_tokens;
    int max_splits;
    int group;
    int wide_rows;
    int capacity;
};

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads)
    find_shared_splits(const cupaged::FindSharedSplitsArguments args) {
    using namespace cupaged;
    int* __restrict__ const counts = args.counts;
    unsigned* __restrict__ const tiles = args.tiles;
    __shared__ int sums[kThreads];
    __shared__ unsigned starts[kThreads / kWarpSize];  // a bit for each sequence
    const Batch batch{args.seq_lens,     args.query_start_loc, args.num_seqs, args.num_tokens, 0,
                      args.split_tokens, args.max_splits};
    const int split = blockIdx.x;
    const int num_sequences = args.num_seqs + (args.query_start_loc != nullptr ? 1 : 0);
    int listed[2] = {0, 0};
    for (int base = 0; base < num_sequences; base += kThreads) {
        const int mine = base + threadIdx.x;
        Sequence sequence{0, 0, 0};
        bool has_split = false, whole = false, joins = false;
        if (mine < num_sequences) {
            sequence = sequence_of(batch, mine);
            const SplitPlan plan = plan_splits(batch, sequence);
            has_split = split < max(1, plan.count);  // without keys: zeros are to be written
            whole = can_share(sequence, plan, split);
            if (threadIdx.x > 0 && whole) {
                const Sequence before = sequence_of(batch, mine - 1);
                const SplitPlan before_plan = plan_splits(batch, before);
                const int* const table = args.block_tables + mine * args.table_stride +
                                         (plan.begin_of(split) >> args.block_shift);
                joins =
                    before_plan.size == plan.size && can_share(before, before_plan, split) &&
                    same_blocks(table, table - args.table_stride, plan.size >> args.block_shift);
            }
        }
        const unsigned warp_starts = __ballot_sync(kFullMask, !joins);
        if (threadIdx.x % kWarpSize == 0) starts[threadIdx.x / kWarpSize] = warp_starts;
        __syncthreads();
        // The rows of the run that this sequence is in, and of them its own.
        const Sequence first = sequence_of(batch, min(base + run_start(starts), num_sequences - 1));
        const Sequence last = sequence_of(batch, min(base + run_end(starts), num_sequences) - 1);
        const int first_row = first.first_token * args.group;
        const int end_row = (last.first_token + last.query_len) * args.group;
        const int offset = sequence.first_token * args.group - first_row;
        const int end_offset = offset + sequence.query_len * args.group;
        const bool is_wide =
            args.wide_rows > 0 && whole && end_row - first_row > kMaxTiles * kTileRows;
        const int rows = is_wide ? args.wide_rows : kTileRows;
        // Its tiles that begin in this sequence.
        const int tile = (offset + rows - 1) / rows;
        const int count = has_split ? (end_offset + rows - 1) / rows - tile : 0;
#pragma unroll
        for (int wide = 0; wide < 2; ++wide) {
            if (wide == 1 && args.wide_rows == 0) break;
            const int listing = is_wide == (wide == 1) ? count : 0;
            __syncthreads();  // starts and the sums before have been read
            block_scan<kThreads>(listing, sums);
            unsigned* const list =
                tiles + (static_cast<int64>(wide) * args.max_splits + split) * args.capacity +
                listed[wide];
            for (int i = 0; i < listing; ++i) {
                const int row = first_row + (tile + i) * rows;
                list[sums[threadIdx.x] - listing + i] = pack_tile(row, min(rows, end_row - row));
            }
            listed[wide] += sums[kThreads - 1];
        }
    }
    if (threadIdx.x == 0) {
        counts[split] = listed[0];
        if (args.wide_rows > 0) counts[args.max_splits + split] = listed[1];
    }
}
