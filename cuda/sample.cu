// Sample a token from each row of logits: the softmax at a temperature, truncated by min-p, then
// top-k, then top-p, is inverted in the order of the tokens at a number that is a hash.
//
//   logits                              [N, V], contiguous in V. NaN counts as -inf
//   temperature, top_p, min_p           [N], double; temperature 0 takes the first largest logit
//   top_k                               [N]
//   seeds, indices, positions           [N], hashed as 64 bits each
//   out                                 [N], the tokens
//
// Grid (N): a block samples a row. A row of 128K logits in 16 bits is 16 chunks of 16 bytes a
// thread, read from the L2 cache after the first time; to divide it over several blocks would take
// launches, or barriers between blocks, whose cost is about that of the passes that they save.
//
// All weights are integers, in units of a fraction of the largest, so that sums are exact. Hence
// no order of additions matters: neither that of threads nor that of another device, which draws
// the same tokens (cupaged/backends/cpu/sample.py). A weight is made from the same float operations
// there, each rounded to nearest and fused by name.
//
// The tokens that are kept are those above a threshold and the first few that equal it. A threshold
// is found without sorting: kPivots logits divide the range it is in, a pass over the row adds up
// what is above each, and the range shrinks to a quarter. kValuePasses do so to the range of
// values, the others to that of the floats as integers, of which half are close to zero: 6 passes
// for 16 bits where it is a usual one, 14 for 32, and never more than 10 and 18. More pivots spill
// registers. A warp has a contiguous part of the row, of which its lanes take every 32nd chunk.
// Static shared memory: sums of the warps.
//
// Predicted, not measured yet: a pass that adds no weights takes some 8 instructions for a logit,
// 5 us for 128K of them, and one that weighs them all three times that.
//
// Macro CUPAGED_DTYPE. Without `aligned` (16 bytes: rows and V) logits are read one at a time.
#include "chunks.cuh"
#include "common.cuh"
#include "vec.cuh"

namespace cupaged {

using uint64 = unsigned long long;

constexpr int kVec = kVecSize<scalar_t>;
constexpr int kWarps = CUPAGED_THREADS / kWarpSize;
constexpr int kPivots = 3;
constexpr int kValuePasses = 2;

struct SampleArguments {
    const scalar_t* logits;
    const double* temperature;
    const int64* top_k;
    const double* top_p;
    const double* min_p;
    const int64* seeds;
    const int64* indices;
    const int64* positions;
    int64* out;
    int64 stride;
    int size;           // V
    int fraction_bits;  // the largest weight is a one before so many bits
    int aligned;
};

struct Shared {
    uint64 masses[kPivots][kWarps];
    uint64 totals[kPivots];
    unsigned ties[kWarps];
    float largest[kWarps];
    int first[kWarps];
};

// Logits as integers in the same order, and back. -0 is before 0. No conversion makes zeros of
// subnormals, so that the integers are each other's inverses.
constexpr int kBits = 8 * static_cast<int>(sizeof(scalar_t));
constexpr unsigned kSign = 1u << (kBits - 1), kAllBits = kSign | (kSign - 1);

__device__ __forceinline__ unsigned key_of(float x) {
#if CUPAGED_DTYPE == CUPAGED_FP16
    const unsigned bits = bit_cast<unsigned short>(from_float<scalar_t>(x));
#else
    const unsigned bits = bit_cast<unsigned>(x) >> (32 - kBits);
#endif
    return bits & kSign ? bits ^ kAllBits : bits | kSign;
}
__device__ __forceinline__ float value_of(unsigned key) {
    const unsigned bits = key & kSign ? key ^ kSign : key ^ kAllBits;
#if CUPAGED_DTYPE == CUPAGED_FP16
    return to_float(bit_cast<scalar_t>(static_cast<unsigned short>(bits)));
#else
    return bit_cast<float>(bits << (32 - kBits));
#endif
}

// The upper 64 bits of a product.
__device__ __forceinline__ uint64 multiply_high(uint64 a, uint64 b) {
    const uint64 mask = 0xffffffffull;
    const uint64 a0 = a & mask, a1 = a >> 32, b0 = b & mask, b1 = b >> 32;
    const uint64 cross = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (cross & mask);
    return a1 * b1 + (cross >> 32) + (other >> 32);
}

// SplitMix64 (Steele, Lea, Flood 2014).
__device__ __forceinline__ uint64 mix(uint64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// A number in units of 2^-64 of which the first 53 bits count.
__device__ __forceinline__ uint64 uniform(uint64 seed, uint64 index, uint64 position) {
    return mix(mix(mix(seed) + index) + position) & ~0x7ffull;
}

// exp((x - largest) / temperature) as an integer: 2^fraction_bits for the largest.
struct Weights {
    float largest;
    float factor;  // log2(e) / temperature
    int shift;     // fraction_bits - 24

    __device__ __forceinline__ Weights(float largest, double temperature, int fraction_bits)
        : largest(largest), shift(fraction_bits - 24) {
        const float divisor = fminf(fmaxf(static_cast<float>(temperature), 1e-30f), 1e30f);
        factor = 1.44269502f / divisor;
    }
    // 2^t = 2^n 2^f with |f| <= 1/2, by the Taylor series. It is 1 for t = 0, and never above.
    __device__ __forceinline__ uint64 operator()(float x) const {
        const float t = fmaxf((x - largest) * factor, -63.0f);
        const float n = rintf(t);
        const float f = t - n;
        float series = 1.52527336e-05f;
        series = fmaf(series, f, 0.000154035297f);
        series = fmaf(series, f, 0.00133335579f);
        series = fmaf(series, f, 0.00961812865f);
        series = fmaf(series, f, 0.0555041097f);
        series = fmaf(series, f, 0.240226507f);
        series = fmaf(series, f, 0.693147182f);
        const float power = fmaf(series, f, 1.0f);
        const uint64 mantissa = static_cast<unsigned>(static_cast<int>(power * 16777216.0f));
        return mantissa << shift >> static_cast<int>(-n);
    }
};

// The tokens that are kept: those above the threshold, and the first `ties` that equal it.
struct Kept {
    float threshold;
    unsigned ties;
    uint64 tie_weight;

    __device__ __forceinline__ uint64 mass(uint64 above, unsigned equal) const {
        return above + min(equal, ties) * tie_weight;
    }
};

// Of the tokens before some place: the weight of those above the threshold, and how many equal it.
struct Before {
    uint64 above;
    unsigned equal;
};

template <typename T>
__device__ __forceinline__ T lanes_total(T x) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(kFullMask, x, distance);
    return x;
}

// A row in chunks of 16 bytes; beyond its end are NaN, which are neither above nor below anything.
template <bool kAligned>
struct Row {
    const scalar_t* logits;
    int size;

