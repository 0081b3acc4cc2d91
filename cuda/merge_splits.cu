// The second half of decode: merge the pieces that paged_decode divided a sequence into.
//
//   partial_out  float32 [S, H, max_splits, D]    out  [S, H, D]
//   partial_lse  float32 [S, H, max_splits]       lse  float32 [S, H] or null, natural logarithms
//   seq_lens     int32 [S]
//   sinks        float32 [H] or null
//
// One thread merges 8 elements of one row (sequence and head); grid (ceil(S * H * D / 8 / 128)).
// Sequences of one piece or none were finished by paged_decode. No shared memory.
//
// Macro CUPAGED_DTYPE. D is a multiple of 8.
#include "common.cuh"
#include "merge.cuh"
#include "splits.cuh"

extern "C" __global__ void __launch_bounds__(128, 4)
    merge_splits(const float* __restrict__ partial_out, const float* __restrict__ partial_lse,
                 const int* __restrict__ seq_lens, const float* __restrict__ sinks,
                 scalar_t* __restrict__ out, float* __restrict__ lse, cupaged::int64 out_seq_stride,
                 cupaged::int64 out_head_stride, int num_seqs, int num_heads, int head_size,
                 int window, int max_splits, int aligned) {
    using namespace cupaged;
    const int64 index = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int threads_per_row = head_size / kMergeElems;
    const int64 row = index / threads_per_row;
    const int element = static_cast<int>(index % threads_per_row) * kMergeElems;
    if (row >= static_cast<int64>(num_seqs) * num_heads) return;
    const int64 seq = row / num_heads;
    const int head = static_cast<int>(row % num_heads);
    const int count = plan_splits(seq_lens[seq], window, max_splits).count;
    if (count <= 1) return;

    const StateRow<float> states{partial_out + row * max_splits * head_size,
                                 partial_lse + row * max_splits,
                                 head_size,
                                 1,
                                 count,
                                 1.0f};
    float result[kMergeElems];
    SoftmaxState merged = merge_row(states, element, true, result);
    float factor = 1.0f;
    if (sinks != nullptr) factor = softmax_add_sink(merged, sinks[head] * kLog2E);
    store_row(out + seq * out_seq_stride + head * out_head_stride + element, aligned, result,
              factor * softmax_normaliser(merged));
    if (lse != nullptr && element == 0) lse[row] = softmax_lse_log2(merged) * kLn2;
}
