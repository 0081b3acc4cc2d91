// Attention of a few query tokens a sequence over its paged cache, on tensor cores.
//
//   query            [T, H, D], contiguous in D         out  the same
//   kv_cache         [num_blocks, 2, Hkv, B, D]         lse  float32 [T, H] or null
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1], or null: T = S, one query token a sequence. With kSingles the
//                    sequences of one query token are computed, and no other row is written.
//   k_scale, v_scale float32 [Hkv], null where the cache is not quantised
//   partials         workspace of the KV splits, see merge_splits.cu
//   split_size       int32 [1] or null: where the size of KV splits is left for merge_splits
//   tile_counts      int32 [max_splits], tile_lists uint32 [max_splits, list_capacity], from
//                    find_shared_splits.cu; null: every sequence reads for itself
//
// A work item (work.cuh) is one KV head, one KV split of a sequence, and a tile of query rows: the
// query heads of the KV head, for one token or as many as fit, are the rows M of mma.m16n8k16, so
// that keys and values are read once for them all. Sequences that have the same keys in the KV
// split put their rows into one tile. A row's result does not depend on the other rows, so it has
// the same bits. Fewer rows leave the tensor cores half idle, which does not matter: they wait for
// memory.
//
// The kernel is compiled for tiles of two heights. One of 16 rows for everything, and one of
// several row groups for the tiles that many sequences share, where memory no longer is what takes
// the time; it has lists of tiles, which see the whole of their KV split.
//
// A row group is kPhases warps. Each of them has every kPhases-th tile of kTileKeys keys to itself,
// with its own softmax state; they are merged at the end, through shared memory. The warps of a
// phase, one of each row group, have a ring of kStages tiles of keys and values that they alone
// fill (cp.async) and read (ldmatrix): with one row group the loop over keys has no block barrier.
// A row goes through the same operations in the same order whatever the height of its tile. The
// products are those of mma_attention.cuh.
//
// Why 64 rows, and not the 128 of prefill: rows for which a warp has no registers have to wait for
// another pass over the keys. What limits such tiles next to the tensor cores is how fast they load
// from shared memory, and that depends on the rows of a warp, 32 here as in prefill; tiles of the
// same KV split run at the same time, and find it in the L2 cache.
//
// Dynamic shared memory: kTileRows rows of the query, and kPhases * kStages * 2 tiles of kTileKeys
// rows of 16 * kRowChunks bytes: at D = 128 in 16 bits (4 phases, 3 stages) 106 KiB, 119 KiB with
// 64 rows. Static: 3 to 4 KiB.
//
// Predicted for an H100 at D = 128 in 16 bits, not measured yet: keys and values of 16 tokens, 8
// KB, take a multiprocessor 540 clocks from memory, its tensor cores 64 and ldmatrix as many. Two
// blocks have up to 128 KB under way, where 20 KB cover the latency. A token takes some 45
// instructions of a warp in 16 bits and in 8, and has 135 issue slots, or half of that. So memory
// is the bound, whatever the group.
//
// Macros CUPAGED_DTYPE (fp16 or bf16), CUPAGED_CACHE_DTYPE (quant.cuh), CUPAGED_HEAD_SIZE (D, a
// multiple of 8, or of 16 with a quantised cache, at most 256), CUPAGED_STAGES,
// CUPAGED_ROW_GROUPS (1 if not given).
#include "common.cuh"
#include "attention_arguments.cuh"
#include "split_output.cuh"
#include "mma_attention.cuh"
#include "paged.cuh"
#include "work.cuh"

