// Merge the KV splits of sequences: the second kernel of decode, and of prefill with KV splits.
//
//   partials         float32 [N, H, max_splits, D + 4]: output and lse (base 2) of a KV split
//   seq_lens         int32 [S]                       out  [T, H, D]
//   query_start_loc  int32 [S + 1] or null: one      lse  float32 [T, H] or null, natural
//                    query token a sequence               logarithms
//   split_size       int32 [1] or null: the size of KV splits where it was chosen on the device
//   sinks            float32 [H] or null
//
// One thread merges 8 elements of one row (token and head); grid (ceil(N * H * D / 8 / 128)). N is
// T, or S with kSingles, where sequences have one query token or none of their rows is ours.
// Sequences with at most one KV split are skipped: their output is complete. No shared memory.
//
// Macro CUPAGED_DTYPE. D is a multiple of 8.
#include "common.cuh"
#include "split_output.cuh"
#include "merge.cuh"
#include "work.cuh"

namespace cupaged {

struct MergeSplitsArguments {
    const float* partials;
    const int* seq_lens;
    const int* query_start_loc;
    const int* split_size;
    const float* sinks;
    scalar_t* out;
    float* lse;
    int64 out_token_stride;
    int64 out_head_stride;
    int num_tokens;
    int num_seqs;
    int num_heads;
    int head_size;
    int window;
    int split_tokens;
    int max_splits;
    int subset;
    int aligned;
};

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS, 4)
    merge_splits(const __grid_constant__ cupaged::MergeSplitsArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    const int64 index = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int threads_per_row = args.head_size / kMergeElems;
    const int64 row = index / threads_per_row;
    const int element = static_cast<int>(index % threads_per_row) * kMergeElems;
    const bool singles = args.subset == kSingles;
    if (row >= static_cast<int64>(singles ? args.num_seqs : args.num_tokens) * args.num_heads)
        return;
    const int slot = static_cast<int>(row / args.num_heads);
    const int head = static_cast<int>(row % args.num_heads);
    const Batch batch{
        args.seq_lens,   args.query_start_loc,
        args.num_seqs,   args.num_tokens,
        args.window,     args.split_size != nullptr ? *args.split_size : args.split_tokens,
        args.max_splits, static_cast<Subset>(args.subset)};
    const Sequence sequence = sequence_of(batch, singles ? slot : sequence_of_token(batch, slot));
    if (!is_ours(batch, sequence.query_len)) return;
    const int token = singles ? sequence.first_token : slot;
    const int count = plan_splits(batch, sequence).count;
    if (count <= 1) return;

    const int stride = partial_stride(args.head_size);
    const float* const first = args.partials + row * args.max_splits * stride;
    const StateRow<float> states{first, first + args.head_size, stride, stride, count, 1.0f};
    float result[kMergeElems];
    SoftmaxState merged = merge_row(states, element, true, result);
    float factor = 1.0f;
    if (args.sinks != nullptr && !softmax_is_empty(merged))
        factor = softmax_add_sink(merged, args.sinks[head] * kLog2E);
    store_row(out + token * args.out_token_stride + head * args.out_head_stride + element,
              args.aligned, result, factor * softmax_normaliser(merged));
    if (lse != nullptr && element == 0)
        lse[static_cast<int64>(token) * args.num_heads + head] = softmax_lse_log2(merged) * kLn2;
}
