// Attention of a few query tokens a sequence over its paged cache, on tensor cores.
//
//   query            [T, H, D], contiguous in D         out  the same
//   cache            [num_blocks, 2, Hkv, B, D]         lse  float32 [T, H] or null
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1], or null: T = S, one query token a sequence
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
// same bits. Fewer rows leave the tensor cores half idle,
// which does not matter: they wait for memory.
//
// Each warp of the block has every kWarps-th tile of kTileKeys keys to itself, with a ring of
// kStages tiles of keys and values that it alone fills (cp.async) and reads (ldmatrix): the loop
// over keys has no block barrier. The logits come out of the product as the rows of P that the
// next product takes, in registers. Each warp has its own softmax state; they are merged at the
// end, through shared memory.
//
// A quantised cache stays in its codes up to the registers, and becomes fp16 there: the tensor
// cores multiply fp16, with the scales as factors of logits and outputs. A matrix of 8 rows of 16
// bytes is then 8x16 codes. Of each 4 codes that a lane gets of a key, the product takes the first
// two from one half of the 16 and the others from the other half: the order of a dot product is
// free, and the query is stored to match. Of the values it gets 2 keys at 2 neighbouring elements:
// the even ones and the odd ones are two matrices.
//
// Rows in shared memory are an odd number of 16-byte chunks apart, so that the 8 rows of a matrix
// lie in different banks. Dynamic shared memory: kTileRows rows of the query, and kWarps * kStages
// * 2 tiles of kTileKeys rows of 16 * kRowChunks bytes: 106 KiB at D = 128 in 16 bits (4 warps, 3
// stages), 59 KiB in 8 bits. Static: 3 KiB.
//
// Macros CUPAGED_DTYPE (fp16 or bf16), CUPAGED_CACHE_DTYPE (quant.cuh), CUPAGED_HEAD_SIZE (D, a
// multiple of 8, or of 16 with a quantised cache, at most 256), CUPAGED_STAGES.
#include "common.cuh"
#include "decode_output.cuh"
#include "paged.cuh"
#include "ptx.cuh"
#include "quant.cuh"
#include "softmax.cuh"
#include "vec.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kHeadSize = CUPAGED_HEAD_SIZE;
constexpr int kWarps = kHeadSize <= 128 ? 4 : 2;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileRows = 16;
constexpr int kTileKeys = 16;  // of a warp
constexpr int kStages = CUPAGED_STAGES;
constexpr int kVec = kVecSize<cache_t>;
constexpr int kChunks = kHeadSize / kVec;              // 16-byte chunks of a row of the cache
constexpr int kTileChunks = 2 * ceil_div(kChunks, 2);  // beyond kChunks they are zeros
constexpr int kRowChunks = kTileChunks + 1;            // from row to row in shared memory
constexpr int kTile = kTileKeys * kRowChunks;          // chunks of a tile of keys or values
constexpr int kSteps = kTileChunks * kVec / 16;        // of 16 elements
constexpr int kQueryVec = kVecSize<scalar_t>;
constexpr int kQueryChunks = kHeadSize / kQueryVec;  // of a row of the query
constexpr int kQueryRowChunks = 2 * kSteps + 1;
constexpr int kMaxIds = 512;  // block ids in shared memory; longer pieces are done in several runs
// Larger heads read the query again for every tile, as the registers are full of sums.
constexpr bool kQueryInRegisters = kHeadSize <= 128;

// Blocks of a multiprocessor that registers allow for. Without it ptxas aims at a round number of
// registers and spills a few.
constexpr int kMinBlocks = kHeadSize <= 64 ? 4 : 2;

#ifdef CUPAGED_CACHE_DTYPE
using matrix_t = __half;
__device__ __forceinline__ unsigned pack_pair(const float* x) {
    return bit_cast<unsigned>(__floats2half2_rn(x[0], x[1]));
}
#else
using matrix_t = scalar_t;
__device__ __forceinline__ unsigned pack_pair(const float* x) {
    return pack_word(x, scalar_t());
}
#endif
constexpr bool kQuantised = sizeof(cache_t) == 1;

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

