// Attention of variable-length queries over their paged cache: prefill, chunked prefill, mixed
// batches. On CUDA cores: for float32, and for GPUs before sm_80.
//
//   query            [T, H, D], contiguous in D      out  the same
//   kv_cache         [num_blocks, 2, Hkv, B, D]      lse  float32 [T, H] or null
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1]
//   k_scale, v_scale  float32 [Hkv], null where the cache is not quantised
//   workspace        int32 [2 * S + 6], as plan_prefill.cu leaves it
//   partials         for merge_splits.cu, of tiles in several KV splits
//
// Blocks take one tile after the other, see prefill_tiles.cuh; any grid will do. A tile has at most
// kTileRows rows: (token, head) pairs of one sequence and KV head, `tile_heads` heads of
// kTileRows / tile_heads tokens, so that keys and values are read once for them all. Rows after the
// last sequence are padding and become zeros.
//
// Each of the 128 threads holds kThreadRows rows (ty + 16 * i) of the tile. For the logits it takes
// kThreadKeys keys (tx + 8 * j), for the output the 16-byte chunks tx + 8 * k of those rows. The 8
// threads of a row are neighbours in a warp, so the softmax needs shuffles only and the
// probabilities, which pass through shared memory, no block barrier. Copies are asynchronous: the
// next keys arrive under the softmax and the values, the next values under the logits.
//
// A quantised cache lies in shared memory as it is. Its scales become factors of the logits and of
// the output.
//
// Shared memory for D bytes a row: queries, keys, values with 16 bytes of padding where that
// spreads the rows over the banks, and the probabilities in float; at most 44 KiB, see
// kSharedBytes.
//
// Macros CUPAGED_DTYPE, CUPAGED_CACHE_DTYPE, CUPAGED_HEAD_SIZE (D, a multiple of 8, or of 16 with a
// quantised cache, at most 256).
#include "common.cuh"
#include "attention_arguments.cuh"
#include "split_output.cuh"
#include "paged.cuh"
#include "prefill_tiles.cuh"
#include "ptx.cuh"
#include "quant.cuh"
#include "softmax.cuh"
#include "vec.cuh"

