// Takes tiles from the schedule of plan_prefill.cu, `share` of them a block, and lists them in the
// order in which they were taken. Grid (any), one thread.
#include "prefill_tiles.cuh"

extern "C" __global__ void list_tiles(const int* seq_lens, const int* query_start_loc,
                                      int* workspace, int* list, int* count, int num_tokens,
                                      int num_seqs, int tile_tokens, int num_heads,
                                      int num_kv_heads, int tile_heads, int l2_tokens, int window,
                                      int max_splits, int share) {
    using namespace cupaged;
    const PrefillSchedule schedule = prefill_schedule(workspace, num_seqs);
    const PrefillBatch batch{
        {seq_lens, query_start_loc, num_seqs, num_tokens, window, 0, max_splits, kMultiToken},
        tile_tokens,
        num_heads,
        num_kv_heads,
        tile_heads,
        l2_tokens};
    for (int i = 0; i < share; ++i) {
        const PrefillTile tile = take_tile(schedule, batch);
        int* const row = list + 11 * atomicAdd(count, 1);
        row[0] = tile.sequence;
        row[1] = tile.first_token;
        row[2] = tile.num_tokens;
        row[3] = tile.kv_head;
        row[4] = tile.first_head;
        row[5] = tile.num_heads;
        row[6] = tile.first_position;
        row[7] = tile.split;
        row[8] = tile.num_splits;
        row[9] = tile.split_begin;
        row[10] = tile.split_end;
    }
}