    __device__ __forceinline__ int chunks() const { return (size - 1) / kVec + 1; }
    __device__ __forceinline__ void load(int chunk, float (&x)[kVec]) const {
        const int count = kAligned ? kVec : size - chunk * kVec;
        unpack<scalar_t>(load_chunk<kAligned>(logits + static_cast<int64>(chunk) * kVec, count), x);
        if (!kAligned) {
#pragma unroll
            for (int i = 0; i < kVec; ++i)
                if (i >= count) x[i] = bit_cast<float>(0x7fffffffu);
        }
    }
    // Call function(logits of a chunk, its first token) for each that this lane has of a range.
    template <typename F>
    __device__ __forceinline__ void for_each(int first, int last, const F& function) const {
        for (int chunk = first + threadIdx.x % kWarpSize; chunk < last; chunk += kWarpSize) {
            float x[kVec];
            load(chunk, x);
            function(x, chunk * kVec);
        }
    }
    // The same for the chunks of the row that this lane's warp has.
    template <typename F>
    __device__ __forceinline__ void for_each(const F& function) const {
        const int part = ceil_div(chunks(), kWarps), first = threadIdx.x / kWarpSize * part;
        for_each(first, min(first + part, chunks()), function);
    }
};

// The largest logit, and the first token that has it: 0 if none is above -inf.
template <bool kAligned>
__device__ __forceinline__ float find_largest(const Row<kAligned>& row, Shared& shared,
                                              int& first) {
    float largest = negative_infinity();
    first = 0;
    row.for_each([&](const float (&x)[kVec], int token) {
#pragma unroll
        for (int i = 0; i < kVec; ++i)
            if (x[i] > largest) {
                largest = x[i];
                first = token + i;
            }
    });
    const auto reduce = [&] {
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
            const float x = __shfl_xor_sync(kFullMask, largest, distance);
            const int token = __shfl_xor_sync(kFullMask, first, distance);
            if (x > largest || (x == largest && token < first)) {
                largest = x;
                first = token;
            }
        }
    };
    reduce();
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) {
        shared.largest[threadIdx.x / kWarpSize] = largest;
        shared.first[threadIdx.x / kWarpSize] = first;
    }
    __syncthreads();
    largest = lane < kWarps ? shared.largest[lane] : negative_infinity();
    first = lane < kWarps ? shared.first[lane] : 0x7fffffff;
    reduce();
    return largest + 0.0f;  // no -0
}

// The largest logit, as an integer, whose weight is below the minimum.
__device__ __forceinline__ unsigned largest_below(const Weights& weights, uint64 minimum) {
    unsigned low = key_of(negative_infinity()), high = key_of(weights.largest);
    while (high - low > 1) {
        const unsigned middle = low + (high - low) / 2;
        (weights(value_of(middle)) < minimum ? low : high) = middle;
    }
    return low;
}