namespace cupaged {

constexpr int kHeadSize = CUPAGED_HEAD_SIZE;
constexpr int kThreads = CUPAGED_THREADS;
constexpr int kThreadsX = 8;
constexpr int kThreadsY = kThreads / kThreadsX;
constexpr int kVec = kVecSize<scalar_t>;
constexpr int kChunks = kHeadSize / kVec;  // 16-byte chunks of a row
constexpr int kRowBytes = kChunks * 16;
constexpr int kThreadRows = kRowBytes <= 256 ? 4 : kRowBytes <= 512 ? 2 : 1;
constexpr int kThreadKeys = kThreadRows;
// Where registers suffice for so many. Turing has shared memory for two of the larger ones.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 2;
#else
constexpr int kMostBlocks = 4;
#endif
constexpr int kMinBlocks = sizeof(scalar_t) == 4 && kThreadRows < 4 ? kMostBlocks : 1;
constexpr int kTileRows = kThreadsY * kThreadRows;
constexpr int kTileKeys = kThreadsX * kThreadKeys;
constexpr int kThreadChunks = ceil_div(kChunks, kThreadsX);
// Chunks of a row that one iteration of the logits takes. Two, but where the registers are those of
// four blocks and a fourth chunk of the output is there for some threads only (104 to 120
// elements): ptxas then spills on sm_86, sm_89 and sm_90. Three blocks, the other remedy, hide
// less.
constexpr int kUnroll = kMinBlocks == 4 && kThreadChunks == 4 && kChunks % kThreadsX != 0 ? 1 : 2;
constexpr int kCacheVec = kVecSize<cache_t>;
constexpr int kCacheChunks = kHeadSize / kCacheVec;
// Rows an odd number of chunks apart: 8 rows at the same chunk then lie in different banks.
constexpr int kRowChunks = kChunks % 2 == 0 ? kChunks + 1 : kChunks;
constexpr int kCacheRowChunks = kCacheChunks % 2 == 0 ? kCacheChunks + 1 : kCacheChunks;
// Rows of probabilities: 4 rows' float4 lie in different banks.
constexpr int kProbStride = kTileKeys + 4;

constexpr int kSharedBytes =
    16 * (kRowChunks * kTileRows + 2 * kCacheRowChunks * kTileKeys) + 4 * kProbStride * kTileRows;
static_assert(kSharedBytes <= 48 * 1024, "static shared memory");

// Begin copying kTileKeys keys (or, with an offset, values) into shared memory; zeros from `end`
// on.
__device__ __forceinline__ void copy_tile(const PagedCache<const cache_t>& cache, const int* table,
                                          int kv_head, int begin, int end, int64 offset,
                                          uint4* target) {
    for (int i = threadIdx.x; i < kTileKeys * kCacheChunks; i += kThreads) {
        const int row = i / kCacheChunks;
        const int chunk = i % kCacheChunks;
        const int token = begin + row;
        const cache_t* source = cache.data;
        if (token < end)
            source =
                cache.key(table[cache.table_index(token)], kv_head, cache.offset_in_block(token)) +
                offset + chunk * kCacheVec;
        cp_async_16_zfill(target + row * kCacheRowChunks + chunk, source, token < end);
    }
}

// The kVec elements of a key or value in shared memory that lie beside those of a chunk of a query.
__device__ __forceinline__ void unpack_chunk(const uint4* rows, int row, int chunk, float* x) {
    const uint4* const first = rows + row * kCacheRowChunks;
    if constexpr (kVec == kCacheVec) {
        unpack<cache_t>(first[chunk], x);
    } else {
        constexpr int kWords = kVec * static_cast<int>(sizeof(cache_t)) / 4;
        unsigned words[kWords];
        if constexpr (kWords == 2) {
            const uint2 pair = reinterpret_cast<const uint2*>(first)[chunk];
            words[0] = pair.x;
            words[1] = pair.y;
        } else {
            words[0] = reinterpret_cast<const unsigned*>(first)[chunk];
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i) unpack_word(words[i], x + 4 * i, cache_t());
    }
}

// Put the tile's query rows into shared memory.
template <bool kAligned>
__device__ __forceinline__ void load_query(const PrefillArguments& args, const PrefillTile& tile,
                                           uint4* target) {
    constexpr int kLoadsAtOnce = kAligned ? 4 : 1;
    const int heads = tile.num_heads;
#pragma unroll kLoadsAtOnce
    for (int i = threadIdx.x; i < kTileRows * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int chunk = i % kChunks;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row < heads * tile.num_tokens)
            raw = load_vec(args.query + (tile.first_token + row / heads) * args.query_token_stride +
                               (tile.first_head + row % heads) * args.query_head_stride +
                               chunk * kVec,
                           kAligned);
        target[row * kRowChunks + chunk] = raw;
    }
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads, cupaged::kMinBlocks)
    paged_prefill(const cupaged::PrefillArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    int* __restrict__ const workspace = args.workspace;
    float* __restrict__ const partials = args.partials;
    // Read at the start: where the loops read them, ptxas spills at 112 and 120 elements.
    const int num_heads = args.num_heads, num_kv_heads = args.num_kv_heads;
    const int max_splits = args.max_splits, window = args.window, causal = args.causal;
    const float query_scale = args.query_scale, soft_cap_log2 = args.soft_cap_log2;
    __shared__ uint4 shared_query[kTileRows * kRowChunks];
    __shared__ uint4 shared_key[kTileKeys * kCacheRowChunks];
    __shared__ uint4 shared_value[kTileKeys * kCacheRowChunks];
    __shared__ float4 shared_prob[kTileRows * kProbStride / 4];
    __shared__ PrefillTile shared_tile;

    const int tx = threadIdx.x % kThreadsX;
    const int ty = threadIdx.x / kThreadsX;
    const PrefillSchedule schedule = prefill_schedule(workspace, args.num_seqs);
    const PrefillBatch batch{{args.seq_lens, args.query_start_loc, args.num_seqs, args.num_tokens,
                              window, 0, max_splits, kMultiToken},
                             kTileRows / args.tile_heads,
                             num_heads,
                             num_kv_heads,
                             args.tile_heads,
                             l2_tokens(kHeadSize * static_cast<int>(sizeof(cache_t)))};
    if (threadIdx.x == 0) shared_tile = take_tile(schedule, batch);
    for (;;) {
        __syncthreads();  // the tile is there, and all are done with the one before
        const PrefillTile tile = shared_tile;
        if (tile.num_tokens == 0) return;
        const int kv_head = tile.kv_head;
        const int heads = tile.num_heads;
        const int num_rows = heads * tile.num_tokens;  // row r: head r % heads of token r / heads

        // Apart: one loop that tests the alignment costs registers, and ptxas spills.
        if (args.query_aligned)
            load_query<true>(args, tile, shared_query);
        else
            load_query<false>(args, tile, shared_query);

        // This thread's rows.
        int position[kThreadRows];
        float slope_log2[kThreadRows];
        SoftmaxState state[kThreadRows];  // the maximum of the row, the sum of this thread's keys
        float acc[kThreadRows][kThreadChunks][kVec];
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
            const int row = ty + i * kThreadsY;
            position[i] = tile.first_position + row / heads;
            slope_log2[i] = args.alibi_slopes != nullptr
                                ? args.alibi_slopes[tile.first_head + row % heads] * kLog2E
                                : 0.0f;
            state[i] = softmax_empty();
#pragma unroll
            for (int k = 0; k < kThreadChunks; ++k)
#pragma unroll
                for (int e = 0; e < kVec; ++e) acc[i][k][e] = 0.0f;
        }

        const int key_end = tile.end(causal);
        const int key_begin = tile.begin(window);
        const PagedCache<const cache_t> cache{args.kv_cache, args.block_stride, num_kv_heads,
                                              args.block_shift, kHeadSize};
        const int* const table = args.block_tables + tile.sequence * args.table_stride;
        const int64 to_value = cache.value_offset();
        const float logit_factor = query_scale * unpacked_factor(args.k_scale, kv_head);
        const float value_factor = unpacked_factor(args.v_scale, kv_head);

        if (key_begin < key_end) {
            copy_tile(cache, table, kv_head, key_begin, key_end, 0, shared_key);
            cp_async_commit();
            copy_tile(cache, table, kv_head, key_begin, key_end, to_value, shared_value);
            cp_async_commit();
        }
        __syncthreads();  // all have read the tile
        if (threadIdx.x == 0) shared_tile = take_tile(schedule, batch);
        for (int begin = key_begin; begin < key_end; begin += kTileKeys) {
            const int next = begin + kTileKeys;
            cp_async_wait<1>();
            __syncthreads();  // the keys (and at first the queries) are there

            float score[kThreadRows][kThreadKeys];
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
                for (int j = 0; j < kThreadKeys; ++j) score[i][j] = 0.0f;
#pragma unroll kUnroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                float q[kThreadRows][kVec];
#pragma unroll
                for (int i = 0; i < kThreadRows; ++i)
                    unpack<scalar_t>(shared_query[(ty + i * kThreadsY) * kRowChunks + chunk], q[i]);
#pragma unroll
                for (int j = 0; j < kThreadKeys; ++j) {
                    float k[kVec];
                    unpack_chunk(shared_key, tx + j * kThreadsX, chunk, k);
#pragma unroll
                    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
                        for (int e = 0; e < kVec; ++e) score[i][j] += q[i][e] * k[e];
                }
            }
            __syncthreads();  // all are done with the keys
            if (next < key_end) copy_tile(cache, table, kv_head, next, key_end, 0, shared_key);
            cp_async_commit();

#pragma unroll
            for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
                for (int j = 0; j < kThreadKeys; ++j) score[i][j] *= logit_factor;
            if (soft_cap_log2 > 0.0f) {
#pragma unroll
                for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
                    for (int j = 0; j < kThreadKeys; ++j)
                        score[i][j] = soft_cap_log2 * tanh_by_exp2(score[i][j]);
            }
            float* const prob = reinterpret_cast<float*>(shared_prob);
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i) {
                float max = negative_infinity();
#pragma unroll
                for (int j = 0; j < kThreadKeys; ++j) {
                    const int key = begin + tx + j * kThreadsX;
                    const int distance = key - position[i];
                    const float s = score[i][j] + slope_log2[i] * static_cast<float>(distance);
                    const bool visible = key < key_end && (!causal || distance <= 0) &&
                                         (window <= 0 || -distance < window);
                    score[i][j] = visible ? s : negative_infinity();
                    max = fmaxf(max, score[i][j]);
                }
#pragma unroll
                for (int offset = kThreadsX / 2; offset > 0; offset /= 2)
                    max = fmaxf(max, __shfl_xor_sync(kFullMask, max, offset));
                const float factor = softmax_raise(state[i], max);
                const float reference = softmax_reference(state[i].max);
#pragma unroll
                for (int j = 0; j < kThreadKeys; ++j) {
                    const float p = exp2f(score[i][j] - reference);
                    state[i].sum += p;
                    prob[(ty + i * kThreadsY) * kProbStride + tx + j * kThreadsX] = p;
                }
#pragma unroll
                for (int k = 0; k < kThreadChunks; ++k)
#pragma unroll
                    for (int e = 0; e < kVec; ++e) acc[i][k][e] *= factor;
            }
            cp_async_wait<1>();
            __syncthreads();  // the values and probabilities are there