// Put the tile's query rows into shared memory, in the order that the keys' codes come in.
__device__ __forceinline__ void load_query(const scalar_t* query, const Rows& rows,
                                           int64 token_stride, int64 head_stride, bool aligned,
                                           uint4* target) {
    for (int i = threadIdx.x; i < kTileRows * 2 * kSteps; i += kThreads) {
        const int row = i / (2 * kSteps);
        const int chunk = i % (2 * kSteps);
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row < rows.count && chunk < kQueryChunks)
            raw = load_vec(query + rows.token(row) * token_stride + rows.head(row) * head_stride +
                               chunk * kQueryVec,
                           aligned);
#ifdef CUPAGED_CACHE_DTYPE
        constexpr float kLargest = 65504.0f;  // in fp16
        float x[kQueryVec];
        unpack<scalar_t>(raw, x);
#pragma unroll
        for (int j = 0; j < kQueryVec; ++j) x[j] = fminf(fmaxf(x[j], -kLargest), kLargest);
        unsigned* const words =
            reinterpret_cast<unsigned*>(target + row * kQueryRowChunks + chunk / 2 * 2);
#pragma unroll
        for (int j = 0; j < kQueryVec; j += 2) {
            const int pair = 4 * (chunk % 2) + j / 2;  // of the 8 pairs of 16 elements
            words[pair / 2 + 4 * (pair % 2)] = pack_pair(x + j);
        }
#else
        target[row * kQueryRowChunks + chunk] = raw;
#endif
    }
}

// This lane's address of a row for ldmatrix_x4 on 16 rows at chunks 2 * pair and 2 * pair + 1.
// Matrices in the order: rows 0-7 and 8-15 of the first chunk, then of the second; with
// chunks_first: both chunks of rows 0-7, then of rows 8-15.
template <int kStride>
__device__ __forceinline__ const uint4* matrix_row(const uint4* rows, int pair, bool chunks_first) {
    const int lane = threadIdx.x % kWarpSize;
    const int low = lane / 8 % 2, high = lane / 16;
    const int row = lane % 8 + 8 * (chunks_first ? high : low);
    const int chunk = 2 * pair + (chunks_first ? low : high);
    return rows + row * kStride + chunk;
}

__device__ __forceinline__ void load_query_step(unsigned (&q)[4], const uint4* query, int step) {
    ldmatrix_x4(q, matrix_row<kQueryRowChunks>(query, step, false));
}

// What a lane holds of 16 rows, as mma.m16n8k16 lays them out: of rows g and g + 8 (g = lane / 4),
// columns 2t and 2t + 1 (t = lane % 4) of every 8. Of 16 elements of a quantised row, the first 8
// columns are the even ones.
struct Accumulator {
    SoftmaxState state[2];  // of the rows; the maximum of the row, the sum of this lane's keys
    float out[2 * kSteps][4];
};

struct Logits {
    float scale;          // in units of log2(e)
    float soft_cap_log2;  // 0 for none
    float slope_log2[2];
    int position[2];
    int first_position, last_position;  // of the tile's rows
    int window;                         // 0 for none
    bool causal;
    bool has_slopes;
};

// Logits of the keys from token `begin` on, masked, in place of the products.
__device__ __forceinline__ void form_logits(const Logits& logits, int begin, int end,
                                            float (&score)[2][4]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] *= logits.scale;
    if (logits.soft_cap_log2 > 0.0f) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[n][i] = logits.soft_cap_log2 * tanhf(score[n][i]);
    }
    if (logits.has_slopes) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                score[n][i] +=
                    logits.slope_log2[i / 2] *
                    static_cast<float>(begin + 8 * n + 2 * t + i % 2 - logits.position[i / 2]);
    }
    const int last = begin + kTileKeys - 1;
    const bool all_visible = last < end && (!logits.causal || last <= logits.first_position) &&
                             (logits.window <= 0 || begin > logits.last_position - logits.window);
    if (all_visible) return;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = begin + 8 * n + 2 * t + i % 2;
            const int distance = key - logits.position[i / 2];
            const bool visible = key < end && (!logits.causal || distance <= 0) &&
                                 (logits.window <= 0 || -distance < logits.window);
            if (!visible) score[n][i] = negative_infinity();
        }
}

