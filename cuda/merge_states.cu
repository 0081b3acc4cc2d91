// Merge N attentions of the same queries over disjoint keys.
//
//   outs  [N, T, H, D]         out  [T, H, D]
//   lses  float32 [N, T, H]    lse  float32 [T, H], natural logarithms; -inf marks an empty state
//
// One thread merges 8 elements of one row (token and head), so a row takes D / 8 threads; grid
// (ceil(T * H * D / 8 / 128)). No shared memory.
//
// Macro CUPAGED_DTYPE. D is a multiple of 8.
#include "common.cuh"
#include "merge.cuh"

namespace cupaged {

struct MergeStatesArguments {
    const scalar_t* outs;
    const float* lses;
    scalar_t* out;
    float* lse;
    int64 num_rows;
    int num_states;
    int head_size;
    int aligned;
};

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS, 4)
    merge_states(const __grid_constant__ cupaged::MergeStatesArguments args) {
    using namespace cupaged;
    scalar_t* __restrict__ const out = args.out;
    float* __restrict__ const lse = args.lse;
    const int64 index = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int threads_per_row = args.head_size / kMergeElems;
    const int64 row = index / threads_per_row;
    const int element = static_cast<int>(index % threads_per_row) * kMergeElems;
    if (row >= args.num_rows) return;

    const StateRow<scalar_t> states{args.outs + row * args.head_size,
                                    args.lses + row,
                                    args.num_rows * args.head_size,
                                    args.num_rows,
                                    args.num_states,
                                    kLog2E};
    float result[kMergeElems];
    const SoftmaxState merged = merge_row(states, element, args.aligned, result);
    store_row(out + row * args.head_size + element, args.aligned, result,
              softmax_normaliser(merged));
    if (element == 0)
        lse[row] = softmax_is_empty(merged) ? merged.max : merged.max + logf(merged.sum);
}
