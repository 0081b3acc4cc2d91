// Normalise rows by their root mean square, after adding them to a residual stream if there is one:
// x / sqrt(mean(x^2) + epsilon) * (weight_offset + weight).
//
//   input         [T, C], contiguous in C like all of these
//   weight        [C], in float where float_weight
//   residual      [T, C] or null: input is added to it, and x is the sum as it was rounded
//   input_weight  [C] or null: input is normalised with it before it is added
//   out           [T, C], may be input
//
// Grid (ceil(T / rows of a block)): a warp normalises a row, and a block as many as it has warps;
// with whole_block a block has one row. A thread takes every n-th chunk of 16 bytes. It keeps 4 of
// them in registers, all of a row of 16384 elements that a block has, and reads what is beyond them
// again. Static shared memory: the warps' sums, two of them because there may be two norms.
//
// Predicted, not measured yet: a block has a row of input and residual under way, 16 KB of 4096
// elements in 16 bits, which is what covers the latency of an H100's memory; and two blocks fit.
//
// Macro CUPAGED_DTYPE. Without `aligned` (16 bytes: rows, weights and C) elements are accessed one
// at a time, and nearly all of a row is read again.
#include "chunks.cuh"
#include "common.cuh"
#include "norm.cuh"
#include "vec.cuh"

namespace cupaged {

constexpr int kVec = kVecSize<scalar_t>;
constexpr int kWarps = CUPAGED_THREADS / kWarpSize;

struct RmsNormArguments {
    const scalar_t* input;
    const void* weight;
    scalar_t* residual;
    const void* input_weight;
    scalar_t* out;
    int64 input_stride;
    int64 residual_stride;
    int64 out_stride;
    int64 num_rows;
    int size;
    int whole_block;
    int float_weight;
    int aligned;
    float epsilon;
    float weight_offset;
};

// The sum over the threads that have a row.
__device__ __forceinline__ float row_sum(float x, bool whole_block, float (&sums)[kWarps]) {
    x = lanes_sum(x, kWarpSize);
    if (!whole_block) return x;
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) sums[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    return lanes_sum(lane < kWarps ? sums[lane] : 0.0f, kWarpSize);
}

// A thread's chunks of a row: every step-th from `first` on.
template <bool kAligned>
struct Chunks {
    static constexpr int kHeld = kAligned ? 4 : 1;  // in registers; few where code is long
    int first;
    int step;
    int size;  // elements of the row
    uint4 held[kHeld];

    // The elements of a chunk that are in the row.
    __device__ __forceinline__ int count(int chunk) const {
        return kAligned ? kVec : size - chunk * kVec;
    }
    __device__ __forceinline__ uint4 load_one(const scalar_t* row, int chunk) const {
        return load_chunk<kAligned>(row + chunk * kVec, count(chunk));
    }
    __device__ __forceinline__ void load(const scalar_t* row) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if ((first + i * step) * kVec < size) held[i] = load_one(row, first + i * step);
    }
    // Call function(chunk, its bytes, i) for each; those beyond the held, of i = kHeld, are in row.
    template <typename F>
    __device__ __forceinline__ void for_each(const scalar_t* row, const F& function) const {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if ((first + i * step) * kVec < size) function(first + i * step, held[i], i);
        for (int chunk = first + kHeld * step; chunk * kVec < size; chunk += step)
            function(chunk, load_one(row, chunk), kHeld);
    }
    // Replace each by what the function returns, in `target` too.
    template <typename F>
    __device__ __forceinline__ void transform(const scalar_t* row, scalar_t* target,
                                              const F& function) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if ((first + i * step) * kVec < size) held[i] = function(first + i * step, held[i], i);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int chunk = first + i * step;
            if (chunk * kVec < size)
                store_chunk<kAligned>(target + chunk * kVec, held[i], count(chunk));
        }
        for (int chunk = first + kHeld * step; chunk * kVec < size; chunk += step)
            store_chunk<kAligned>(target + chunk * kVec,
                                  function(chunk, load_one(row, chunk), kHeld), count(chunk));
    }
    __device__ __forceinline__ float squares(const scalar_t* row) const {
        float sum = 0.0f;
        for_each(row, [&](int, const uint4& raw, int) {
            float x[kVec];
            unpack<scalar_t>(raw, x);
            sum = add_squares(x, kVec, sum);
        });
        return sum;
    }
};

template <bool kAligned>
__device__ __forceinline__ void normalise_row(const RmsNormArguments& args, int64 row, int first,
                                              int step, float (&sums)[2][kWarps]) {
    const scalar_t* const input = args.input + row * args.input_stride;
    const bool has_residual = args.residual != nullptr,
               has_input_norm = args.input_weight != nullptr;
    scalar_t* const residual = has_residual ? args.residual + row * args.residual_stride : nullptr;
    const NormWeights weights{args.weight, args.float_weight != 0, args.weight_offset};
    const NormWeights input_weights{args.input_weight, args.float_weight != 0, args.weight_offset};

    Chunks<kAligned> chunks{first, step, args.size};
    chunks.load(input);
    if (has_residual) {
        uint4 added = make_uint4(0, 0, 0, 0);  // under way while the input is summed; often all
        if (first * kVec < args.size) added = chunks.load_one(residual, first);
        float inverse = 1.0f;
        if (has_input_norm) {
            const float squares = row_sum(chunks.squares(input), args.whole_block != 0, sums[0]);
            inverse = inverse_rms(squares, args.size, args.epsilon);
        }
        chunks.transform(input, residual, [&](int chunk, const uint4& raw, int i) {
            float x[kVec], sum[kVec];
            unpack<scalar_t>(raw, x);
            unpack<scalar_t>(i == 0 ? added : chunks.load_one(residual, chunk), sum);
            if (has_input_norm) {
                float weight[kVec];
                input_weights.load<kAligned, scalar_t>(chunk * kVec, chunks.count(chunk), weight);
#pragma unroll
                for (int j = 0; j < kVec; ++j) sum[j] = fmaf(x[j] * inverse, weight[j], sum[j]);
            } else {
#pragma unroll
                for (int j = 0; j < kVec; ++j) sum[j] += x[j];
            }
            return pack<scalar_t>(sum);
        });
    }
    const scalar_t* const source = has_residual ? residual : input;
    const float squares = row_sum(chunks.squares(source), args.whole_block != 0, sums[1]);
    const float inverse = inverse_rms(squares, args.size, args.epsilon);
    chunks.transform(
        source, args.out + row * args.out_stride, [&](int chunk, const uint4& raw, int) {
            float x[kVec], weight[kVec];
            unpack<scalar_t>(raw, x);
            weights.load<kAligned, scalar_t>(chunk * kVec, chunks.count(chunk), weight);
#pragma unroll
            for (int j = 0; j < kVec; ++j) x[j] = x[j] * inverse * weight[j];
            return pack<scalar_t>(x);
        });
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS)
    rms_norm(const __grid_constant__ cupaged::RmsNormArguments args) {
    using namespace cupaged;
    __shared__ float sums[2][kWarps];
    const int warp = threadIdx.x / kWarpSize;
    const bool whole = args.whole_block != 0;
    const int64 row = whole ? blockIdx.x : static_cast<int64>(blockIdx.x) * kWarps + warp;
    if (row >= args.num_rows) return;  // no warp of a block that has to wait for it
    const int first = whole ? threadIdx.x : threadIdx.x % kWarpSize;
    const int step = whole ? CUPAGED_THREADS : kWarpSize;
    if (args.aligned)
        normalise_row<true>(args, row, first, step, sums);
    else
        normalise_row<false>(args, row, first, step, sums);
}