namespace cupaged {

#ifdef CUPAGED_ROW_GROUPS
constexpr int kRowGroups = CUPAGED_ROW_GROUPS;
#else
constexpr int kRowGroups = 1;
#endif
constexpr int kPhases = kHeadSize <= 128 ? 4 : 2;
constexpr int kWarps = kPhases * kRowGroups;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPhaseThreads = kRowGroups * kWarpSize;
// Tiles of 16 rows of a warp: each key and value that it loads serves them all.
constexpr int kRowTiles = kRowGroups > 1 && kHeadSize <= 128 ? 2 : 1;
constexpr int kGroupRows = 16 * kRowTiles;
constexpr int kTileRows = kRowGroups * kGroupRows;
constexpr int kTileKeys = 16;  // of a phase
constexpr int kKeyStride = kPhases * kTileKeys;
constexpr int kStages = CUPAGED_STAGES;
constexpr int kTile = kTileKeys * kRowChunks;  // chunks of a tile of keys or values
// Block IDs in shared memory; longer KV splits are done in several runs.
constexpr int kMaxIds = 512;
// Where they leave no registers for the sums, the query is read again for every tile.
constexpr bool kQueryInRegisters = kRowTiles * kHeadSize <= 128;

// Blocks of a multiprocessor that registers allow for. Without it ptxas aims at a round number of
// registers and spills a few.
constexpr int kMinBlocks = kRowGroups > 1                        ? 1
                           : kHeadSize <= (kQuantised ? 64 : 32) ? 4
                           : kHeadSize <= 64                     ? 3
                                                                 : 2;

static_assert(kTileRows <= kMaxTileRows, "pack_tile");
static_assert(kRowGroups > 1 || kTileRows == CUPAGED_DECODE_TILE_ROWS, "find_shared_splits");
static_assert(kThreads == CUPAGED_THREADS, "as launched");

// Floats of a row of phase_out: such that rows that a warp stores together are in banks of their
// own, 8 floats of each of 4 rows, or 16 of each of 2.
constexpr int kOutSpread = kQuantised ? 16 : 8;
constexpr int kOutStride = kHeadSize + (kHeadSize / kOutSpread % 2 == 0 ? kOutSpread : 0);

struct Shared {
    uint4 query[kTileRows * kQueryRowChunks];
    union {
        uint4 tiles[kPhases][kStages][2][kTile];           // 2: keys, values
        float phase_out[kPhases][kGroupRows][kOutStride];  // of one row group at a time
    };
};
static_assert(sizeof(Shared) == CUPAGED_DYNAMIC_BYTES, "as launched");
static_assert(4 * (kMaxIds + kThreads) + kPhases * kGroupRows * sizeof(SoftmaxState) <=
                  CUPAGED_DECODE_MMA_STATIC_BYTES,
              "what is static");

// The rows of a tile, see WorkItem.
struct Rows {
    int first;
    int count;
    int group;       // query heads of the KV head
    int first_head;  // of them
    int first_position, last_position;
    bool of_several;  // sequences

