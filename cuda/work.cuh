// The division of decode into work items, and the schedule by which blocks take them.
//
// A work item is a KV split of a sequence, for one KV head and a tile of its query rows: pairs of a
// query token and a query head. The number of KV splits of a sequence depends on its length only,
// so its result has the same bits in every batch. The list of work items is not stored: each block
// counts the items of kThreads sequences at a time, and takes every gridDim.x-th. Only if sequences
// may share KV splits, find_shared_splits.cu stores the list of tiles. Lengths are read on the
// device only, so a CUDA graph may be replayed with other lengths.
#pragma once

#include "common.cuh"

namespace cupaged {

// The tokens [first, end) of a sequence in `count` KV splits of `size` tokens, the last one
// shorter.
struct SplitPlan {
    int first, end, size, count;

    __device__ __forceinline__ int begin_of(int split) const { return first + split * size; }
    __device__ __forceinline__ int end_of(int split) const {
        return min(end, begin_of(split) + size);
    }
};

// Which sequences are for a launch: where some have several query tokens, those of one are decoded
// and the others, which have chunks of a prompt, are left to prefill.
enum Subset {
    kAllSequences = CUPAGED_ALL_SEQUENCES,
    kSingles = CUPAGED_SINGLES,
    kMultiToken = CUPAGED_MULTI_TOKEN
};

// What one launch divides.
struct Batch {
    const int* seq_lens;
    const int* query_start_loc;  // null: one query token a sequence
    int num_seqs;
    int num_tokens;
    int window;        // 0 for none
    int split_tokens;  // of a KV split; 0: as many as spread the batch evenly over the grid
    int max_splits;    // beyond this many KV splits they grow
    Subset subset;
};

// Whether a sequence is for this launch.
__device__ __forceinline__ bool is_ours(const Batch& batch, int query_len) {
    return batch.subset == kAllSequences || (batch.subset == kSingles) == (query_len == 1);
}

struct Sequence {
    int first_token;  // its first query row
    int query_len;
    int seq_len;
};

// Sequence num_seqs stands for the padding: rows that come out as zeros.
__device__ __forceinline__ Sequence sequence_of(const Batch& batch, int index) {
    if (batch.query_start_loc == nullptr) return {index, 1, batch.seq_lens[index]};
    const int first = batch.query_start_loc[index];
    if (index == batch.num_seqs) return {first, batch.num_tokens - first, 0};
    return {first, batch.query_start_loc[index + 1] - first, batch.seq_lens[index]};
}

// The sequence that a query row belongs to: the last one that starts at or before it.
__device__ __forceinline__ int sequence_of_token(const Batch& batch, int token) {
    if (batch.query_start_loc == nullptr) return token;
    int low = 0, high = batch.num_seqs;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (batch.query_start_loc[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

__device__ __forceinline__ int position_of_token(const Batch& batch, int token) {
    const Sequence sequence = sequence_of(batch, sequence_of_token(batch, token));
    return sequence.seq_len - sequence.query_len + token - sequence.first_token;
}

__device__ __forceinline__ SplitPlan plan_splits(const Batch& batch, const Sequence& sequence) {
    const int first_position = sequence.seq_len - sequence.query_len;
    const int first = batch.window > 0 ? max(0, first_position - batch.window + 1) : 0;
    const int tokens = sequence.seq_len - first;
    const int units = (tokens + batch.split_tokens - 1) / batch.split_tokens;
    const int size = (units + batch.max_splits - 1) / batch.max_splits * batch.split_tokens;
    const int count = tokens > 0 ? (tokens + size - 1) / size : 0;
    return {first, sequence.seq_len, size, count};
}

// A tile of query rows against one KV split. Row r of a KV head is its head r % group at
// token r / group. The rows of the tile are those of `sequence`, or go on into the sequences after
// it, which then have the same keys in this KV split and see them all.
struct WorkItem {
    int sequence;
    int first_row;
    int num_rows;
    int split;
    int kv_head;
};

// How the rows of a sequence are cut into tiles.
struct RowTiles {
    int group;  // query heads of a KV head
    int num_kv_heads;
    int heads;   // of a tile, neighbours
    int tokens;  // of a tile

    // Tiles of all heads for one tile of tokens.
    __device__ __forceinline__ int head_tiles() const {
        return num_kv_heads * ((group + heads - 1) / heads);
    }
    __device__ __forceinline__ int token_tiles(int query_len) const {
        return (query_len + tokens - 1) / tokens;
    }
};

// The work of a batch whose sequences may share KV splits, as find_shared_splits.cu leaves it.
struct SharedSplits {
    const int* counts;  // [max_splits], tiles of each KV split; null: sequences read for themselves
    const unsigned* tiles;  // [max_splits, capacity], packed by pack_tile, each for every KV head
    int capacity;
};

// Rows of all tokens of a launch: below 2^32 / kMaxTileRows.
constexpr int kMaxTileRows = CUPAGED_MAX_TILE_ROWS;

__device__ __forceinline__ unsigned pack_tile(int first_row, int num_rows) {
    return static_cast<unsigned>(first_row) * kMaxTileRows + num_rows - 1;
}

__device__ __forceinline__ WorkItem unpack_tile(const Batch& batch, int group, unsigned tile,
                                                int split, int kv_head) {
    const int row = static_cast<int>(tile / kMaxTileRows);
    return {sequence_of_token(batch, row / group), row, static_cast<int>(tile % kMaxTileRows) + 1,
            split, kv_head};
}

// The sum of `value` over the threads up to this one. `sums` has kThreads elements; every thread
// may read them until the next barrier, and they must not be in use before.
template <int kThreads>
__device__ __forceinline__ void block_scan(int value, int* sums) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(kFullMask, value, offset);
        if (lane >= offset) value += other;
    }
    sums[threadIdx.x] = value;
    __syncthreads();
    int before = 0;
    for (int warp = 0; warp < static_cast<int>(threadIdx.x) / kWarpSize; ++warp)
        before += sums[warp * kWarpSize + kWarpSize - 1];
    __syncthreads();
    sums[threadIdx.x] = value + before;
    __syncthreads();
}

// Call body(item) for this block's items. All threads of the block call it together.
template <int kThreads, typename Body>
__device__ __forceinline__ void for_each_item(const Batch& batch, const SharedSplits& shared,
                                              const RowTiles& rows, int* sums, Body body) {
    // The list goes sequence by sequence, or KV split by KV split where they are shared.
    const bool by_split = shared.counts != nullptr;
    const int num_sequences = batch.num_seqs + (batch.query_start_loc != nullptr ? 1 : 0);
    const int num_units = by_split ? batch.max_splits : num_sequences;
    const int head_tiles = by_split ? rows.num_kv_heads : rows.head_tiles();
    int index = blockIdx.x;  // counted from the first item of the units at hand
    for (int base = 0; base < num_units; base += kThreads) {
        const int mine = base + threadIdx.x;
        int count = 0;
        if (mine < num_units) {
            if (by_split) {
                count = shared.counts[mine];
            } else {
                const Sequence sequence = sequence_of(batch, mine);
                const int tiles = rows.token_tiles(sequence.query_len);
                // Rows that see nothing still need their zeros written.
                if (is_ours(batch, sequence.query_len))
                    count = tiles * max(1, plan_splits(batch, sequence).count);
            }
        }
        __syncthreads();
        block_scan<kThreads>(count * head_tiles, sums);
        const int total = sums[kThreads - 1];
        for (; index < total; index += gridDim.x) {
            int low = 0, high = kThreads - 1;  // the first with sums > index
            while (low < high) {
                const int middle = (low + high) / 2;
                if (sums[middle] > index)
                    high = middle;
                else
                    low = middle + 1;
            }
            const int unit = base + low;
            const int rest = index - (low > 0 ? sums[low - 1] : 0);
            // Row tiles, then heads, then KV splits: blocks that run together share keys and
            // values.
            WorkItem item;
            if (by_split) {
                const int tiles = shared.counts[unit];
                const unsigned* const list =
                    shared.tiles + static_cast<int64>(unit) * shared.capacity;
                item = unpack_tile(batch, rows.group, list[rest % tiles], unit, rest / tiles);
            } else {
                const Sequence sequence = sequence_of(batch, unit);
                const int tiles = rows.token_tiles(sequence.query_len);
                const int first = rest % tiles * rows.tokens;
                const int tokens = min(rows.tokens, sequence.query_len - first);
                const int head_tile = rest / tiles % head_tiles;
                const int tiles_of_kv_head = head_tiles / rows.num_kv_heads;
                const int head = head_tile % tiles_of_kv_head * rows.heads;
                item = {unit, (sequence.first_token + first) * rows.group + head,
                        tokens * min(rows.heads, rows.group - head), rest / tiles / head_tiles,
                        head_tile / tiles_of_kv_head};
            }
            body(item);
        }
        index -= total;
    }
}

// The size of KV splits, of `smallest` tokens at least, that gives each of so many blocks about the
// same number of keys to read. For all threads of a block together.
template <int kThreads>
__device__ __forceinline__ int balanced_split_tokens(const Batch& batch, const RowTiles& rows,
                                                     int blocks, int smallest, int* sums) {
    constexpr int kGranularity = 64;
    // In units of kGranularity tokens, so that the sum stays within 32 bits.
    int units = 0;
    for (int i = threadIdx.x; i < batch.num_seqs; i += kThreads) {
        const Sequence sequence = sequence_of(batch, i);
        if (!is_ours(batch, sequence.query_len)) continue;
        const int seen = batch.window > 0
                             ? min(sequence.seq_len, batch.window + sequence.query_len - 1)
                             : sequence.seq_len;
        units += (seen + kGranularity - 1) / kGranularity * rows.token_tiles(sequence.query_len);
    }
    block_scan<kThreads>(units, sums);
    const int64 total = static_cast<int64>(sums[kThreads - 1]) * rows.head_tiles();
    const int share = static_cast<int>((total + blocks - 1) / blocks);
    return max(smallest, share * kGranularity);
}

// Where the launch leaves it open (split_tokens 0), choose the size of KV splits. The same in every
// block; left in split_size for merge_splits.
template <int kThreads>
__device__ __forceinline__ void balance_splits(Batch& batch, const RowTiles& rows, int* split_size,
                                               int* sums) {
    if (batch.split_tokens != 0) return;
    batch.split_tokens = balanced_split_tokens<kThreads>(batch, rows, gridDim.x,
                                                         CUPAGED_SMALLEST_SPLIT_TOKENS, sums);
    if (blockIdx.x == 0 && threadIdx.x == 0) *split_size = batch.split_tokens;
}

}  // namespace cupaged
