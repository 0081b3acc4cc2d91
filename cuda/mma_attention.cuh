// Attention of tiles of 16 query rows over keys and values in shared memory, on tensor cores.
//
// The stride between rows in shared memory is an odd number of 16-byte chunks, so that the 8 rows
// of an ldmatrix matrix are in different banks. The first product leaves the logits in the
// registers in which the second takes the rows of P.
//
// The codes of a quantised cache are converted to fp16 in registers: the tensor cores multiply
// fp16, and the scales are factors of logits and outputs. A matrix of 8 rows of 16 bytes is then
// 8x16 codes. Of each 4 codes of a key in a lane, the product takes the first two as elements of
// the first half of the 16 and the others as elements of the second half: the order within a dot
// product is free, and the query is stored in the same order. Of the values a lane has 2 keys at 2
// neighbouring elements: the even and the odd elements form two matrices.
//
// Macros CUPAGED_DTYPE (fp16 or bf16), CUPAGED_CACHE_DTYPE (quant.cuh), CUPAGED_HEAD_SIZE (D, a
// multiple of 8, or of 16 with a quantised cache, at most 256).
#pragma once

#include "common.cuh"
#include "ptx.cuh"
#include "quant.cuh"
#include "softmax.cuh"
#include "vec.cuh"

namespace cupaged {

constexpr int kHeadSize = CUPAGED_HEAD_SIZE;
constexpr int kVec = kVecSize<cache_t>;
constexpr int kChunks = kHeadSize / kVec;              // 16-byte chunks of a row of the cache
constexpr int kTileChunks = 2 * ceil_div(kChunks, 2);  // beyond kChunks they are zeros
constexpr int kRowChunks = kTileChunks + 1;            // from row to row in shared memory
constexpr int kSteps = kTileChunks * kVec / 16;        // of 16 elements
constexpr int kQueryVec = kVecSize<scalar_t>;
constexpr int kQueryChunks = kHeadSize / kQueryVec;  // of a row of the query
constexpr int kQueryTileChunks = 2 * kSteps;         // beyond kQueryChunks they are zeros
constexpr int kQueryRowChunks = kQueryTileChunks + 1;

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

// Put a chunk of a query row into shared memory, in the order that the keys' codes come in.
__device__ __forceinline__ void store_query(uint4* row, int chunk, const uint4& raw) {
#ifdef CUPAGED_CACHE_DTYPE
    constexpr float kLargest = 65504.0f;  // in fp16
    float x[kQueryVec];
    unpack<scalar_t>(raw, x);
#pragma unroll
    for (int j = 0; j < kQueryVec; ++j) x[j] = fminf(fmaxf(x[j], -kLargest), kLargest);
    unsigned* const words = reinterpret_cast<unsigned*>(row + chunk / 2 * 2);
#pragma unroll
    for (int j = 0; j < kQueryVec; j += 2) {
        const int pair = 4 * (chunk % 2) + j / 2;  // of the 8 pairs of 16 elements
        words[pair / 2 + 4 * (pair % 2)] = pack_pair(x + j);
    }
#else
    row[chunk] = raw;
#endif
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
template <int kTiles>
struct AccumulatorOf {
    SoftmaxState state[2];  // of the rows; the maximum of the row, the sum of this lane's keys
    float out[kTiles][4];
};
using Accumulator = AccumulatorOf<2 * kSteps>;

template <int kTiles>
__device__ __forceinline__ void clear(AccumulatorOf<kTiles>& acc) {
    acc.state[0] = acc.state[1] = softmax_empty();
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc.out[n][i] = 0.0f;
}

// What the logits of all rows have in common.
struct Logits {
    float scale;                        // in units of log2(e), of the products
    float soft_cap_log2;                // 0 for none
    int first_position, last_position;  // of the rows
    int window;                         // 0 for none
    bool causal;
    bool has_slopes;

    // What is left to multiply after form_logits: the scale, where nothing comes before the
    // softmax, which takes it in one operation with the maximum.
    __device__ __forceinline__ float scale_left() const {
        return soft_cap_log2 > 0.0f || has_slopes || scale <= 0.0f ? 1.0f : scale;
    }
};

// The logits of a kernel, but for the positions; `scale` includes what unpacked keys are to be
// multiplied by.
template <typename Arguments>
__device__ __forceinline__ Logits logits_of(const Arguments& args, float scale) {
    Logits logits;
    logits.scale = scale;
    logits.soft_cap_log2 = args.soft_cap_log2;
    logits.window = args.window;
    logits.causal = args.causal;
    logits.has_slopes = args.alibi_slopes != nullptr;
    return logits;
}

// The positions of a lane's two rows.
struct RowPositions {
    int row[2];
};

// Logits of kTiles * 16 keys from token `begin` on, masked, in place of the products, but for a
// factor of scale_left(). slope_log2(r) is asked for where has_slopes says so: in registers the
// slopes would be in the way of all others.
template <int kTiles, typename Slope>
__device__ __forceinline__ void form_logits(const Logits& logits, const RowPositions& positions,
                                            Slope slope_log2, int begin, int end,
                                            float (&score)[2 * kTiles][4]) {
    const int t = threadIdx.x % 4;
    if (logits.scale_left() == 1.0f) {
#pragma unroll
        for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[n][i] *= logits.scale;
    }
    if (logits.soft_cap_log2 > 0.0f) {
#pragma unroll
        for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                score[n][i] = logits.soft_cap_log2 * tanh_by_exp2(score[n][i]);
    }
    if (logits.has_slopes) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float slope = slope_log2(r);
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    score[n][2 * r + i] +=
                        slope * static_cast<float>(begin + 8 * n + 2 * t + i - positions.row[r]);
        }
    }
    const int last = begin + 16 * kTiles - 1;
    const bool all_visible = last < end && (!logits.causal || last <= logits.first_position) &&
                             (logits.window <= 0 || begin > logits.last_position - logits.window);
    if (all_visible) return;
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = begin + 8 * n + 2 * t + i % 2;
            const int distance = key - positions.row[i / 2];
            const bool visible = key < end && (!logits.causal || distance <= 0) &&
                                 (logits.window <= 0 || -distance < logits.window);
            if (!visible) score[n][i] = negative_infinity();
        }
}

