// Sort the sequences of a batch for prefill, longest first; see prefill_tiles.cuh.
//
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1]
//   workspace        int32 [2 * S + 6], out: a PrefillSchedule, all of what is read of it
//
// With max_splits above 1 the size of KV splits is chosen such that `blocks` blocks have about the
// same number of keys to read.
//
// Sequences of several query tokens are selected and sorted stably by their length. The index of
// each is the number of those before it: n^2 comparisons for n sequences, with lengths in shared
// memory. The padding after the last sequence comes last.
//
// Grid (1), kThreads threads; no dynamic shared memory.
#include "common.cuh"
#include "prefill_tiles.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kThreads = CUPAGED_THREADS;

struct PlanPrefillArguments {
    const int* seq_lens;
    const int* query_start_loc;
    int* workspace;
    int num_tokens;
    int num_seqs;
    int tile_tokens;
    int group;
    int num_kv_heads;
    int tile_heads;
    int window;
    int max_splits;
    int blocks;
};

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads)
    plan_prefill(const cupaged::PlanPrefillArguments args) {
    using namespace cupaged;
    int* __restrict__ const workspace = args.workspace;
    __shared__ int sums[kThreads];
    __shared__ int lengths[kThreads];
    Batch batch{args.seq_lens, args.query_start_loc, args.num_seqs,   args.num_tokens,
                args.window,   kWholeSequence,       args.max_splits, kMultiToken};
    const PrefillSchedule schedule = prefill_schedule(workspace, args.num_seqs);
    const int thread = threadIdx.x;

    // Pick them, into what will be first_tiles.
    int* const picked = schedule.first_tiles;
    int num_picked = 0;
    for (int base = 0; base < args.num_seqs; base += kThreads) {
        const int mine = base + thread;
        const bool pick = mine < args.num_seqs && sequence_of(batch, mine).query_len > 1;
        block_scan<kThreads>(pick, sums);
        if (pick) picked[num_picked + sums[thread] - 1] = mine;
        num_picked += sums[kThreads - 1];
        __syncthreads();  // the sums have been read
    }

    for (int base = 0; base < num_picked; base += kThreads) {
        const int mine = base + thread;
        const int sequence = mine < num_picked ? picked[mine] : 0;
        const int length = args.seq_lens[sequence];
        int place = 0;
        for (int other = 0; other < num_picked; other += kThreads) {
            __syncthreads();  // the lengths before have been read
            const int count = min(kThreads, num_picked - other);
            if (thread < count) lengths[thread] = args.seq_lens[picked[other + thread]];
            __syncthreads();
            for (int i = 0; i < count; ++i)
                place += lengths[i] > length || (lengths[i] == length && other + i < mine);
        }
        if (mine < num_picked) schedule.sequences[place] = sequence;
    }
    if (args.max_splits > 1) {
        const RowTiles rows{args.group, args.num_kv_heads, args.tile_heads, args.tile_tokens};
        batch.split_tokens = balanced_split_tokens<kThreads>(
            batch, rows, args.blocks, CUPAGED_SMALLEST_PREFILL_SPLIT_TOKENS, sums);
    }
    if (thread == 0) {
        *schedule.split_tokens = batch.split_tokens;
        schedule.sequences[num_picked] = args.num_seqs;
        *schedule.num_sequences = num_picked + 1;
        *schedule.next_item = 0;
    }

    int tiles_before = 0;
    for (int base = 0; base <= num_picked; base += kThreads) {
        __syncthreads();  // the sequences are there, and the sums have been read
        const int mine = base + thread;
        int tiles = 0;
        if (mine <= num_picked) {
            const Sequence sequence = sequence_of(batch, schedule.sequences[mine]);
            tiles =
                tiles_of(sequence, args.tile_tokens) * max(1, plan_splits(batch, sequence).count);
        }
        block_scan<kThreads>(tiles, sums);
        if (mine <= num_picked) schedule.first_tiles[mine + 1] = tiles_before + sums[thread];
        tiles_before += sums[kThreads - 1];
    }
    if (thread == 0) schedule.first_tiles[0] = 0;
}