// The largest key such that there is `target` at or above it, or `low` if there is not so much
// above that. What there is are tokens, or their weights. `above` is what is above the result.
template <bool kAligned>
__device__ __forceinline__ unsigned search(const Row<kAligned>& row, const Weights& weights,
                                           bool by_weight, unsigned low, uint64 target,
                                           Shared& shared, uint64& above) {
    unsigned high = key_of(weights.largest) + 1;
    float below = bit_cast<float>(0x7f800000u);  // those from here on are in `above`
    above = 0;
    __syncthreads();  // what is stored has been read
    for (int pass = 0; high - low > 1; ++pass) {
        const float lowest = value_of(low), highest = value_of(high - 1);
        float pivots[kPivots];
        uint64 sums[kPivots];
#pragma unroll
        for (int j = 0; j < kPivots; ++j) {
            const unsigned step = (high - low + kPivots) / (kPivots + 1);
            unsigned key = low + (j + 1) * step;
            if (pass < kValuePasses) {
                const float part = static_cast<float>(j + 1) / (kPivots + 1);
                key = max(key_of(fmaf(part, highest, lowest - part * lowest)), low + 1);
            }
            pivots[j] = value_of(min(key, high - 1));
            sums[j] = 0;
        }
        row.for_each([&](const float (&x)[kVec], int) {
#pragma unroll
            for (int i = 0; i < kVec; ++i)
                if (x[i] >= pivots[0] && x[i] < below) {
                    const uint64 weight = by_weight ? weights(x[i]) : 1;
#pragma unroll
                    for (int j = 0; j < kPivots; ++j)
                        if (x[i] >= pivots[j]) sums[j] += weight;
                }
        });
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
        for (int j = 0; j < kPivots; ++j) {
            sums[j] = lanes_total(sums[j]);
            if (lane == 0) shared.masses[j][warp] = sums[j];
        }
        __syncthreads();
        if (warp < kPivots) {
            const uint64 total = lanes_total(lane < kWarps ? shared.masses[warp][lane] : 0);
            if (lane == 0) shared.totals[warp] = total;
        }
        __syncthreads();
        unsigned next_low = low, next_high = high;
        const uint64 above_high = above;
#pragma unroll
        for (int j = 0; j < kPivots; ++j) {
            const unsigned pivot = key_of(pivots[j]);
            const uint64 sum = shared.totals[j] + above_high;
            if (sum >= target) {
                next_low = pivot;
            } else {
                next_high = pivot;
                above = sum;
                break;
            }
        }
        if (next_high != high) below = value_of(next_high);
        low = next_low;
        high = next_high;
    }
    return low;
}

// What this lane's chunks of a range have.
template <bool kAligned>
__device__ __forceinline__ Before sums_of(const Row<kAligned>& row, const Weights& weights,
                                          const Kept& kept, int first, int last) {
    Before sums{0, 0};
    row.for_each(first, last, [&](const float (&x)[kVec], int) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            if (x[i] > kept.threshold) sums.above += weights(x[i]);
            if (x[i] == kept.threshold) ++sums.equal;
        }
    });
    return sums;
}

// Store the sums of a range for each warp, which has a part of as many chunks as are returned.
template <bool kAligned>
__device__ __forceinline__ int store_sums(const Row<kAligned>& row, const Weights& weights,
                                          const Kept& kept, int first, int last, Shared& shared) {
    const int warp = threadIdx.x / kWarpSize, part = ceil_div(last - first, kWarps);
    const int begin = min(first + warp * part, last), end = min(begin + part, last);
    const Before sums = sums_of(row, weights, kept, begin, end);
    const uint64 above = lanes_total(sums.above);
    const unsigned equal = lanes_total(sums.equal);
    __syncthreads();  // what is stored has been read
    if (threadIdx.x % kWarpSize == 0) {
        shared.masses[0][warp] = above;
        shared.ties[warp] = equal;
    }
    __syncthreads();
    return part;
}

__device__ __forceinline__ Before stored(const Shared& shared) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane >= kWarps) return Before{0, 0};
    return Before{shared.masses[0][lane], shared.ties[lane]};
}

// The first lane in whose part of the tokens the kept weight rises above the target. What comes
// before that part is added to `before`.
__device__ __forceinline__ int locate(const Before& own, const Kept& kept, uint64 target,
                                      Before& before) {
    Before sums = own;  // up to and with this lane's part
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint64 above = __shfl_up_sync(kFullMask, sums.above, distance);
        const unsigned equal = __shfl_up_sync(kFullMask, sums.equal, distance);
        if (static_cast<int>(threadIdx.x % kWarpSize) >= distance) {
            sums.above += above;
            sums.equal += equal;
        }
    }
    const bool beyond = kept.mass(before.above + sums.above, before.equal + sums.equal) > target;
    const int lane = __ffs(static_cast<int>(__ballot_sync(kFullMask, beyond))) - 1;
    before.above += __shfl_sync(kFullMask, sums.above - own.above, lane);
    before.equal += __shfl_sync(kFullMask, sums.equal - own.equal, lane);
    return lane;
}