// The logits, each times scale_left, become the terms of the softmax, and the states take them in.
// What was accumulated before is to be rescaled by the factors.
template <int kTiles>
__device__ __forceinline__ void take_softmax(float (&score)[2 * kTiles][4], float scale_left,
                                             SoftmaxState (&state)[2], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float max = negative_infinity();
#pragma unroll
        for (int n = 0; n < 2 * kTiles; ++n)
            max = fmaxf(max, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, 2));
        factor[r] = softmax_raise(state[r], max * scale_left);
        const float reference = softmax_reference(state[r].max);
#pragma unroll
        for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
                score[n][i] = exp2f(fmaf(score[n][i], scale_left, -reference));
                state[r].sum += score[n][i];
            }
    }
}

template <int kTiles>
__device__ __forceinline__ void rescale(float (&out)[kTiles][4], const float (&factor)[2]) {
    // The maximum seldom changes after the first tiles.
    if (__any_sync(kFullMask, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
    }
}

// Add kTiles * 16 keys and values, from token `begin` on, to kRows tiles of 16 rows each. The rows
// of the query lie in shared memory, or already in registers. slope_log2(m, r): of a lane's rows of
// tile m.
template <int kRows, int kTiles, bool kQueryInRegisters, typename Slope>
__device__ __forceinline__ void attend(const unsigned (*query_registers)[4], const uint4* query,
                                       const uint4* keys, const uint4* values, const Logits& logits,
                                       const RowPositions (&positions)[kRows], Slope slope_log2,
                                       int begin, int end, Accumulator (&acc)[kRows]) {
    float score[kRows][2 * kTiles][4] = {};
    constexpr int kPairSteps = kQuantised ? 2 : 1;
#pragma unroll
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
        unsigned q[kRows][kPairSteps][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int i = 0; i < kPairSteps; ++i) {
                const int step = pair * kPairSteps + i;
                if (kQueryInRegisters) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) q[r][i][j] = query_registers[r * kSteps + step][j];
                } else {
                    load_query_step(q[r][i], query + r * 16 * kQueryRowChunks, step);
                }
            }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            unsigned k[4];
            ldmatrix_x4(k, matrix_row<kRowChunks>(keys + tile * 16 * kRowChunks, pair, true));
