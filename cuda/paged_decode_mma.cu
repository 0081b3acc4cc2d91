// Attention of a few query tokens a sequence over its paged cache, on tensor cores.
//
//   query            [T, H, D], contiguous in D         out  the same
//   cache            [num_blocks, 2, Hkv, B, D]         lse  float32 [T, H] or null
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1], or null: T = S, one query token a sequence. With `singles` the
//                    sequences of one query token are computed, and no other row is written.
//   k_scale, v_scale float32 [Hkv], null where the cache is not quantised
//   partial_out, partial_lse  workspace of the pieces, see merge_splits.cu
//   split_size       int32 [1] or null: where the size of pieces is left for merge_splits
//   tile_counts      int32 [max_splits], tile_lists [max_splits, list_capacity], from
//                    find_shared_pieces.cu; null: every sequence reads for itself
//
// A work item (work.cuh) is one KV head, one piece of a sequence, and a tile of 16 query rows: the
// query heads of the KV head, for one token or as many as fit, are the rows M of mma.m16n8k16, so
// that keys and values are read once for them all. Sequences that have the same keys in the piece
// put their rows into one tile. A row's result does not depend on the other rows, so it has the
// same bits. Fewer rows leave the tensor cores half idle, which does not matter: they wait for
// memory.
//
// Each warp of the block has every kWarps-th tile of kTileKeys keys to itself, with a ring of
// kStages tiles of keys and values that it alone fills (cp.async) and reads (ldmatrix): the loop
// over keys has no block barrier. Each warp has its own softmax state; they are merged at the end,
// through shared memory. The products are those of mma_attention.cuh.
//
// Dynamic shared memory: kTileRows rows of the query, and kWarps * kStages * 2 tiles of kTileKeys
// rows of 16 * kRowChunks bytes: 106 KiB at D = 128 in 16 bits (4 warps, 3 stages), 59 KiB in 8
// bits. Static: 3 KiB.
//
// Macros CUPAGED_DTYPE (fp16 or bf16), CUPAGED_CACHE_DTYPE (quant.cuh), CUPAGED_HEAD_SIZE (D, a
// multiple of 8, or of 16 with a quantised cache, at most 256), CUPAGED_STAGES.
#include "common.cuh"
#include "decode_output.cuh"
#include "mma_attention.cuh"
#include "paged.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kWarps = kHeadSize <= 128 ? 4 : 2;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileRows = 16;
constexpr int kTileKeys = 16;  // of a warp
constexpr int kStages = CUPAGED_STAGES;
constexpr int kTile = kTileKeys * kRowChunks;  // chunks of a tile of keys or values
constexpr int kMaxIds = 512;  // block ids in shared memory; longer pieces are done in several runs
// Larger heads read the query again for every tile, as the registers are full of sums.
constexpr bool kQueryInRegisters = kHeadSize <= 128;

// Blocks of a multiprocessor that registers allow for. Without it ptxas aims at a round number of
// registers and spills a few.
constexpr int kMinBlocks = kHeadSize <= 64 ? 4 : 2;

struct Shared {
    uint4 query[kTileRows * kQueryRowChunks];
    union {
        uint4 tiles[kWarps][kStages][2][kTile];  // 2: keys, values
        float warp_out[kWarps][kTileRows][kHeadSize];
    };
};

// A tile of query rows. Row r is head r % heads of token r / heads.
struct Rows {
    int64 first_token;
    int first_head;
    int heads;
    int count;
    int first_position, last_position;
    bool of_several;  // sequences