#pragma unroll 1
            for (int key = 0; key < kTileKeys; key += 4) {
                float p[kThreadRows][4];
#pragma unroll
                for (int i = 0; i < kThreadRows; ++i) {
                    const float4 four = shared_prob[((ty + i * kThreadsY) * kProbStride + key) / 4];
                    p[i][0] = four.x;
                    p[i][1] = four.y;
                    p[i][2] = four.z;
                    p[i][3] = four.w;
                }
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int k = 0; k < kThreadChunks; ++k) {
                        const int chunk = tx + k * kThreadsX;
                        if (chunk >= kChunks) continue;
                        float v[kVec];
                        unpack_chunk(shared_value, key + j, chunk, v);
#pragma unroll
                        for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
                            for (int e = 0; e < kVec; ++e) acc[i][k][e] += p[i][j] * v[e];
                    }
            }
            __syncthreads();  // all are done with the values
            if (next < key_end)
                copy_tile(cache, table, kv_head, next, key_end, to_value, shared_value);
            cp_async_commit();
        }

#pragma unroll
        for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
            for (int offset = kThreadsX / 2; offset > 0; offset /= 2)
                state[i].sum += __shfl_xor_sync(kFullMask, state[i].sum, offset);
        if (tile.num_splits > 1) {
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i) {
                const int row = ty + i * kThreadsY;
                if (row < num_rows) {
                    float* const partial = partial_of(partials, tile.first_token + row / heads,
                                                      num_heads, tile.first_head + row % heads,
                                                      max_splits, tile.split, kHeadSize);
                    const float factor = softmax_normaliser(state[i]) * value_factor;
                    if (tx == 0) partial[kHeadSize] = softmax_lse_log2(state[i]);
#pragma unroll
                    for (int k = 0; k < kThreadChunks; ++k) {
                        const int chunk = tx + k * kThreadsX;
#pragma unroll
                        for (int e = 0; e < kVec; e += 4)
                            if (chunk < kChunks)
                                *reinterpret_cast<float4*>(partial + chunk * kVec + e) =
                                    make_float4(acc[i][k][e] * factor, acc[i][k][e + 1] * factor,
                                                acc[i][k][e + 2] * factor,
                                                acc[i][k][e + 3] * factor);
                    }
                }
            }
            continue;
        }
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
            const int row = ty + i * kThreadsY;
            if (row >= num_rows) continue;
            const int64 token = tile.first_token + row / heads;
            const int head = tile.first_head + row % heads;
            float factor = 1.0f;
            if (args.sinks != nullptr && !softmax_is_empty(state[i]))
                factor = softmax_add_sink(state[i], args.sinks[head] * kLog2E);
            factor *= softmax_normaliser(state[i]) * value_factor;
            if (lse != nullptr && tx == 0)
                lse[token * num_heads + head] = softmax_lse_log2(state[i]) * kLn2;
            scalar_t* const target =
                out + token * args.out_token_stride + head * args.out_head_stride;
#pragma unroll
            for (int k = 0; k < kThreadChunks; ++k) {
                const int chunk = tx + k * kThreadsX;
                if (chunk >= kChunks) continue;
#pragma unroll
                for (int e = 0; e < kVec; ++e) acc[i][k][e] *= factor;
                store_vec(target + chunk * kVec, pack<scalar_t>(acc[i][k]), args.out_aligned);
            }
        }
    }
}
