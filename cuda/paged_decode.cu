// Attention of a few query tokens a sequence over its paged cache, on CUDA cores: float32, and GPUs
// without bfloat16 tensor cores. paged_decode_mma.cu serves the rest.
//
//   query            [T, H, D], contiguous in D         out  the same
//   kv_cache         [num_blocks, 2, Hkv, B, D]         lse  float32 [T, H] or null
//   block_tables     int32 [S, max_blocks]
//   seq_lens         int32 [S]
//   query_start_loc  int32 [S + 1], or null: T = S, one query token a sequence. With kSingles the
//                    sequences of one query token are computed, and no other row is written.
//   k_scale, v_scale  float32 [Hkv], null where the cache is not quantised
//   partials         workspace of the KV splits, see merge_splits.cu
//   split_size       int32 [1] or null: where the size of KV splits is left for merge_splits
//
// A work item (work.cuh) is one KV head, a tile of G = CUPAGED_HEAD_TILE of its query heads, one
// query token, and one KV split of its sequence: the keys and values read serve all G heads. The
// blocks of the grid (x) go round the items, so that any number of blocks will do.
//
// A row of D elements is spread over kLanes lanes of a warp, 16 bytes each (twice, if 32 lanes do
// not reach), so a warp holds kRows tokens side by side; its 4 warps and kUnroll steps take their
// turns. Each lane group keeps its own softmax state and sum of values per head; they are merged at
// the end, in the warp by shuffles, between warps through shared memory.
//
// Each lane copies what it will itself read, so the pipeline of kStages asynchronous copies needs
// no barrier. Shared memory: 32 KiB of stages (reused for the merge) + 1 KiB of block ids + 0.5 KiB
// of the planner + 0.3 KiB.
//
// The scales of a quantised cache become factors of the query and of the output.
//
// Macros CUPAGED_DTYPE, CUPAGED_CACHE_DTYPE, CUPAGED_HEAD_SIZE (D, a multiple of 8, or of 16 with a
// quantised cache, at most 256), CUPAGED_HEAD_TILE (at most 4 with a quantised cache, where a lane
// holds twice the elements).
#include "common.cuh"
#include "attention_arguments.cuh"
#include "split_output.cuh"
#include "paged.cuh"
#include "ptx.cuh"
#include "quant.cuh"
#include "softmax.cuh"
#include "vec.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kHeadSize = CUPAGED_HEAD_SIZE;
constexpr int kHeadTile = CUPAGED_HEAD_TILE;
constexpr int kThreads = CUPAGED_THREADS;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVec = kVecSize<cache_t>;
constexpr int kQueryVec = kVecSize<scalar_t>;
constexpr int kChunks = kHeadSize / kVec;  // 16-byte chunks of a row
constexpr int kLanes = kChunks < kWarpSize ? next_power_of_two(kChunks) : kWarpSize;
constexpr int kChunksPerLane = ceil_div(kChunks, kLanes);
constexpr int kElems = kChunksPerLane * kVec;  // elements of a row that a lane holds
constexpr int kRows = kWarpSize / kLanes;
constexpr int kUnroll = 2;
constexpr int kStepTokens = kUnroll * kWarps * kRows;  // tokens of one step of the whole block
constexpr int kStages = kChunksPerLane == 1 ? 4 : 2;
// Blocks of a multiprocessor that registers allow for. Without it ptxas aims at a round number of
// registers and spills a few.
constexpr int kMinBlocks = kHeadTile == 1                          ? 5
                           : kHeadTile == 2                        ? 4
                           : kHeadTile == 4 && sizeof(cache_t) > 1 ? 3
                                                                   : 2;
// Block IDs in shared memory; longer KV splits are done in several runs.
constexpr int kMaxIds = 256;

union Shared {
    uint4 stages[kStages][kUnroll][2][kChunksPerLane][kThreads];  // 2: key, value
    float warp_out[kWarps][kHeadTile][kHeadSize];
};
static_assert(sizeof(Shared) <= 32 * 1024, "shared memory as said at the head of the file");

struct Accumulator {
    SoftmaxState state[kHeadTile];
    float out[kHeadTile][kElems];
};

__device__ __forceinline__ int lane_in_row() {
    return threadIdx.x % kLanes;
}

// This lane's token in step `step`, counted from the start of the run.
__device__ __forceinline__ int token_of(int step, int u) {
    return step * kStepTokens + u * (kWarps * kRows) + threadIdx.x / kLanes;
}