    __device__ __forceinline__ int64 token(int row) const { return first_token + row / heads; }
    __device__ __forceinline__ int head(int row) const { return first_head + row % heads; }
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

// Begin copying this warp's tile of keys and values from token `begin` on; zeros from the run's
// end on.
__device__ __forceinline__ void copy_tile(const Run& run, int begin, uint4 (*tile)[kTile]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = lane; i < kTileKeys * kTileChunks; i += kWarpSize) {
        const int row = i / kTileChunks;
        const int chunk = i % kTileChunks;
        const int token = begin + row;
        const bool valid = token < run.end && chunk < kChunks;
        const cache_t* source = run.cache.data;
        int64 to_value = 0;
        if (valid) {
            source = run.cache.key(run.ids[run.cache.table_index(token) - run.first_index],
                                   run.kv_head, run.cache.offset_in_block(token)) +
                     chunk * kVec;
            to_value = run.cache.value_offset();
        }
        uint4* const target = tile[0] + row * kRowChunks + chunk;
        cp_async_16_zfill(target, source, valid);
        cp_async_16_zfill(target + kTile, source + to_value, valid);
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
    paged_decode_mma(const scalar_t* __restrict__ query, const cache_t* __restrict__ cache_data,
                     const int* __restrict__ block_tables, const int* __restrict__ seq_lens,
                     const int* __restrict__ query_start_loc,
                     const float* __restrict__ alibi_slopes, const float* __restrict__ sinks,
                     const float* __restrict__ k_scale, const float* __restrict__ v_scale,
                     scalar_t* __restrict__ out, float* __restrict__ lse,
                     float* __restrict__ partial_out, float* __restrict__ partial_lse,
                     int* __restrict__ split_size, const int* __restrict__ tile_counts,
                     const int* __restrict__ tile_lists, cupaged::int64 query_token_stride,
                     cupaged::int64 query_head_stride, cupaged::int64 out_token_stride,
                     cupaged::int64 out_head_stride, cupaged::int64 block_stride,
                     cupaged::int64 table_stride, int num_tokens, int num_seqs, int num_heads,
                     int num_kv_heads, int block_shift, int causal, int window, int split_tokens,
                     int max_splits, int singles, int list_capacity, float query_scale,
                     float soft_cap_log2, int query_aligned, int out_aligned) {
    using namespace cupaged;
    CUPAGED_DYNAMIC_SMEM(dynamic, 16);
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    __shared__ int ids[kMaxIds];
    __shared__ int sums[kThreads];
    __shared__ SoftmaxState warp_state[kWarps][kTileRows];

    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int group = num_heads / num_kv_heads;
    const int tile_heads = min(group, kTileRows);
    const int tile_tokens = kTileRows / tile_heads;
    const int tiles = (group + tile_heads - 1) / tile_heads;  // of heads
    const DecodeOutput output{out,
                              lse,
                              partial_out,
                              partial_lse,
                              sinks,
                              out_token_stride,
                              out_head_stride,
                              num_heads,
                              kHeadSize,
                              max_splits,
                              out_aligned != 0};
    Batch batch{seq_lens, query_start_loc, num_seqs,   num_tokens,
                window,   split_tokens,    max_splits, singles != 0};
    balance_splits<kThreads>(batch, tile_tokens, num_kv_heads * tiles, split_size, sums);

    const SharedPieces shared_pieces{tile_counts, tile_lists, list_capacity};
    for_each_item<kThreads>(
        batch, shared_pieces, tile_tokens, num_kv_heads * tiles, sums, [&](const WorkItem& item) {
            const Sequence sequence = sequence_of(batch, item.sequence);
            const SplitPlan plan = plan_splits(batch, sequence);
            Run run{{cache_data, block_stride, num_kv_heads, block_shift, kHeadSize}, ids};
            run.kv_head = item.head_tile / tiles;
            const int head_in_group = item.head_tile % tiles * tile_heads;
            const int offset = item.first_token - sequence.first_token;
            Rows rows;
            rows.first_token = item.first_token;
            rows.first_head = run.kv_head * group + head_in_group;
            rows.heads = min(tile_heads, group - head_in_group);
            rows.count = rows.heads * item.num_tokens;
            rows.first_position = sequence.seq_len - sequence.query_len + offset;
            // Rows of several sequences see the whole piece; this is as good as any.
            rows.of_several = offset + item.num_tokens > sequence.query_len;
            rows.last_position = rows.first_position + (rows.of_several ? 0 : item.num_tokens - 1);

            // What the rows see of the piece.
            const int first = window > 0
                                  ? max(plan.begin_of(item.piece), rows.first_position - window + 1)
                                  : plan.begin_of(item.piece);
            const int end = causal ? min(plan.end_of(item.piece), rows.last_position + 1)
                                   : plan.end_of(item.piece);

            Accumulator acc[1];
            clear(acc[0]);
            if (first < end)
                load_query(query, rows, query_token_stride, query_head_stride, query_aligned,
                           shared.query);
            Logits logits;
            logits.scale = query_scale * unpacked_factor(k_scale, run.kv_head);
            logits.soft_cap_log2 = soft_cap_log2;
            logits.window = window;
            logits.causal = causal;
            logits.has_slopes = alibi_slopes != nullptr;
            logits.first_position = rows.first_position;
            logits.last_position = rows.last_position;
            RowPositions positions[1];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = min(lane / 4 + 8 * r, rows.count - 1);
                positions[0].row[r] = rows.of_several ? position_of_token(batch, rows.token(row))
                                                      : rows.first_position + row / rows.heads;
            }
            const auto slope_log2 = [&](int, int r) {
                return alibi_slopes[rows.head(min(lane / 4 + 8 * r, rows.count - 1))] * kLog2E;
            };
            unsigned query_registers[kQueryInRegisters ? kSteps : 1][4];

            // Tokens whose blocks fit in ids at any offset.
            const int max_run = (kMaxIds - 1) << block_shift;
            for (int begin = first; begin < end; begin += max_run) {
                run.begin = begin;
                run.end = min(end, begin + max_run);
                run.first_index = run.cache.table_index(begin);
                const int last_index = run.cache.table_index(run.end - 1);
                if (begin > first) __syncthreads();  // the run before is done with ids
                const int* const table = block_tables + item.sequence * table_stride;
                for (int i = threadIdx.x; i <= last_index - run.first_index; i += kThreads)
                    ids[i] = table[run.first_index + i];
                __syncthreads();

                // This warp's tiles begin kWarps * kTileKeys tokens apart.
                const int stride = kWarps * kTileKeys;
                const int warp_begin = begin + warp * kTileKeys;
#pragma unroll 1
                for (int stage = 0; stage < kStages - 1; ++stage) {
                    copy_tile(run, warp_begin + stage * stride, shared.tiles[warp][stage]);
                    cp_async_commit();
                }
                if (kQueryInRegisters && begin == first) {
#pragma unroll
                    for (int step = 0; step < kSteps; ++step)
                        load_query_step(query_registers[step], shared.query, step);
                }
                int stage = 0;
                for (int tile = warp_begin; tile < run.end; tile += stride) {
                    cp_async_wait<kStages - 2>();
                    __syncwarp();  // the tile is there, and the one before is done with
                    const int free = stage == 0 ? kStages - 1 : stage - 1;
                    copy_tile(run, tile + (kStages - 1) * stride, shared.tiles[warp][free]);
                    cp_async_commit();
                    attend<1, 1, kQueryInRegisters>(query_registers, shared.query,
                                                    shared.tiles[warp][stage][0],
                                                    shared.tiles[warp][stage][1], logits, positions,
                                                    slope_log2, tile, run.end, acc);
                    stage = stage == kStages - 1 ? 0 : stage + 1;
                }
                cp_async_wait<0>();
                __syncwarp();
            }

            sum_lanes(acc[0]);
            __syncthreads();  // the tiles become warp_out
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = lane / 4 + 8 * r;
                if (row >= rows.count) continue;
                if (lane % 4 == 0) warp_state[warp][row] = acc[0].state[r];
                float* const target = shared.warp_out[warp][row];
                for_each_element(acc[0], r, [&](int element, const float* x, int count) {
#pragma unroll
                    for (int i = 0; i < count; i += 2)
                        *reinterpret_cast<float2*>(target + element + i) =
                            make_float2(x[i], x[i + 1]);
                });
            }
            __syncthreads();

            // Every thread takes 16 bytes of the result of one row.
            const float value_factor = unpacked_factor(v_scale, run.kv_head);
            for (int i = threadIdx.x; i < rows.count * kQueryChunks; i += kThreads) {
                const int row = i / kQueryChunks;
                const int element = i % kQueryChunks * kQueryVec;
                float result[kQueryVec];
                const SoftmaxState state = merge_warps<kWarps>(&warp_state[0][row], kTileRows,
                                                               &shared.warp_out[0][row][element],
                                                               kTileRows * kHeadSize, result);
#pragma unroll
                for (int j = 0; j < kQueryVec; ++j) result[j] *= value_factor;
                store_piece(output, rows.token(row),
                            batch.singles ? item.sequence : rows.token(row), rows.head(row),
                            item.piece, plan.count, element, state, result);
            }
        });
}
