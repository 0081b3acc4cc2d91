// Multi-head latent attention over the paged cache, on tensor cores.
//
//   query            [T, H, Dk], contiguous in Dk       out  [T, H, Dv], contiguous in Dv
//   kv_cache         [num_blocks, B, Dk]                lse  float32 [T, H] or null
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1], or null: T = S, one query token a sequence. The sequences that
//                    are not of the launch's subset (work.cuh) are left alone.
//   partials         workspace of the KV splits, see merge_splits.cu
//
// A row of the cache is the key of all heads, and its first Dv elements are their value: it is read
// once for both, and for all rows of a tile.
//
// A work item (work.cuh) is one KV split of a sequence and a tile of query rows: heads of a token,
// or of as many tokens as fit. The kWarps warps work on it together. Tiles of kTileKeys keys come
// through a ring of kStages (cp.async), and three steps, with barriers between, take one in:
// 1. Logits: a warp has 16 rows of the query by 16 keys, or a slice of the elements of their
//    products where there are more warps than such squares. They go through shared memory.
// 2. Softmax: kRowLanes lanes a row sum the slices, and leave the weights in 16 bits.
// 3. Output: a warp has Dv / kWarps columns of all rows, so that each value is loaded by one warp,
//    and the sums stay in registers from tile to tile.
//
// Dynamic shared memory, see Shared: at Dk = 576 with 64 rows, 32 keys and 3 stages 199 KiB, with
// 16 rows and 2 stages 103 KiB. Static: 1 KiB of the planner.
//
// Predicted for an H100 with 128 heads of 576, not measured yet: a tile of 32 keys and 64 rows
// takes ldmatrix 360 KB, 2,800 clocks, the tensor cores 1,100, and its 36 KB take a multiprocessor
// 2,500 clocks from memory. So loads from shared memory are the bound, and half of what FlashMLA
// reaches with the products of a warpgroup, whose matrices stay there, is the most to expect. With
// 16 heads memory is the bound.
//
// Macros CUPAGED_DTYPE (fp16 or bf16), CUPAGED_KEY_SIZE and CUPAGED_VALUE_SIZE (what Dk and Dv,
// multiples of 8, are at most; of 16 and of 128), CUPAGED_TILE_ROWS, CUPAGED_TILE_KEYS,
// CUPAGED_STAGES.
#define CUPAGED_HEAD_SIZE CUPAGED_KEY_SIZE  // of the rows in shared memory
#include "common.cuh"
#include "mla_arguments.cuh"
#include "mma_attention.cuh"
#include "paged.cuh"
#include "split_output.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kThreads = CUPAGED_THREADS;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileRows = CUPAGED_TILE_ROWS;
constexpr int kTileKeys = CUPAGED_TILE_KEYS;
constexpr int kStages = CUPAGED_STAGES;
constexpr int kValueSize = CUPAGED_VALUE_SIZE;
constexpr int kRowTiles = kTileRows / 16;
constexpr int kKeyTiles = kTileKeys / 16;
constexpr int kSquares = kRowTiles * kKeyTiles;
constexpr int kSlices = kWarps / kSquares;
constexpr int kSliceSteps = ceil_div(kSteps, kSlices);
constexpr int kWarpPairs = kValueSize / kWarps / 16;  // of 8 columns of the output, of a warp
constexpr int kRowThreads = kThreads / kTileKeys;     // that copy a row of the cache
// Lanes that have a row's softmax, each of pairs of keys.
constexpr int kRowLanes =
    kThreads / kTileRows < kTileKeys / 2 ? kThreads / kTileRows : kTileKeys / 2;
constexpr int kLanePairs = kTileKeys / 2 / kRowLanes;
constexpr int kMinBlocks = kTileRows == 16 && kStages == 2 ? 2 : 1;  // for which there is room