#pragma unroll
            for (int i = 0; i < kPairSteps; ++i) {
#ifdef CUPAGED_CACHE_DTYPE
                unsigned low[2], high[2];
                unpack_halves<cache_t>(k[i], low);
                unpack_halves<cache_t>(k[2 + i], high);
#else
                const unsigned low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
#endif
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    mma_m16n8k16<matrix_t>(score[r][2 * tile], q[r][i], low);
                    mma_m16n8k16<matrix_t>(score[r][2 * tile + 1], q[r][i], high);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        form_logits<kTiles>(
            logits, positions[r], [&](int row) { return slope_log2(r, row); }, begin, end,
            score[r]);
        float factor[2];
        take_softmax<kTiles>(score[r], logits.scale_left(), acc[r].state, factor);
        rescale(acc[r].out, factor);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        unsigned p[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                p[r][j] = pack_pair(&score[r][2 * tile + j / 2][2 * (j % 2)]);
#pragma unroll
        for (int pair = 0; pair < kTileChunks / 2; ++pair) {
            unsigned v[4];
            ldmatrix_x4_trans(v,
                              matrix_row<kRowChunks>(values + tile * 16 * kRowChunks, pair, false));
#ifdef CUPAGED_CACHE_DTYPE
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                unsigned first[2], second[2];  // keys 0 to 7 and 8 to 15: even elements, odd ones
                unpack_halves<cache_t>(__byte_perm(v[2 * i], 0, 0x3120), first);
                unpack_halves<cache_t>(__byte_perm(v[2 * i + 1], 0, 0x3120), second);
                const unsigned even[2] = {first[0], second[0]}, odd[2] = {first[1], second[1]};
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    mma_m16n8k16<matrix_t>(acc[r].out[4 * pair + 2 * i], p[r], even);
                    mma_m16n8k16<matrix_t>(acc[r].out[4 * pair + 2 * i + 1], p[r], odd);
                }
            }
#else
            const unsigned low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                mma_m16n8k16<matrix_t>(acc[r].out[2 * pair], p[r], low);
                mma_m16n8k16<matrix_t>(acc[r].out[2 * pair + 1], p[r], high);
            }
#endif
        }
    }
}

// Each lane has summed its own keys: make the sums those of the rows.
template <int kTiles>
__device__ __forceinline__ void sum_lanes(AccumulatorOf<kTiles>& acc) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        acc.state[r].sum += __shfl_xor_sync(kFullMask, acc.state[r].sum, 1);
        acc.state[r].sum += __shfl_xor_sync(kFullMask, acc.state[r].sum, 2);
    }
}

// Call store(element, x, count) for what the lane holds of one of its rows: `count` neighbouring
// elements.
template <typename Store>
__device__ __forceinline__ void for_each_element(const Accumulator& acc, int r, Store store) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2 * kSteps; n += 2) {
        const float* const low = &acc.out[n][2 * r];
        const float* const high = &acc.out[n + 1][2 * r];
        if (kQuantised) {
            const float x[4] = {low[0], high[0], low[1], high[1]};
            if (8 * n < kHeadSize) store(8 * n + 4 * t, x, 4);
        } else {
            if (8 * n < kHeadSize) store(8 * n + 2 * t, low, 2);
            if (8 * n + 8 < kHeadSize) store(8 * n + 8 + 2 * t, high, 2);
        }
    }
}

}  // namespace cupaged
