// How the query tokens of a batch are divided into tiles, without the host knowing the lengths.
#pragma once

#include "common.cuh"

namespace cupaged {

// What a block works on.
struct PrefillTile {
    int sequence;     // S for padding
    int first_token;  // row of query
    int num_tokens;
    int first_position;  // of first_token in the sequence
    int seq_len;
};

// Sequence s gets the tiles from start(s) = query_start_loc[s] / tile_tokens + s on. These ranges
// do not overlap and leave room for the sequence's last, partial tile, so a binary search finds the
// tile's sequence, and the grid needs T / tile_tokens + S + 1 tiles whatever the lengths are. S
// stands for the padding. A sequence of one query token has no tile: it is left to decode, so that
// it has the same bits here and there.
__device__ __forceinline__ PrefillTile find_tile(int index, int tile_tokens,
                                                 const int* query_start_loc, const int* seq_lens,
                                                 int num_seqs, int num_tokens) {
    int low = 0, high = num_seqs;
    while (low < high) {  // the last sequence with start <= index
        const int middle = (low + high + 1) / 2;
        if (query_start_loc[middle] / tile_tokens + middle <= index)
            low = middle;
        else
            high = middle - 1;
    }
    const int start = query_start_loc[low];
    const int end = low < num_seqs ? query_start_loc[low + 1] : num_tokens;
    const int offset = (index - (start / tile_tokens + low)) * tile_tokens;
    const int seq_len = low < num_seqs ? seq_lens[low] : 0;
    if (low < num_seqs && end - start == 1) return {};
    return {low, start + offset, min(tile_tokens, end - start - offset),
            seq_len - (end - start) + offset, seq_len};
}

}  // namespace cupaged
