// How the query tokens of a batch are divided into tiles, and how a block finds its own.
//
// An item is one tile of query tokens for one tile of query heads. plan_prefill.cu orders the
// sequences before: longest first, so that no block is left with a long tile at the end. In a
// sequence as many KV heads as the L2 cache has room for come before the others. Of these, the last
// tokens, which see the most keys, come first. So the blocks of a moment read the same keys and
// values, and end at about the same time. They take items in this order from a counter until there
// are none left. Lengths are read on the device only, so a CUDA graph may replay with others.
#pragma once

#include "common.cuh"

namespace cupaged {

// The order of the sequences, in a workspace of 2 * S + 5 ints that plan_prefill.cu fills. A
// sequence of one query token is not in it: it is left to decode, so that it has the same bits here
// and there.
struct PrefillSchedule {
    int* num_sequences;  // n, with the padding
    int* next_item;      // that no block has taken
    int* sequences;      // [n] of S + 1, longest first; the last one is S, the padding
    int* first_tiles;    // [n + 1] of S + 2: tiles of query tokens before each, and of all
};

__device__ __forceinline__ PrefillSchedule prefill_schedule(int* workspace, int num_seqs) {
    int* const sequences = workspace + 2;
    return {workspace, workspace + 1, sequences, sequences + num_seqs + 1};
}

// Tokens whose keys and values, of row_bytes each, may take half of the L2 cache of a large GPU.
__host__ __device__ constexpr int l2_tokens(int row_bytes) {
    return (16 << 20) / (2 * row_bytes);
}

// What is divided, and into tiles of what size.
struct PrefillBatch {
    const int* seq_lens;
    const int* query_start_loc;
    int num_seqs;
    int num_tokens;
    int tile_tokens;
    int num_heads;
    int num_kv_heads;
    int tile_heads;
    int l2_tokens;  // of one KV head, for which the L2 cache has room

    // The first query token of a sequence or the padding; that of num_seqs + 1 ends the padding.
    __device__ __forceinline__ int start_of(int sequence) const {
        return sequence <= num_seqs ? query_start_loc[sequence] : num_tokens;
    }
};

// What a block works on: num_heads query heads, all of one KV head, of num_tokens query tokens.
struct alignas(16) PrefillTile {
    int sequence;     // S for padding
    int first_token;  // row of query
    int num_tokens;   // 0: there is no such item
    int kv_head;
    int first_head;
    int num_heads;
    int first_position;  // of first_token in the sequence
    int seq_len;
};

__device__ __forceinline__ PrefillTile tile_of(const PrefillSchedule& schedule,
                                               const PrefillBatch& batch, int item) {
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
    const int first_tile = schedule.first_tiles[low];
    const int tiles = schedule.first_tiles[low + 1] - first_tile;
    const int sequence = schedule.sequences[low];
    const int start = batch.start_of(sequence);
    const int query_len = batch.start_of(sequence + 1) - start;
    const int seq_len = sequence < batch.num_seqs ? batch.seq_lens[sequence] : 0;

    int rest = item - first_tile * head_tiles;
    const int section_heads = min(batch.num_kv_heads, max(1, batch.l2_tokens / max(1, seq_len)));
    const int section_items = section_heads * group_tiles * tiles;
    const int first_kv_head = rest / section_items * section_heads;
    rest %= section_items;
    const int heads = min(section_heads, batch.num_kv_heads - first_kv_head) * group_tiles;
    const int offset = (tiles - 1 - rest / heads) * batch.tile_tokens;
    const int kv_head = first_kv_head + rest % heads / group_tiles;
    const int head_in_group = rest % group_tiles * batch.tile_heads;
    return {sequence,
            start + offset,
            min(batch.tile_tokens, query_len - offset),
            kv_head,
            kv_head * group + head_in_group,
            min(batch.tile_heads, group - head_in_group),
            seq_len - query_len + offset,
            seq_len};
}

// The next item that no block has: for one thread, which tells the others.
__device__ __forceinline__ PrefillTile take_tile(const PrefillSchedule& schedule,
                                                 const PrefillBatch& batch) {
    return tile_of(schedule, batch, atomicAdd(schedule.next_item, 1));
}

}  // namespace cupaged