static_assert(kSlices * kSquares == kWarps, "each warp has a slice of a square");
static_assert(kWarpPairs * kWarps * 16 == kValueSize, "columns of a warp");

// Such that what a warp stores or loads together is in banks of its own: pairs of floats of 4 rows,
// and 16 bytes of 8 rows.
constexpr int kOutStride = kValueSize + 8;
constexpr int kLogitStride = kTileKeys + 8;
constexpr int kWeightChunks = kTileKeys / kQueryVec + 1;
static_assert(kOutStride % 32 == 8 && kLogitStride % 16 == 8 && kWeightChunks % 2 == 1, "banks");

struct Shared {
    union {
        struct {
            uint4 query[kTileRows * kRowChunks];
            uint4 tiles[kStages][kTileKeys * kRowChunks];
        } in;
        float out[kTileRows][kOutStride];
    };
    uint4 weights[kTileRows * kWeightChunks];
    float logits[kSlices][kTileRows][kLogitStride];
    SoftmaxState states[kTileRows];
    float factors[kTileRows];  // of what was accumulated
};
static_assert(sizeof(Shared) == CUPAGED_DYNAMIC_BYTES, "as launched");

// The keys of a work item.
struct Keys {
    PagedCache<const scalar_t> cache;
    const int* table;
    int end;

    __device__ __forceinline__ int block_of(int token) const {
        return token < end ? table[cache.table_index(token)] : 0;
    }
};

// Begin copying this thread's chunks of the row of one token; zeros from the end on, and beyond Dk.
__device__ __forceinline__ void copy_row(const Keys& keys, int block, int token, uint4* target) {
    const bool exists = token < keys.end;
    const scalar_t* const source =
        exists ? keys.cache.key(block, 0, keys.cache.offset_in_block(token)) : keys.cache.data;
#pragma unroll
    for (int first = 0; first < kTileChunks; first += kRowThreads) {
        const int chunk = first + static_cast<int>(threadIdx.x) % kRowThreads;
        if (kTileChunks % kRowThreads != 0 && chunk >= kTileChunks) continue;
        const bool valid = exists && chunk * kVec < keys.cache.head_size;
        cp_async_16_zfill(target + chunk, valid ? source + chunk * kVec : keys.cache.data, valid);
    }
}

// Put the tile's query rows into shared memory.
__device__ __forceinline__ void load_query(const MlaArguments& args, const WorkItem& item,
                                           uint4* target) {
    for (int i = threadIdx.x; i < kTileRows * kTileChunks; i += kThreads) {
        const int row = i / kTileChunks;
        const int chunk = i % kTileChunks;
        const int index = item.first_row + row;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row < item.num_rows && chunk * kVec < args.key_size)
            raw = load_vec(args.query + index / args.num_heads * args.query_token_stride +
                               index % args.num_heads * args.query_head_stride + chunk * kVec,
                           args.query_aligned);
        target[row * kRowChunks + chunk] = raw;
    }
}

// Step 1: this warp's products of query rows and keys.
__device__ __forceinline__ void multiply_keys(Shared& shared, const uint4* tile) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int row_tile = warp % kSquares % kRowTiles, key_tile = warp % kSquares / kRowTiles;
    const int slice = warp / kSquares;
    const uint4* const query = shared.in.query + row_tile * 16 * kRowChunks;
    const uint4* const keys = tile + key_tile * 16 * kRowChunks;
    float score[2][4] = {};
#pragma unroll 4
    for (int i = 0; i < kSliceSteps; ++i) {
        const int step = slice * kSliceSteps + i;
        if (kSteps % kSlices != 0 && step >= kSteps) break;
        unsigned q[4], k[4];
        load_query_step(q, query, step);
        ldmatrix_x4(k, matrix_row<kRowChunks>(keys, step, true));
        const unsigned low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
        mma_m16n8k16<scalar_t>(score[0], q, low);
        mma_m16n8k16<scalar_t>(score[1], q, high);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n)
            *reinterpret_cast<float2*>(&shared.logits[slice][16 * row_tile + 8 * r + lane / 4]
                                                     [16 * key_tile + 8 * n + 2 * (lane % 4)]) =
                make_float2(score[n][2 * r], score[n][2 * r + 1]);
}