// Begin copying this lane's parts of the keys and values of one step. Beyond the run, and in lanes
// beyond D, they become zeros.
__device__ __forceinline__ void copy_step(const PagedCache<const cache_t>& cache, const int* ids,
                                          int first_index, int kv_head, int begin, int tokens,
                                          int step, uint4 (*stage)[2][kChunksPerLane][kThreads]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const int t = token_of(step, u);
        const cache_t* key = cache.data;
        if (t < tokens) {
            const int token = begin + t;
            key = cache.key(ids[cache.table_index(token) - first_index], kv_head,
                            cache.offset_in_block(token));
        }
#pragma unroll
        for (int c = 0; c < kChunksPerLane; ++c) {
            const int chunk = c * kLanes + lane_in_row();
            const bool valid = t < tokens && chunk < kChunks;
            const cache_t* const source = valid ? key + chunk * kVec : cache.data;
            const int64 to_value = valid ? cache.value_offset() : 0;
            cp_async_16_zfill(&stage[u][0][c][threadIdx.x], source, valid);
            cp_async_16_zfill(&stage[u][1][c][threadIdx.x], source + to_value, valid);
        }
    }
}

struct Logits {
    float soft_cap_log2;  // in units of log2(e), 0 for none
    float slope_log2[kHeadTile];
    int query_position;
};

// Add the keys and values of one step to the accumulator.
__device__ __forceinline__ void attend_step(const float (*query)[kElems], const Logits& logits,
                                            int begin, int tokens, int step,
                                            const uint4 (*stage)[2][kChunksPerLane][kThreads],
                                            Accumulator& acc) {
    float score[kUnroll][kHeadTile];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) score[u][g] = 0.0f;
#pragma unroll
        for (int c = 0; c < kChunksPerLane; ++c) {
            float key[kVec];
            unpack<cache_t>(stage[u][0][c][threadIdx.x], key);
#pragma unroll
            for (int g = 0; g < kHeadTile; ++g)
#pragma unroll
                for (int i = 0; i < kVec; ++i) score[u][g] += query[g][c * kVec + i] * key[i];
        }
        const int t = token_of(step, u);
        const float distance = static_cast<float>(begin + t - logits.query_position);
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) {
            float s = score[u][g];
#pragma unroll
            for (int offset = kLanes / 2; offset > 0; offset /= 2)
                s += __shfl_xor_sync(kFullMask, s, offset);
            if (logits.soft_cap_log2 > 0.0f) s = logits.soft_cap_log2 * tanh_by_exp2(s);
            s += logits.slope_log2[g] * distance;
            score[u][g] = t < tokens ? s : negative_infinity();
        }
    }
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
        float max = score[0][g];
#pragma unroll
        for (int u = 1; u < kUnroll; ++u) max = fmaxf(max, score[u][g]);
        const float factor = softmax_raise(acc.state[g], max);
        const float reference = softmax_reference(acc.state[g].max);
#pragma unroll
        for (int i = 0; i < kElems; ++i) acc.out[g][i] *= factor;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            score[u][g] = exp2f(score[u][g] - reference);
            acc.state[g].sum += score[u][g];
        }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int c = 0; c < kChunksPerLane; ++c) {
            float value[kVec];
            unpack<cache_t>(stage[u][1][c][threadIdx.x], value);
#pragma unroll
            for (int g = 0; g < kHeadTile; ++g)
#pragma unroll
                for (int i = 0; i < kVec; ++i) acc.out[g][c * kVec + i] += score[u][g] * value[i];
        }
}