// Add one tile of keys and values.
__device__ __forceinline__ void attend_tile(const unsigned (*query_registers)[4],
                                            const uint4* query, const uint4 (*tile)[kTile],
                                            const Logits& logits, int begin, int end,
                                            Accumulator& acc) {
    float score[2][4] = {};
#pragma unroll
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
        unsigned k[4];
        ldmatrix_x4(k, matrix_row<kRowChunks>(tile[0], pair, true));
        constexpr int kPairSteps = kQuantised ? 2 : 1;
#pragma unroll
        for (int i = 0; i < kPairSteps; ++i) {
            const int step = pair * kPairSteps + i;
            unsigned q[4];
            if (kQueryInRegisters) {
#pragma unroll
                for (int j = 0; j < 4; ++j) q[j] = query_registers[step][j];
            } else {
                load_query_step(q, query, step);
            }
#ifdef CUPAGED_CACHE_DTYPE
            unsigned low[2], high[2];
            unpack_halves<cache_t>(k[i], low);
            unpack_halves<cache_t>(k[2 + i], high);
#else
            const unsigned low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
#endif
            mma_m16n8k16<matrix_t>(score[0], q, low);
            mma_m16n8k16<matrix_t>(score[1], q, high);
        }
    }
    form_logits(logits, begin, end, score);

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float max = fmaxf(fmaxf(score[0][2 * r], score[0][2 * r + 1]),
                          fmaxf(score[1][2 * r], score[1][2 * r + 1]));
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, 2));
        factor[r] = softmax_raise(acc.state[r], max);
        const float reference = softmax_reference(acc.state[r].max);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
                score[n][i] = exp2f(score[n][i] - reference);
                acc.state[r].sum += score[n][i];
            }
    }
    // The maximum seldom changes after the first tiles.
    if (__any_sync(kFullMask, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc.out[n][i] *= factor[i / 2];
    }
    const unsigned p[4] = {pack_pair(&score[0][0]), pack_pair(&score[0][2]),
                           pack_pair(&score[1][0]), pack_pair(&score[1][2])};
#pragma unroll
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
        unsigned v[4];
        ldmatrix_x4_trans(v, matrix_row<kRowChunks>(tile[1], pair, false));
#ifdef CUPAGED_CACHE_DTYPE
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            unsigned first[2], second[2];  // keys 0 to 7 and 8 to 15: even elements, odd ones
            unpack_halves<cache_t>(__byte_perm(v[2 * i], 0, 0x3120), first);
            unpack_halves<cache_t>(__byte_perm(v[2 * i + 1], 0, 0x3120), second);
            const unsigned even[2] = {first[0], second[0]}, odd[2] = {first[1], second[1]};
            mma_m16n8k16<matrix_t>(acc.out[4 * pair + 2 * i], p, even);
            mma_m16n8k16<matrix_t>(acc.out[4 * pair + 2 * i + 1], p, odd);
        }
#else
        const unsigned low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
        mma_m16n8k16<matrix_t>(acc.out[2 * pair], p, low);
        mma_m16n8k16<matrix_t>(acc.out[2 * pair + 1], p, high);
#endif
    }
}

// Put one of the lane's rows into shared memory.
__device__ __forceinline__ void store_row_sums(const Accumulator& acc, int r, float* row) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2 * kSteps; n += 2) {
        const float2 low = make_float2(acc.out[n][2 * r], acc.out[n][2 * r + 1]);
        const float2 high = make_float2(acc.out[n + 1][2 * r], acc.out[n + 1][2 * r + 1]);
        if (kQuantised) {
            if (8 * n < kHeadSize)
                *reinterpret_cast<float4*>(row + 8 * n + 4 * t) =
                    make_float4(low.x, high.x, low.y, high.y);
        } else {
            if (8 * n < kHeadSize) *reinterpret_cast<float2*>(row + 8 * n + 2 * t) = low;
            if (8 * n + 8 < kHeadSize) *reinterpret_cast<float2*>(row + 8 * n + 8 + 2 * t) = high;
        }
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
                     int max_splits, int list_capacity, float query_scale, float soft_cap_log2,
                     int query_aligned, int out_aligned) {
    using namespace cupaged;
    CUPAGED_DYNAMIC_SMEM(dynamic);
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
    Batch batch{seq_lens, query_start_loc, num_seqs, num_tokens, window, split_tokens, max_splits};
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

            Accumulator acc;
            acc.state[0] = acc.state[1] = softmax_empty();
#pragma unroll
            for (int n = 0; n < 2 * kSteps; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc.out[n][i] = 0.0f;

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
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = min(lane / 4 + 8 * r, rows.count - 1);
                logits.position[r] = rows.of_several ? position_of_token(batch, rows.token(row))
                                                     : rows.first_position + row / rows.heads;
                logits.slope_log2[r] =
                    alibi_slopes != nullptr ? alibi_slopes[rows.head(row)] * kLog2E : 0.0f;
            }
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
                    attend_tile(query_registers, shared.query, shared.tiles[warp][stage], logits,
                                tile, run.end, acc);
                    stage = stage == kStages - 1 ? 0 : stage + 1;
                }
                cp_async_wait<0>();
                __syncwarp();
            }

#pragma unroll
            for (int r = 0; r < 2; ++r) {
                acc.state[r].sum += __shfl_xor_sync(kFullMask, acc.state[r].sum, 1);
                acc.state[r].sum += __shfl_xor_sync(kFullMask, acc.state[r].sum, 2);
            }
            __syncthreads();  // the tiles become warp_out
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = lane / 4 + 8 * r;
                if (row >= rows.count) continue;
                if (lane % 4 == 0) warp_state[warp][row] = acc.state[r];
                store_row_sums(acc, r, shared.warp_out[warp][row]);
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
                store_piece(output, rows.token(row), rows.head(row), item.piece, plan.count,
                            element, state, result);
            }
        });
}
