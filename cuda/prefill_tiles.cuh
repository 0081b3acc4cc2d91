// The division of a batch's query tokens into tiles, and the schedule by which blocks take them.
//
// A work item is a tile of query tokens for a tile of query heads. plan_prefill.cu has sorted the
// sequences, longest first, so that no block starts a long tile at the end. Within a sequence, as
// many KV heads as fit the L2 cache are processed before the others, and among these the last
// tokens, which see the most keys, come first. So blocks that run at the same time read the same
// keys and values, and finish at about the same time. Blocks take work items in this order from a
// counter. Lengths are read on the device only, so a CUDA graph may be replayed with other lengths.
//
// A few short chunks over long prefixes are fewer work items than a GPU runs blocks. If the launch
// allows KV splits (work.cuh), each split of a tile is a work item, and merge_splits
// merges their partials.
#pragma once

#include "common.cuh"
#include "work.cuh"

namespace cupaged {

// The order of the sequences, in a workspace of 2 * S + 6 ints that plan_prefill.cu fills. A
// sequence of one query token is not in it: it is left to decode, so that it has the same bits here
// and there.
struct PrefillSchedule {
    int* split_tokens;   // of a KV split
    int* num_sequences;  // n, with the padding
    int* next_item;      // that no block has taken
    int* sequences;      // [n] of S + 1, longest first; the last one is S, the padding
    int* first_tiles;    // [n + 1] of S + 2: tiles of query tokens, times KV splits, before each
};

__device__ __forceinline__ PrefillSchedule prefill_schedule(int* workspace, int num_seqs) {
    int* const sequences = workspace + 3;
    return {workspace, workspace + 1, workspace + 2, sequences, sequences + num_seqs + 1};
}

// More tokens than a sequence has, with room for another.
constexpr int kWholeSequence = 1 << 30;

// Tokens whose keys and values, of row_bytes each, may take half of the L2 cache of a large GPU.
__host__ __device__ constexpr int l2_tokens(int row_bytes) {
    return (16 << 20) / (2 * row_bytes);
}

// What is divided, and into tiles of what size.
struct PrefillBatch {
    Batch batch;
    int tile_tokens;
    int num_heads;
    int num_kv_heads;
    int tile_heads;
    int l2_tokens;  // of one KV head, for which the L2 cache has room
};

// What a block works on: num_heads query heads, all of one KV head, of num_tokens query tokens, and
// a KV split of the sequence's keys.
struct alignas(16) PrefillTile {
    int sequence;     // S for padding
    int first_token;  // row of query
    int num_tokens;   // 0: there is no such item
    int kv_head;
    int first_head;
    int num_heads;
    int first_position;  // of first_token in the sequence
    int split, num_splits;
    int split_begin, split_end;  // keys

    // The keys of the KV split that some query token sees; none if they end where they begin, or
    // before.
    __device__ __forceinline__ int begin(int window) const {
        return window > 0 ? max(split_begin, first_position - window + 1) : split_begin;
    }
    __device__ __forceinline__ int end(int causal) const {
        return causal != 0 ? min(split_end, first_position + num_tokens) : split_end;
    }
};

// Tiles of the query tokens of a sequence, or of the padding, for each KV split of its keys.
__device__ __forceinline__ int tiles_of(const Sequence& sequence, int tile_tokens) {
    return (sequence.query_len + tile_tokens - 1) / tile_tokens;
}

__device__ __forceinline__ PrefillTile tile_of(const PrefillSchedule& schedule, PrefillBatch batch,
                                               int item) {
    const int group = batch.num_heads / batch.num_kv_heads;
    const int group_tiles = (group + batch.tile_heads - 1) / batch.tile_heads;
    const int head_tiles = batch.num_kv_heads * group_tiles;
    const int n = *schedule.num_sequences;
    int low = 0, high = n;
    while (low < high) {  // the last one whose first item is not after this
        const int middle = (low + high + 1) / 2;
        if (schedule.first_tiles[middle] * head_tiles <= item)
            low = middle;
        else
            high = middle - 1;
    }
    if (low == n) return {};
    const int index = schedule.sequences[low];
    const Sequence sequence = sequence_of(batch.batch, index);
    const int tiles = tiles_of(sequence, batch.tile_tokens);
    batch.batch.split_tokens = *schedule.split_tokens;
    const SplitPlan splits = plan_splits(batch.batch, sequence);
    const int num_splits = max(1, splits.count);

    int rest = item - schedule.first_tiles[low] * head_tiles;
    const int section_heads =
        min(batch.num_kv_heads, max(1, batch.l2_tokens / max(1, sequence.seq_len)));
    const int section_items = section_heads * group_tiles * tiles * num_splits;
    const int first_kv_head = rest / section_items * section_heads;
    rest %= section_items;
    const int heads = min(section_heads, batch.num_kv_heads - first_kv_head) * group_tiles;
    const int split = rest / heads / tiles;
    const int offset = (tiles - 1 - rest / heads % tiles) * batch.tile_tokens;
    const int kv_head = first_kv_head + rest % heads / group_tiles;
    const int head_in_group = rest % group_tiles * batch.tile_heads;
    return {index,
            sequence.first_token + offset,
            min(batch.tile_tokens, sequence.query_len - offset),
            kv_head,
            kv_head * group + head_in_group,
            min(batch.tile_heads, group - head_in_group),
            sequence.seq_len - sequence.query_len + offset,
            split,
            num_splits,
            splits.begin_of(split),
            splits.end_of(split)};
}

// The next item that no block has: for one thread, which tells the others.
__device__ __forceinline__ PrefillTile take_tile(const PrefillSchedule& schedule,
                                                 const PrefillBatch& batch) {
    return tile_of(schedule, batch, atomicAdd(schedule.next_item, 1));
}

}  // namespace cupaged