    __device__ __forceinline__ int token(int row) const { return (first + row) / group; }
    __device__ __forceinline__ int head(int row) const {
        return first_head + (first + row) % group;
    }
};

// The keys of a run, whose block ids are in shared memory.
struct Run {
    PagedCache<const cache_t> cache;
    const int* ids;
    int first_index;
    int kv_head;
    int begin;
    int end;
};

// The warps of a phase wait for each other. With several row groups all phases have as many tiles,
// and those of all phases wait.
__device__ __forceinline__ void phase_barrier() {
    if (kRowGroups > 1)
        __syncthreads();
    else
        __syncwarp();
}

// Begin copying a lane's chunk `i` of a phase's tile of keys and values from token `begin` on;
// zeros from the run's end on.
__device__ __forceinline__ void copy_chunk(const Run& run, int i, int begin, uint4 (*tile)[kTile]) {
    const int row = i / kTileChunks;
    const int chunk = i % kTileChunks;
    const int token = begin + row;
    const bool valid = token < run.end && chunk < kChunks;
    const cache_t* source = run.cache.data;
    int64 to_value = 0;
    if (valid) {
        source = run.cache.key(run.ids[run.cache.table_index(token) - run.first_index], run.kv_head,
                               run.cache.offset_in_block(token)) +
                 chunk * kVec;
        to_value = run.cache.value_offset();
    }
    uint4* const target = tile[0] + row * kRowChunks + chunk;
    cp_async_16_zfill(target, source, valid);
    cp_async_16_zfill(target + kTile, source + to_value, valid);
}

// Beside the sums of more than 160 elements the rows and chunks of all copies of a lane, which
// ptxas keeps in registers from tile to tile unless chunks are a power of two, are too many: it
// spills. So these sizes copy a part at a time, of 11 to 15 copies, or 3 or 4 with row groups. Of
// the sums of two tiles of rows, 104 and 112 elements are as many.
constexpr bool kFewCopies = next_power_of_two(kTileChunks) != kTileChunks &&
                            (kTileChunks > 20 || (kRowTiles > 1 && kTileChunks > 12));
constexpr int kCopiesAtOnce = kRowGroups > 1 ? 1 : 4;

// Begin copying a phase's tile. `thread` of kPhaseThreads.
__device__ __forceinline__ void copy_tile(const Run& run, int thread, int begin,
                                          uint4 (*tile)[kTile]) {
    if constexpr (kFewCopies) {
#pragma unroll kCopiesAtOnce
        for (int i = thread; i < kTileKeys * kTileChunks; i += kPhaseThreads)
            copy_chunk(run, i, begin, tile);
    } else {
#pragma unroll
        for (int i = thread; i < kTileKeys * kTileChunks; i += kPhaseThreads)
            copy_chunk(run, i, begin, tile);
    }
}

// Put the tile's query rows into shared memory.
__device__ __forceinline__ void load_query(const scalar_t* query, const Rows& rows,
                                           int64 token_stride, int64 head_stride, bool aligned,
                                           uint4* target) {
    for (int i = threadIdx.x; i < kTileRows * kQueryTileChunks; i += kThreads) {
        const int row = i / kQueryTileChunks;
        const int chunk = i % kQueryTileChunks;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row < rows.count && chunk < kQueryChunks)
            raw = load_vec(query + rows.token(row) * token_stride + rows.head(row) * head_stride +
                               chunk * kQueryVec,
                           aligned);
        store_query(target + row * kQueryRowChunks, chunk, raw);
    }
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads, cupaged::kMinBlocks)
    paged_decode_mma(const cupaged::DecodeArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    float* __restrict__ const partials = args.partials;
    int* __restrict__ const split_size = args.split_size;
    CUPAGED_DYNAMIC_SMEM(dynamic, 16);
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    __shared__ int ids[kMaxIds];
    __shared__ int sums[kThreads];
    __shared__ SoftmaxState phase_state[kPhases][kGroupRows];

    const int lane = threadIdx.x % kWarpSize;
    const int phase = static_cast<int>(threadIdx.x) / kWarpSize % kPhases;
    const int row_group = kRowGroups > 1 ? static_cast<int>(threadIdx.x) / kWarpSize / kPhases : 0;
    const int first_row = row_group * kGroupRows;  // of this warp
    const int phase_thread = row_group * kWarpSize + lane;
    const int group = args.num_heads / args.num_kv_heads;
    const int tile_heads = min(group, kTileRows);
    const RowTiles tiles{group, args.num_kv_heads, tile_heads, kTileRows / tile_heads};
    const SplitOutput output{out,
                             lse,
                             partials,
                             args.sinks,
                             args.out_token_stride,
                             args.out_head_stride,
                             args.num_heads,
                             kHeadSize,
                             args.max_splits,
                             args.out_aligned != 0};
    Batch batch{
        args.seq_lens, args.query_start_loc, args.num_seqs,   args.num_tokens,
        args.window,   args.split_tokens,    args.max_splits, static_cast<Subset>(args.subset)};
    balance_splits<kThreads>(batch, tiles, split_size, sums);

    const SharedSplits shared_splits{args.tile_counts, args.tile_lists, args.list_capacity};
    for_each_item<kThreads>(batch, shared_splits, tiles, sums, [&](const WorkItem& item) {
        const Sequence sequence = sequence_of(batch, item.sequence);
        const SplitPlan plan = plan_splits(batch, sequence);
        Run run{{args.kv_cache, args.block_stride, args.num_kv_heads, args.block_shift, kHeadSize},
                ids};
        run.kv_head = item.kv_head;
        Rows rows{item.first_row, item.num_rows, group, item.kv_head * group};
        const int first_token = rows.token(0), last_token = rows.token(rows.count - 1);
        rows.first_position =
            sequence.seq_len - sequence.query_len + first_token - sequence.first_token;
        // Rows of several sequences see the whole KV split; this is as good as any.
        rows.of_several = last_token >= sequence.first_token + sequence.query_len;
        rows.last_position = rows.first_position + (rows.of_several ? 0 : last_token - first_token);

        // What the rows see of the KV split.
        const int first =
            args.window > 0 ? max(plan.begin_of(item.split), rows.first_position - args.window + 1)
                            : plan.begin_of(item.split);
        const int end = args.causal ? min(plan.end_of(item.split), rows.last_position + 1)
                                    : plan.end_of(item.split);

        Accumulator acc[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) clear(acc[m]);
        if (first < end)
            load_query(args.query, rows, args.query_token_stride, args.query_head_stride,
                       args.query_aligned, shared.query);
        const uint4* const warp_query = shared.query + first_row * kQueryRowChunks;
        Logits logits =
            logits_of(args, args.query_scale * unpacked_factor(args.k_scale, run.kv_head));
        logits.first_position = rows.first_position;
        logits.last_position = rows.last_position;
        const auto lane_row = [&](int m, int r) {
            return min(first_row + 16 * m + 8 * r + lane / 4, rows.count - 1);
        };
        RowPositions positions[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int token = rows.token(lane_row(m, r));
                positions[m].row[r] = rows.of_several ? position_of_token(batch, token)
                                                      : rows.first_position + token - first_token;
            }
        const auto slope_log2 = [&](int m, int r) {
            return args.alibi_slopes[rows.head(lane_row(m, r))] * kLog2E;
        };
        unsigned query_registers[kQueryInRegisters ? kRowTiles * kSteps : 1][4];

        // Tokens whose blocks fit in ids at any offset. Tiles fall to phases as in one run.
        const int max_run = ((kMaxIds - 1) << args.block_shift) / kKeyStride * kKeyStride;
        for (int begin = first; begin < end; begin += max_run) {
            run.begin = begin;
            run.end = min(end, begin + max_run);
            run.first_index = run.cache.table_index(begin);
            const int last_index = run.cache.table_index(run.end - 1);
            if (begin > first) __syncthreads();  // the run before is done with ids
            const int* const table = args.block_tables + item.sequence * args.table_stride;
            for (int i = threadIdx.x; i <= last_index - run.first_index; i += kThreads)
                ids[i] = table[run.first_index + i];
            __syncthreads();

            const int phase_begin = begin + phase * kTileKeys;
#pragma unroll 1
            for (int stage = 0; stage < kStages - 1; ++stage) {
                copy_tile(run, phase_thread, phase_begin + stage * kKeyStride,
                          shared.tiles[phase][stage]);
                cp_async_commit();
            }
            if (kQueryInRegisters && begin == first) {
#pragma unroll
                for (int i = 0; i < kRowTiles * kSteps; ++i)
                    load_query_step(query_registers[i],
                                    warp_query + i / kSteps * 16 * kQueryRowChunks, i % kSteps);
            }
            int stage = 0;
            for (int tile = phase_begin; tile < run.end; tile += kKeyStride) {
                cp_async_wait<kStages - 2>();
                phase_barrier();  // the tile is there, and the one before is done with
                const int free = stage == 0 ? kStages - 1 : stage - 1;
                copy_tile(run, phase_thread, tile + (kStages - 1) * kKeyStride,
                          shared.tiles[phase][free]);
                cp_async_commit();
                if (kRowGroups == 1 || first_row < rows.count)
                    attend<kRowTiles, 1, kQueryInRegisters>(
                        query_registers, warp_query, shared.tiles[phase][stage][0],
                        shared.tiles[phase][stage][1], logits, positions, slope_log2, tile, run.end,
                        acc);
                stage = stage == kStages - 1 ? 0 : stage + 1;
            }
            cp_async_wait<0>();  // a block barrier comes before the tiles are written again
        }

#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) sum_lanes(acc[m]);
        const float value_factor = unpacked_factor(args.v_scale, run.kv_head);
#pragma unroll 1
        for (int done = 0; done < rows.count; done += kGroupRows) {
            __syncthreads();  // the tiles, or the rows before, become phase_out
            if (first_row == done) {
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const int row = 16 * m + 8 * r + lane / 4;
                        if (done + row >= rows.count) continue;
                        float* const target = shared.phase_out[phase][row];
                        for_each_element(acc[m], r, [&](int element, const float* x, int count) {
#pragma unroll
                            for (int i = 0; i < count; i += 2)
                                *reinterpret_cast<float2*>(target + element + i) =
                                    make_float2(x[i], x[i + 1]);
                        });
                        if (lane % 4 == 0) phase_state[phase][row] = acc[m].state[r];
                    }
            }
            __syncthreads();

            // Every thread takes 16 bytes of the result of one row.
            for (int i = threadIdx.x; i < min(kGroupRows, rows.count - done) * kQueryChunks;
                 i += kThreads) {
                const int row = i / kQueryChunks;
                const int element = i % kQueryChunks * kQueryVec;
                float result[kQueryVec];
                const SoftmaxState state = merge_warps<kPhases>(&phase_state[0][row], kGroupRows,
                                                                &shared.phase_out[0][row][element],
                                                                kGroupRows * kOutStride, result);
#pragma unroll
                for (int j = 0; j < kQueryVec; ++j) result[j] *= value_factor;
                const int64 token = rows.token(done + row);
                store_split(output, token, batch.subset == kSingles ? item.sequence : token,
                            rows.head(done + row), item.split, plan.count, element, state, result);
            }
        }
    });
}
