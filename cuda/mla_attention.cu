// Multi-head latent attention over the paged cache, on CUDA cores: float32, and GPUs without
// bfloat16 tensor cores. mla_attention_mma.cu serves the rest.
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
// once for both.
//
// A work item (work.cuh) is a tile of kTileRows query heads of one query token, or of several
// tokens where there are fewer heads, and one KV split of its sequence. Each warp has kWarpRows of
// the rows to itself. A row of the cache is spread over the lanes, 16 bytes each at a time; the
// warps of a block read the same rows, which come from the L1 cache but for the first. No shared
// memory but 0.5 KiB of the planner.
//
// Macros CUPAGED_DTYPE, CUPAGED_KEY_SIZE and CUPAGED_VALUE_SIZE: what Dk and Dv, multiples of 8,
// are at most.
#include "common.cuh"
#include "mla_arguments.cuh"
#include "paged.cuh"
#include "softmax.cuh"
#include "split_output.cuh"
#include "vec.cuh"
#include "work.cuh"

namespace cupaged {

constexpr int kThreads = CUPAGED_THREADS;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVec = kVecSize<scalar_t>;
constexpr int kTileRows = CUPAGED_TILE_ROWS;
constexpr int kWarpRows = kTileRows / kWarps;
constexpr int kUnroll = 2;  // keys at once
// 16-byte chunks of a row that a lane holds, and those of them that may belong to the value.
constexpr int kChunks = ceil_div(CUPAGED_KEY_SIZE / kVec, kWarpSize);
constexpr int kValueChunks = ceil_div(CUPAGED_VALUE_SIZE / kVec, kWarpSize);

// The element of a row that a lane's chunk begins with.
__device__ __forceinline__ int element_of(int chunk) {
    return (chunk * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize) * kVec;
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(cupaged::kThreads, 3)
    mla_attention(const cupaged::MlaArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    float* __restrict__ const partials = args.partials;
    __shared__ int sums[kThreads];

    const int group = args.num_heads;
    const int tile_heads = min(group, kTileRows);
    const RowTiles tiles{group, 1, tile_heads, kTileRows / tile_heads};
    const PagedCache<const scalar_t> cache{args.kv_cache, args.block_stride, 1, args.block_shift,
                                           args.key_size};
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
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    for_each_item<kThreads>(batch, none, tiles, sums, [&](const WorkItem& item) {
        const int first_row = warp * kWarpRows;  // of this warp
        if (first_row >= item.num_rows) return;
        const Sequence sequence = sequence_of(batch, item.sequence);
        const SplitPlan plan = plan_splits(batch, sequence);
        const int to_position = sequence.seq_len - sequence.query_len - sequence.first_token;
        const int* const table = args.block_tables + item.sequence * args.table_stride;

        int token[kWarpRows], head[kWarpRows];
        float q[kWarpRows][kChunks][kVec], acc[kWarpRows][kValueChunks][kVec];
        SoftmaxState state[kWarpRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            const int row = item.first_row + min(first_row + r, item.num_rows - 1);
            token[r] = row / group;
            head[r] = row % group;
            state[r] = softmax_empty();
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int element = element_of(c);
                uint4 raw = make_uint4(0, 0, 0, 0);
                if (element < args.key_size)
                    raw = load_vec(args.query + token[r] * args.query_token_stride +
                                       head[r] * args.query_head_stride + element,
                                   args.query_aligned);
                unpack<scalar_t>(raw, q[r][c]);
#pragma unroll
                for (int i = 0; i < kVec; ++i) q[r][c][i] *= args.query_scale;
            }
#pragma unroll
            for (int c = 0; c < kValueChunks; ++c)
#pragma unroll
                for (int i = 0; i < kVec; ++i) acc[r][c][i] = 0.0f;
        }

        const int last_position = to_position + token[kWarpRows - 1];  // the largest of the rows
        const int end =
            args.causal ? min(plan.end_of(item.split), last_position + 1) : plan.end_of(item.split);
        for (int begin = plan.begin_of(item.split); begin < end; begin += kUnroll) {
            uint4 key[kUnroll][kChunks];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int position = begin + u;
                const scalar_t* source = cache.data;
                if (position < end)
                    source = cache.key(table[cache.table_index(position)], 0,
                                       cache.offset_in_block(position));
#pragma unroll
                for (int c = 0; c < kChunks; ++c) {
                    const int element = element_of(c);
                    key[u][c] = make_uint4(0, 0, 0, 0);
                    if (position < end && element < args.key_size)
                        key[u][c] = load_vec(source + element, true);
                }
            }
            float score[kWarpRows][kUnroll];
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) score[r][u] = 0.0f;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
                for (int c = 0; c < kChunks; ++c) {
                    float k[kVec];
                    unpack<scalar_t>(key[u][c], k);
#pragma unroll
                    for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
                        for (int i = 0; i < kVec; ++i)
                            score[r][u] = fmaf(q[r][c][i], k[i], score[r][u]);
                }
#pragma unroll
                for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
                    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
                        score[r][u] += __shfl_xor_sync(kFullMask, score[r][u], offset);
                    const bool visible =
                        begin + u < end && (!args.causal || begin + u <= to_position + token[r]);
                    if (!visible) score[r][u] = negative_infinity();
                }
            }
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
                float max = score[r][0];
#pragma unroll
                for (int u = 1; u < kUnroll; ++u) max = fmaxf(max, score[r][u]);
                const float factor = softmax_raise(state[r], max);
                const float reference = softmax_reference(state[r].max);
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    score[r][u] = exp2f(score[r][u] - reference);
                    state[r].sum += score[r][u];
                }
#pragma unroll
                for (int c = 0; c < kValueChunks; ++c)
#pragma unroll
                    for (int i = 0; i < kVec; ++i) acc[r][c][i] *= factor;
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
#pragma unroll
                for (int c = 0; c < kValueChunks; ++c) {
                    float value[kVec];
                    unpack<scalar_t>(key[u][c], value);
#pragma unroll
                    for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
                        for (int i = 0; i < kVec; ++i)
                            acc[r][c][i] = fmaf(score[r][u], value[i], acc[r][c][i]);
                }
        }

#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            if (first_row + r >= item.num_rows) continue;
            const int64 slot = batch.subset == kSingles ? item.sequence : token[r];
#pragma unroll
            for (int c = 0; c < kValueChunks; ++c)
                if (element_of(c) < args.value_size)
                    store_split(output, token[r], slot, head[r], item.split, plan.count,
                                element_of(c), state[r], acc[r][c]);
        }
    });
}
