// Attention of variable-length queries over their paged cache, on tensor cores: prefill, chunked
// prefill, mixed batches.
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
// kTileRows / tile_heads tokens, so that keys and values are read once for them all, and a short
// chunk still fills the rows. The next tile is looked up while the first keys of this one arrive.
//
// The 4 warps have kWarpRows rows each and go through all keys that the tile sees together, in
// tiles of kTileKeys from a ring of kStages that all threads fill (cp.async), with one barrier a
// tile. A warp passes over tiles of which its own rows see nothing. The products are those
// of mma_attention.cuh, the logits and probabilities stay in registers, and the result goes out
// through the shared memory of the query.
//
// Dynamic shared memory: kTileRows rows of the query, and kStages * 2 tiles of kTileKeys rows of
// 16 * kRowChunks bytes, and their block ids: 85 KiB at D = 128 in 16 bits (32 keys, 3 stages).
//
// Predicted for an H100 at D = 128 in 16 bits, not measured yet: a tile of 32 keys takes a warp
// 1024 clocks of products, at the rate of mma.sync there, 256 of exponentials, and its block 512 of
// ldmatrix. Two blocks on a multiprocessor fill each other's gaps: 320 TFLOP/s if three quarters of
// the products' rate are left.
//
// Macros CUPAGED_DTYPE (fp16 or bf16), CUPAGED_CACHE_DTYPE (quant.cuh), CUPAGED_HEAD_SIZE (D, a
// multiple of 8, or of 16 with a quantised cache, at most 256), CUPAGED_TILE_KEYS (a multiple of
// 16), CUPAGED_STAGES.
#include "common.cuh"
#include "attention_arguments.cuh"
#include "split_output.cuh"
#include "mma_attention.cuh"
#include "paged.cuh"
#include "prefill_tiles.cuh"

namespace cupaged {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
// Tiles of 16 rows of a warp: each key and value that it loads serves them all. Larger heads leave
// registers for one.
constexpr int kRowTiles = kHeadSize <= 128 ? 2 : 1;
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kTileRows = kWarps * kWarpRows;
constexpr int kTileKeys = CUPAGED_TILE_KEYS;
// Whose logits are in registers at once. Unpacking codes takes some as well.
constexpr int kAttendKeys = kHeadSize <= (kQuantised ? 96 : 128) ? kTileKeys : 16;
constexpr int kStages = CUPAGED_STAGES;
constexpr int kTile = kTileKeys * kRowChunks;  // chunks of a tile of keys or values

struct Shared {
    PrefillTile tile;
    uint4 query[kTileRows * kQueryRowChunks];
    uint4 tiles[kStages][2][kTile];  // 2: keys, values
    int ids[kStages][kTileKeys];     // of the rows of a tile, or of the next one in its place
};
static_assert(sizeof(PrefillTile) == CUPAGED_PREFILL_TILE_BYTES, "which is part of the next");
static_assert(sizeof(Shared) == CUPAGED_DYNAMIC_BYTES, "as launched");
static_assert(kThreads == CUPAGED_THREADS, "as launched");

// The keys that a block reads.
struct Keys {
    PagedCache<const cache_t> cache;
    const int* table;
    int kv_head;
    int end;
};

// The block ids of a tile's rows go through shared memory, a tile ahead of the copy.
__device__ __forceinline__ void load_ids(const Keys& keys, int begin, int* ids) {
    const int token = begin + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kTileKeys && token < keys.end)
        ids[threadIdx.x] = keys.table[keys.cache.table_index(token)];
}