// Step 2: the weights of the tile's keys from token `begin` on that this lane has of its row. It
// sees those before `end`.
__device__ __forceinline__ void take_weights(Shared& shared, float scale, int begin, int end,
                                             SoftmaxState& state) {
    const int row = static_cast<int>(threadIdx.x) / kRowLanes;
    const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
    if (row >= kTileRows) return;
    float score[kLanePairs][2];
    float max = negative_infinity();
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) {
        const int key = 2 * (j * kRowLanes + lane);
        score[j][0] = score[j][1] = 0.0f;
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            const float2 part = *reinterpret_cast<const float2*>(&shared.logits[slice][row][key]);
            score[j][0] += part.x;
            score[j][1] += part.y;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            score[j][i] = begin + key + i < end ? score[j][i] * scale : negative_infinity();
            max = fmaxf(max, score[j][i]);
        }
    }
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2)
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, offset));
    const float factor = softmax_raise(state, max);
    const float reference = softmax_reference(state.max);
    unsigned* const weights = reinterpret_cast<unsigned*>(shared.weights + row * kWeightChunks);
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            score[j][i] = exp2f(score[j][i] - reference);
            state.sum += score[j][i];
        }
        weights[j * kRowLanes + lane] = pack_pair(score[j]);
    }
    if (lane == 0) shared.factors[row] = factor;
}