template <bool kAligned>
__device__ __forceinline__ uint64 total_of(const Row<kAligned>& row, const Weights& weights,
                                           const Kept& kept, Shared& shared) {
    store_sums(row, weights, kept, 0, row.chunks(), shared);
    const Before sums = stored(shared);
    return kept.mass(lanes_total(sums.above), lanes_total(sums.equal));
}

// Draw a token among those kept; `number` is in units of 2^-64. The part of the row where it is
// shrinks to a warp's, to a part of that, and so on until each lane of a warp has one chunk.
template <bool kAligned>
__device__ __forceinline__ void draw(const Row<kAligned>& row, const Weights& weights,
                                     const Kept& kept, uint64 number, Shared& shared, int64* out) {
    int first = 0, last = row.chunks();
    uint64 target = 0;
    Before before{0, 0};
    for (bool whole = true; whole || last - first > kWarpSize; whole = false) {
        const int part = store_sums(row, weights, kept, first, last, shared);
        const Before sums = stored(shared);
        if (whole)
            target =
                multiply_high(number, kept.mass(lanes_total(sums.above), lanes_total(sums.equal)));
        first += locate(sums, kept, target, before) * part;
        last = min(first + part, last);
    }
    if (threadIdx.x >= kWarpSize) return;
    const Before own = sums_of(row, weights, kept, first, last);
    const int lane = locate(own, kept, target, before);
    if (static_cast<int>(threadIdx.x) != lane) return;
    float x[kVec];
    row.load(first + lane, x);
    int token = -1;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        if (x[i] > kept.threshold) before.above += weights(x[i]);
        if (x[i] == kept.threshold) ++before.equal;
        if (token < 0 && kept.mass(before.above, before.equal) > target)
            token = (first + lane) * kVec + i;
    }
    *out = token;
}

template <bool kAligned>
__device__ __forceinline__ void sample_row(const SampleArguments& args, Shared& shared) {
    const int n = blockIdx.x;
    const Row<kAligned> row{args.logits + n * args.stride, args.size};
    int first;
    const float largest = find_largest(row, shared, first);
    const double temperature = args.temperature[n];
    if (!(temperature > 0.0) || fabsf(largest) == -negative_infinity()) {
        if (threadIdx.x == 0) args.out[n] = first;
        return;
    }
    const Weights weights(largest, temperature, args.fraction_bits);
    const double min_p = args.min_p[n], one = static_cast<double>(1ull << args.fraction_bits);
    const uint64 minimum = min_p > 0.0 ? static_cast<uint64>(ceil(fmin(min_p, 1.0) * one)) : 0;
    unsigned threshold = largest_below(weights, max(minimum, 1ull));
    Kept kept{value_of(threshold), 0, 0};
    uint64 above;
    const int64 top_k = args.top_k[n];
    if (top_k > 0 && top_k < args.size) {
        const unsigned found = search(row, weights, false, threshold, top_k, shared, above);
        if (found != threshold) {
            threshold = found;
            kept.threshold = value_of(found);
            kept.ties = static_cast<unsigned>(top_k - above);
            kept.tie_weight = weights(kept.threshold);
        }
    }
    const double top_p = args.top_p[n];
    if (top_p < 1.0) {
        // The most likely tokens are kept until they have top_p of the weight. The product is that
        // of doubles: 0.8 of 10 equal tokens are 8, though the double is above 0.8.
        const uint64 total = total_of(row, weights, kept, shared);
        const double share = ceil(fmax(top_p, 0.0) * static_cast<double>(total));
        const uint64 target = min(max(static_cast<uint64>(share), 1ull), total);
        threshold = search(row, weights, true, threshold, target, shared, above);
        kept.threshold = value_of(threshold);
        kept.tie_weight = weights(kept.threshold);
        kept.ties = static_cast<unsigned>((target - above - 1) / kept.tie_weight + 1);
    }
    const uint64 number = uniform(args.seeds[n], args.indices[n], args.positions[n]);
    draw(row, weights, kept, number, shared, args.out + n);
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS)
    sample(const __grid_constant__ cupaged::SampleArguments args) {
    using namespace cupaged;
    __shared__ Shared shared;
    if (args.aligned)
        sample_row<true>(args, shared);
    else
        sample_row<false>(args, shared);
}