// Begin copying the tile from token `begin` on; zeros from the last key on.
__device__ __forceinline__ void copy_tile(const Keys& keys, int begin, const int* ids,
                                          uint4 (*tile)[kTile]) {
#pragma unroll 1  // registers are scarce
    for (int i = threadIdx.x; i < kTileKeys * kTileChunks; i += kThreads) {
        const int row = i / kTileChunks;
        const int chunk = i % kTileChunks;
        const int token = begin + row;
        const bool valid = token < keys.end && chunk < kChunks;
        const cache_t* source = keys.cache.data;
        int64 to_value = 0;
        if (valid) {
            source = keys.cache.key(ids[row], keys.kv_head, keys.cache.offset_in_block(token)) +
                     chunk * kVec;
            to_value = keys.cache.value_offset();
        }
        uint4* const target = tile[0] + row * kRowChunks + chunk;
        cp_async_16_zfill(target, source, valid);
        cp_async_16_zfill(target + kTile, source + to_value, valid);
    }
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads, 1)
    paged_prefill_mma(const cupaged::PrefillArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    int* __restrict__ const workspace = args.workspace;
    float* __restrict__ const partials = args.partials;
    CUPAGED_DYNAMIC_SMEM(dynamic, 16);
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const PrefillSchedule schedule = prefill_schedule(workspace, args.num_seqs);
    const PrefillBatch batch{{args.seq_lens, args.query_start_loc, args.num_seqs, args.num_tokens,
                              args.window, 0, args.max_splits, kMultiToken},
                             kTileRows / args.tile_heads,
                             args.num_heads,
                             args.num_kv_heads,
                             args.tile_heads,
                             l2_tokens(kHeadSize * static_cast<int>(sizeof(cache_t)))};
    if (threadIdx.x == 0) shared.tile = take_tile(schedule, batch);
    for (;;) {
        __syncthreads();  // the tile is there, and all are done with the one before
        const PrefillTile tile = shared.tile;
        if (tile.num_tokens == 0) return;
        const int heads = tile.num_heads;
        const int num_rows = heads * tile.num_tokens;  // row r: head r % heads of token r / heads
        Keys keys{
            {args.kv_cache, args.block_stride, args.num_kv_heads, args.block_shift, kHeadSize},
            args.block_tables + tile.sequence * args.table_stride};
        keys.kv_head = tile.kv_head;

        keys.end = tile.end(args.causal);
        const int begin = tile.begin(args.window);

#pragma unroll
        for (int stage = 0; stage < kStages; ++stage)
            load_ids(keys, begin + stage * kTileKeys, shared.ids[stage]);
        __syncthreads();
#pragma unroll 1
        for (int stage = 0; stage < kStages - 1; ++stage) {
            copy_tile(keys, begin + stage * kTileKeys, shared.ids[stage], shared.tiles[stage]);
            cp_async_commit();
        }
        for (int i = threadIdx.x; i < kTileRows * kQueryTileChunks; i += kThreads) {
            const int row = i / kQueryTileChunks;
            const int chunk = i % kQueryTileChunks;
            uint4 raw = make_uint4(0, 0, 0, 0);
            if (row < num_rows && chunk < kQueryChunks)
                raw = load_vec(args.query +
                                   (tile.first_token + row / heads) * args.query_token_stride +
                                   (tile.first_head + row % heads) * args.query_head_stride +
                                   chunk * kQueryVec,
                               args.query_aligned);
            store_query(shared.query + row * kQueryRowChunks, chunk, raw);
        }

        if (threadIdx.x == 0) shared.tile = take_tile(schedule, batch);

        // This warp's rows.
        const int lane = threadIdx.x % kWarpSize;
        const int first_row = static_cast<int>(threadIdx.x) / kWarpSize * kWarpRows;
        uint4* const warp_query = shared.query + first_row * kQueryRowChunks;
        Logits logits =
            logits_of(args, args.query_scale * unpacked_factor(args.k_scale, keys.kv_head));
        logits.first_position = tile.first_position + min(first_row, num_rows - 1) / heads;
        logits.last_position =
            tile.first_position + min(first_row + kWarpRows - 1, num_rows - 1) / heads;
        // The keys that they see.
        const int warp_end = first_row >= num_rows ? 0
                             : args.causal         ? min(keys.end, logits.last_position + 1)
                                                   : keys.end;
        const int warp_begin = args.window > 0 ? logits.first_position - args.window + 1 : 0;
        RowPositions positions[kRowTiles];
        Accumulator acc[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            clear(acc[m]);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = min(first_row + 16 * m + 8 * r + lane / 4, num_rows - 1);
                positions[m].row[r] = tile.first_position + row / heads;
            }
        }
        const auto slope_log2 = [&](int m, int r) {
            const int row = min(first_row + 16 * m + 8 * r + lane / 4, num_rows - 1);
            return args.alibi_slopes[tile.first_head + row % heads] * kLog2E;
        };

        int stage = 0;
        for (int key = begin; key < keys.end; key += kTileKeys) {
            cp_async_wait<kStages - 2>();
            __syncthreads();  // the tile is there, and all are done with the one before
            const int free = stage == 0 ? kStages - 1 : stage - 1;
            copy_tile(keys, key + (kStages - 1) * kTileKeys, shared.ids[free], shared.tiles[free]);
            cp_async_commit();
            load_ids(keys, key + kStages * kTileKeys, shared.ids[stage]);
#pragma unroll
            for (int i = 0; i < kTileKeys; i += kAttendKeys) {
                if (key + i < warp_end && key + i + kAttendKeys > warp_begin)
                    attend<kRowTiles, kAttendKeys / 16, false>(
                        nullptr, warp_query, shared.tiles[stage][0] + i * kRowChunks,
                        shared.tiles[stage][1] + i * kRowChunks, logits, positions, slope_log2,
                        key + i, keys.end, acc);
            }
            stage = stage == kStages - 1 ? 0 : stage + 1;
        }
        cp_async_wait<0>();
        __syncthreads();  // without keys: the query is there

        const float value_factor = unpacked_factor(args.v_scale, keys.kv_head);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            sum_lanes(acc[m]);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = first_row + 16 * m + 8 * r + lane / 4;
                SoftmaxState state = acc[m].state[r];
                float factor = 1.0f;
                if (tile.num_splits > 1) {
                    if (row >= num_rows) continue;
                    float* const partial = partial_of(partials, tile.first_token + row / heads,
                                                      args.num_heads, tile.first_head + row % heads,
                                                      args.max_splits, tile.split, kHeadSize);
                    factor = softmax_normaliser(state) * value_factor;
                    for_each_element(acc[m], r, [&](int element, const float* x, int count) {
#pragma unroll
                        for (int i = 0; i < count; i += 2)
                            *reinterpret_cast<float2*>(partial + element + i) =
                                make_float2(x[i] * factor, x[i + 1] * factor);
                    });
                    if (lane % 4 == 0) partial[kHeadSize] = softmax_lse_log2(state);
                    continue;
                }
                if (row < num_rows) {
                    const int head = tile.first_head + row % heads;
                    if (args.sinks != nullptr && !softmax_is_empty(state))
                        factor = softmax_add_sink(state, args.sinks[head] * kLog2E);
                    if (lse != nullptr && lane % 4 == 0)
                        lse[(tile.first_token + row / heads) * static_cast<int64>(args.num_heads) +
                            head] = softmax_lse_log2(state) * kLn2;
                }
                factor *= softmax_normaliser(state) * value_factor;
                // The warp is done with its query: its place takes the result.
                unsigned* const target = reinterpret_cast<unsigned*>(
                    shared.query + (first_row + 16 * m + 8 * r + lane / 4) * kQueryRowChunks);
                for_each_element(acc[m], r, [&](int element, const float* x, int count) {
#pragma unroll
                    for (int i = 0; i < count; i += 2) {
                        const float pair[2] = {x[i] * factor, x[i + 1] * factor};
                        target[(element + i) / 2] = pack_word(pair, scalar_t());
                    }
                });
            }
        }
        if (tile.num_splits > 1) continue;
        __syncwarp();
        for (int i = lane; i < kWarpRows * kQueryChunks; i += kWarpSize) {
            const int row = first_row + i / kQueryChunks;
            const int chunk = i % kQueryChunks;
            if (row < num_rows)
                store_vec(out + (tile.first_token + row / heads) * args.out_token_stride +
                              (tile.first_head + row % heads) * args.out_head_stride +
                              chunk * kQueryVec,
                          shared.query[row * kQueryRowChunks + chunk], args.out_aligned);
        }
    }
}