// Step 3: add the weighted values to this warp's columns.
__device__ __forceinline__ void add_values(const Shared& shared, const uint4* tile,
                                           float (&acc)[kRowTiles][2 * kWarpPairs][4]) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
        const float factor[2] = {shared.factors[16 * m + lane / 4],
                                 shared.factors[16 * m + 8 + lane / 4]};
        rescale(acc[m], factor);
    }
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
        unsigned p[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
            ldmatrix_x4(p[m], matrix_row<kWeightChunks>(shared.weights + m * 16 * kWeightChunks,
                                                        key_tile, false));
#pragma unroll
        for (int pair = 0; pair < kWarpPairs; ++pair) {
            unsigned v[4];
            ldmatrix_x4_trans(v, matrix_row<kRowChunks>(tile + key_tile * 16 * kRowChunks,
                                                        warp * kWarpPairs + pair, false));
            const unsigned low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                mma_m16n8k16<scalar_t>(acc[m][2 * pair], p[m], low);
                mma_m16n8k16<scalar_t>(acc[m][2 * pair + 1], p[m], high);
            }
        }
    }
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads, cupaged::kMinBlocks)
    mla_attention_mma(const cupaged::MlaArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    float* __restrict__ const partials = args.partials;
    CUPAGED_DYNAMIC_SMEM(dynamic, 16);
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    __shared__ int sums[kThreads];

    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = args.num_heads;
    const int tile_heads = min(group, kTileRows);
    const RowTiles tiles{group, 1, tile_heads, kTileRows / tile_heads};
    const SplitOutput output{out,
                             lse,
                             partials,
                             nullptr,
                             args.out_token_stride,
                             args.out_head_stride,
                             args.num_heads,
                             args.value_size,
                             args.max_splits,
                             args.out_aligned != 0};
    const Batch batch{args.seq_lens,
                      args.query_start_loc,
                      args.num_seqs,
                      args.num_tokens,
                      0,
                      args.split_tokens,
                      args.max_splits,
                      static_cast<Subset>(args.subset)};
    const SharedSplits none{nullptr, nullptr, 0};
    for_each_item<kThreads>(batch, none, tiles, sums, [&](const WorkItem& item) {
        const Sequence sequence = sequence_of(batch, item.sequence);
        const SplitPlan plan = plan_splits(batch, sequence);
        const int to_position = sequence.seq_len - sequence.query_len - sequence.first_token;
        const int last_row = item.first_row + item.num_rows - 1;
        const int begin = plan.begin_of(item.split);
        const int split_end = plan.end_of(item.split);
        const Keys keys{
            {args.kv_cache, args.block_stride, 1, args.block_shift, args.key_size},
            args.block_tables + item.sequence * args.table_stride,
            args.causal ? min(split_end, to_position + last_row / group + 1) : split_end};
        // What the row of this thread's softmax sees.
        const int row = min(item.first_row + static_cast<int>(threadIdx.x) / kRowLanes, last_row);
        const int row_end = args.causal ? min(split_end, to_position + row / group + 1) : split_end;
        SoftmaxState state = softmax_empty();  // of the row; the sum of this lane's keys
        float acc[kRowTiles][2 * kWarpPairs][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int n = 0; n < 2 * kWarpPairs; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;

        __syncthreads();  // the item before is done with shared memory
        if (begin < keys.end) load_query(args, item, shared.in.query);
        const int tile_row = static_cast<int>(threadIdx.x) / kRowThreads;  // that it copies
        int token = begin + tile_row;
        int block = keys.block_of(token);
#pragma unroll 1
        for (int stage = 0; stage < kStages - 1; ++stage) {
            copy_row(keys, block, token, shared.in.tiles[stage] + tile_row * kRowChunks);
            cp_async_commit();
            token += kTileKeys;
            block = keys.block_of(token);
        }
        int stage = 0;
#pragma unroll 1
        for (int first = begin; first < keys.end; first += kTileKeys) {
            cp_async_wait<kStages - 2>();
            __syncthreads();  // the tile is there, and all are done with the one before
            const int free = stage == 0 ? kStages - 1 : stage - 1;
            copy_row(keys, block, token, shared.in.tiles[free] + tile_row * kRowChunks);
            cp_async_commit();
            token += kTileKeys;
            block = keys.block_of(token);
            const uint4* const tile = shared.in.tiles[stage];
            multiply_keys(shared, tile);
            __syncthreads();  // the logits are there
            take_weights(shared, args.query_scale, first, row_end, state);
            __syncthreads();  // the weights are there
            add_values(shared, tile, acc);
            stage = stage == kStages - 1 ? 0 : stage + 1;
        }
        cp_async_wait<0>();

#pragma unroll
        for (int offset = kRowLanes / 2; offset > 0; offset /= 2)
            state.sum += __shfl_xor_sync(kFullMask, state.sum, offset);
        if (threadIdx.x % kRowLanes == 0 && threadIdx.x / kRowLanes < kTileRows)
            shared.states[threadIdx.x / kRowLanes] = state;
        __syncthreads();  // query and tiles become the output
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int n = 0; n < 2 * kWarpPairs; ++n)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    *reinterpret_cast<float2*>(
                        &shared.out[16 * m + 8 * r + lane / 4]
                                   [(2 * kWarpPairs * warp + n) * 8 + 2 * (lane % 4)]) =
                        make_float2(acc[m][n][2 * r], acc[m][n][2 * r + 1]);
        __syncthreads();

        // Every thread takes 16 bytes of the result of one row.
        const int chunks = args.value_size / kQueryVec;
        for (int i = threadIdx.x; i < item.num_rows * chunks; i += kThreads) {
            const int index = i / chunks;
            const int element = i % chunks * kQueryVec;
            float result[kQueryVec];
#pragma unroll
            for (int j = 0; j < kQueryVec; ++j) result[j] = shared.out[index][element + j];
            const int64 out_token = (item.first_row + index) / group;
            store_split(output, out_token, batch.subset == kSingles ? item.sequence : out_token,
                        (item.first_row + index) % group, item.split, plan.count, element,
                        shared.states[index], result);
        }
    });
}