// Merge the lane groups of a warp; every group ends with the same sum.
__device__ __forceinline__ void merge_lane_groups(Accumulator& acc) {
#pragma unroll
    for (int offset = kLanes; offset < kWarpSize; offset *= 2)
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) {
            const SoftmaxState other{__shfl_xor_sync(kFullMask, acc.state[g].max, offset),
                                     __shfl_xor_sync(kFullMask, acc.state[g].sum, offset)};
            const float2 factors = softmax_merge(acc.state[g], other);
#pragma unroll
            for (int i = 0; i < kElems; ++i) {
                const float out = __shfl_xor_sync(kFullMask, acc.out[g][i], offset);
                acc.out[g][i] = acc.out[g][i] * factors.x + out * factors.y;
            }
        }
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads, cupaged::kMinBlocks)
    paged_decode(const cupaged::DecodeArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    float* __restrict__ const partials = args.partials;
    int* __restrict__ const split_size = args.split_size;
    __shared__ Shared shared;
    __shared__ int ids[kMaxIds];
    __shared__ int sums[kThreads];
    __shared__ SoftmaxState warp_state[kWarps][kHeadTile];

    const int group = args.num_heads / args.num_kv_heads;
    const PagedCache<const cache_t> cache{args.kv_cache, args.block_stride, args.num_kv_heads,
                                          args.block_shift, kHeadSize};
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
    const RowTiles tiles{group, args.num_kv_heads, kHeadTile, 1};
    balance_splits<kThreads>(batch, tiles, split_size, sums);

    const SharedSplits none{nullptr, nullptr, 0};
    for_each_item<kThreads>(batch, none, tiles, sums, [&](const WorkItem& item) {
        const Sequence sequence = sequence_of(batch, item.sequence);
        const SplitPlan plan = plan_splits(batch, sequence);
        const int64 token = item.first_row / group;
        const int position =
            sequence.seq_len - sequence.query_len + item.first_row / group - sequence.first_token;
        const int kv_head = item.kv_head;
        const int first_head = kv_head * group + item.first_row % group;
        const int heads = item.num_rows;  // of this tile that exist
        const int* const table = args.block_tables + item.sequence * args.table_stride;

        const float key_factor = args.query_scale * unpacked_factor(args.k_scale, kv_head);
        const float value_factor = unpacked_factor(args.v_scale, kv_head);
        float q[kHeadTile][kElems];
        Logits logits;
        logits.soft_cap_log2 = args.soft_cap_log2;
        logits.query_position = position;
        Accumulator acc;
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) {
            logits.slope_log2[g] = args.alibi_slopes != nullptr && g < heads
                                       ? args.alibi_slopes[first_head + g] * kLog2E
                                       : 0.0f;
#pragma unroll
            for (int c = 0; c < kChunksPerLane; ++c) {
                const int chunk = c * kLanes + lane_in_row();
#pragma unroll
                for (int i = 0; i < kVec; i += kQueryVec) {
                    uint4 raw = make_uint4(0, 0, 0, 0);
                    if (g < heads && chunk < kChunks)
                        raw = load_vec(args.query + token * args.query_token_stride +
                                           (first_head + g) * args.query_head_stride +
                                           chunk * kVec + i,
                                       args.query_aligned);
                    unpack<scalar_t>(raw, &q[g][c * kVec + i]);
                }
            }
#pragma unroll
            for (int i = 0; i < kElems; ++i) q[g][i] *= key_factor;
            acc.state[g] = softmax_empty();
#pragma unroll
            for (int i = 0; i < kElems; ++i) acc.out[g][i] = 0.0f;
        }

        // What this token sees of the KV split.
        const int first = args.window > 0
                              ? max(plan.begin_of(item.split), position - args.window + 1)
                              : plan.begin_of(item.split);
        const int end =
            args.causal ? min(plan.end_of(item.split), position + 1) : plan.end_of(item.split);
        // Tokens whose blocks fit in ids at any offset.
        const int max_run = (kMaxIds - 1) << args.block_shift;
        for (int begin = first; begin < end; begin += max_run) {
            const int tokens = min(end - begin, max_run);
            const int first_index = cache.table_index(begin);
            const int last_index = cache.table_index(begin + tokens - 1);
            __syncthreads();  // the run before is done with ids, the item before with shared
            for (int i = threadIdx.x; i <= last_index - first_index; i += kThreads)
                ids[i] = table[first_index + i];
            __syncthreads();

            const int steps = (tokens + kStepTokens - 1) / kStepTokens;
#pragma unroll
            for (int step = 0; step < kStages - 1; ++step) {
                copy_step(cache, ids, first_index, kv_head, begin, tokens, step,
                          shared.stages[step]);
                cp_async_commit();
            }
            for (int step = 0; step < steps; ++step) {
                const int ahead = step + kStages - 1;
                copy_step(cache, ids, first_index, kv_head, begin, tokens, ahead,
                          shared.stages[ahead % kStages]);
                cp_async_commit();
                cp_async_wait<kStages - 1>();
                attend_step(q, logits, begin, tokens, step, shared.stages[step % kStages], acc);
            }
            cp_async_wait<0>();
        }

        merge_lane_groups(acc);
        __syncthreads();  // the stages become warp_out
        const int warp = threadIdx.x / kWarpSize;
        if (threadIdx.x % kWarpSize < kLanes) {
#pragma unroll
            for (int g = 0; g < kHeadTile; ++g) {
                if (lane_in_row() == 0) warp_state[warp][g] = acc.state[g];
#pragma unroll
                for (int c = 0; c < kChunksPerLane; ++c) {
                    const int chunk = c * kLanes + lane_in_row();
                    if (chunk < kChunks)
#pragma unroll
                        for (int i = 0; i < kVec; ++i)
                            shared.warp_out[warp][g][chunk * kVec + i] = acc.out[g][c * kVec + i];
                }
            }
        }
        __syncthreads();

        // Every thread takes 16 bytes of the result of one head.
        constexpr int kQueryChunks = kHeadSize / kQueryVec;
        for (int i = threadIdx.x; i < heads * kQueryChunks; i += kThreads) {
            const int g = i / kQueryChunks;
            const int element = i % kQueryChunks * kQueryVec;
            float result[kQueryVec];
            const SoftmaxState state =
                merge_warps<kWarps>(&warp_state[0][g], kHeadTile, &shared.warp_out[0][g][element],
                                    kHeadTile * kHeadSize, result);
#pragma unroll
            for (int j = 0; j < kQueryVec; ++j) result[j] *= value_factor;
            store_split(output, token, batch.subset == kSingles ? item.sequence : token,
                        first_head + g, item.split, plan.count, element, state, result);
        }
    });
}
