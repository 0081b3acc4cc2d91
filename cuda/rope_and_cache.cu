// Rotate queries and keys by their positions (RoPE), after normalising them if there are weights,
// and write keys and values into their slots of the paged cache, quantising them where the cache is
// quantised.
//
//   query                     [T, H, D], in place; as keys and values contiguous in D
//   key, value                [T, Hkv, D], unchanged
//   cos, sin                  [T, R / 2], in float where float_angles; null with R = 0
//   kv_cache                  [num_blocks, 2, Hkv, B, D]
//   slot_mapping              int64 [T]: block * B + offset, -1 to skip key and value of the token
//   query_weight, key_weight  [D], in float where float_weights; null: heads are not normalised
//   k_scale, v_scale          float32 [Hkv], null where the cache is not quantised
//
// Of a head the first R dimensions are rotated, in pairs (i, i + R / 2), or (2i, 2i + 1) where
// interleaved. A rotated key is rounded to its type, then stored as reshape_and_cache stores it.
//
// Grid (T, y): the y blocks of a token share its H + 2 Hkv heads, 2^lane_shift lanes of a warp take
// one. A lane has a unit of it: two chunks of 16 bytes and all of their pairs, so what it writes is
// read by no other. Heads of more units than lanes are read twice if they are normalised. No shared
// memory.
//
// Codes of two chunks that follow each other are stored as 16 bytes (of 16-bit elements), those of
// keys in pairs (i, i + R / 2) as 8.
//
// Predicted, not measured yet: a token of 32 + 16 heads of 128 in 16 bits takes three blocks of 128
// threads with 32 bytes each; 8 blocks of a multiprocessor have 32 KB under way, twice what covers
// the latency of an H100's memory.
//
// Macros CUPAGED_DTYPE, CUPAGED_CACHE_DTYPE. D is a multiple of 8, of 16 with a quantised cache.
// Without `aligned` (16 bytes: heads, angles, weights, and R / 2) elements are accessed one at a
// time.
#include "chunks.cuh"
#include "common.cuh"
#include "norm.cuh"
#include "paged.cuh"
#include "quant.cuh"
#include "vec.cuh"

namespace cupaged {

constexpr int kVec = kVecSize<scalar_t>;

struct RopeAndCacheArguments {
    scalar_t* query;
    const scalar_t* key;
    const scalar_t* value;
    const void* cos;
    const void* sin;
    cache_t* kv_cache;
    const int64* slot_mapping;
    const void* query_weight;
    const void* key_weight;
    const float* k_scale;
    const float* v_scale;
    int64 query_token_stride;
    int64 query_head_stride;
    int64 key_token_stride;
    int64 key_head_stride;
    int64 value_token_stride;
    int64 value_head_stride;
    int64 cos_stride;
    int64 sin_stride;
    int64 block_stride;
    int num_heads;  // of the query; 0 if it stays as it is
    int num_kv_heads;
    int head_size;
    int num_pairs;  // R / 2
    int block_shift;
    int lane_shift;
    int interleaved;
    int float_angles;
    int float_weights;
    int aligned;
    float epsilon;
    float weight_offset;
};

// A head of a token: where it is read and, in one of two places, written.
struct Head {
    const scalar_t* source;
    scalar_t* query;
    cache_t* cache;
    const void* weight;  // null: not normalised
    int num_pairs;       // that are rotated
    float inverse_scale;
};

__device__ __forceinline__ Head head_of(const RopeAndCacheArguments& args, int64 token, int index) {
    if (index < args.num_heads) {
        scalar_t* const query =
            args.query + token * args.query_token_stride + index * args.query_head_stride;
        return {query, query, nullptr, args.query_weight, args.num_pairs, 1.0f};
    }
    index -= args.num_heads;
    const bool is_key = index < args.num_kv_heads;
    const int head = is_key ? index : index - args.num_kv_heads;
    const int64 slot = args.slot_mapping[token];
    if (head >= args.num_kv_heads || slot < 0) return {nullptr, nullptr, nullptr, nullptr, 0, 1.0f};
    const PagedCache<cache_t> cache{args.kv_cache, args.block_stride, args.num_kv_heads,
                                    args.block_shift, args.head_size};
    cache_t* const target = cache.key(slot >> args.block_shift, head,
                                      static_cast<int>(slot & ((1 << args.block_shift) - 1)));
    if (is_key)
        return {args.key + token * args.key_token_stride + head * args.key_head_stride,
                nullptr,
                target,
                args.key_weight,
                args.num_pairs,
                args.k_scale == nullptr ? 1.0f : 1.0f / args.k_scale[head]};
    return {args.value + token * args.value_token_stride + head * args.value_head_stride,
            nullptr,
            target + cache.value_offset(),
            nullptr,
            0,
            args.v_scale == nullptr ? 1.0f : 1.0f / args.v_scale[head]};
}

// Two chunks of a head: kVec pairs, or at the end of them fewer; after them 2 * kVec elements.
struct Unit {
    int a, b;              // where the chunks begin
    int count_a, count_b;  // and how many elements they have
    int pair, num_pairs;   // none: not rotated
};

__device__ __forceinline__ int num_units(int head_size, int num_pairs) {
    return ceil_div(num_pairs, kVec) + ceil_div(head_size - 2 * num_pairs, 2 * kVec);
}

__device__ __forceinline__ Unit unit_of(int index, int head_size, int num_pairs, bool interleaved) {
    const int pair = index * kVec;
    if (pair < num_pairs) {
        const int count = min(kVec, num_pairs - pair);
        if (!interleaved) return {pair, num_pairs + pair, count, count, pair, count};
        return {2 * pair, 2 * pair + kVec, min(kVec, 2 * count), 2 * count - kVec, pair, count};
    }
    const int begin = 2 * num_pairs + 2 * kVec * (index - ceil_div(num_pairs, kVec));
    const int rest = head_size - begin;
    return {begin, begin + kVec, min(kVec, rest), min(kVec, rest - kVec), 0, 0};
}

// (a, b) becomes (a cos - b sin, b cos + a sin).
__device__ __forceinline__ void rotate(float& a, float& b, float cos, float sin) {
    const float turned = fmaf(a, cos, -(b * sin));
    b = fmaf(b, cos, a * sin);
    a = turned;
}

// Rotate a unit's elements, x of the first chunk and then of the second.
template <bool kAligned>
__device__ __forceinline__ void rotate_unit(const RopeAndCacheArguments& args, const Unit& unit,
                                            int64 token, float (&x)[2 * kVec]) {
    float cos[kVec], sin[kVec];
    const int item = args.float_angles ? 4 : static_cast<int>(sizeof(scalar_t));
    const char* const cosines = static_cast<const char*>(args.cos) + token * args.cos_stride * item;
    const char* const sines = static_cast<const char*>(args.sin) + token * args.sin_stride * item;
    load_floats<kAligned, scalar_t>(cosines, args.float_angles != 0, unit.pair, unit.num_pairs,
                                    cos);
    load_floats<kAligned, scalar_t>(sines, args.float_angles != 0, unit.pair, unit.num_pairs, sin);
    if (args.interleaved) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) rotate(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) rotate(x[i], x[kVec + i], cos[i], sin[i]);
    }
}

#ifdef CUPAGED_CACHE_DTYPE
constexpr int kWords = kVec / 4;  // of the codes of a chunk

__device__ __forceinline__ void store_words(cache_t* target, const unsigned* words) {
    if (kWords == 2)
        *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    else
        *reinterpret_cast<unsigned*>(target) = words[0];
}

template <bool kAligned>
__device__ __forceinline__ void store_codes(cache_t* target, const Unit& unit,
                                            const uint4 (&raw)[2], float inverse_scale) {
    float x[2 * kVec];
    unpack<scalar_t>(raw[0], x);
    unpack<scalar_t>(raw[1], x + kVec);
    unsigned words[2 * kWords];
#pragma unroll
    for (int i = 0; i < 2 * kVec; ++i) x[i] *= inverse_scale;
#pragma unroll
    for (int i = 0; i < 2 * kWords; ++i) words[i] = pack_word(x + 4 * i, cache_t());
    if (!kAligned) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            const int bits = 8 * (i % 4);
            if (i < unit.count_a)
                target[unit.a + i].code = static_cast<unsigned char>(words[i / 4] >> bits);
            if (i < unit.count_b)
                target[unit.b + i].code = static_cast<unsigned char>(words[kWords + i / 4] >> bits);
        }
    } else if (unit.b != unit.a + kVec) {
        store_words(target + unit.a, words);
        store_words(target + unit.b, words + kWords);
    } else if (kWords == 2) {
        store_global_16(target + unit.a, make_uint4(words[0], words[1], words[2], words[3]));
    } else {
        *reinterpret_cast<uint2*>(target + unit.a) = make_uint2(words[0], words[1]);
    }
}
#endif

template <bool kAligned, typename T>
__device__ __forceinline__ void store_unit(T* target, const Unit& unit, const uint4 (&raw)[2]) {
    store_chunk<kAligned>(target + unit.a, raw[0], unit.count_a);
    store_chunk<kAligned>(target + unit.b, raw[1], unit.count_b);
}

template <bool kAligned>
__device__ __forceinline__ void process_head(const RopeAndCacheArguments& args, int64 token,
                                             const Head& head, int lane, int lanes) {
    const int units = head.source == nullptr ? 0 : num_units(args.head_size, head.num_pairs);
    const bool interleaved = args.interleaved != 0;
    Unit unit;
    uint4 raw[2];
    const auto load = [&](int index) {
        unit = unit_of(index, args.head_size, head.num_pairs, interleaved);
        raw[0] = load_chunk<kAligned>(head.source + unit.a, unit.count_a);
        raw[1] = load_chunk<kAligned>(head.source + unit.b, unit.count_b);
    };
    float inverse = 1.0f;
    bool held = false;                   // in raw, the only unit
    if (args.query_weight != nullptr) {  // then all lanes meet here, those without a head as well
        float squares = 0.0f;
        for (int index = lane; index < units; index += lanes) {
            float x[2 * kVec];
            load(index);
            unpack<scalar_t>(raw[0], x);
            unpack<scalar_t>(raw[1], x + kVec);
            squares = add_squares(x, 2 * kVec, squares);
        }
        inverse = inverse_rms(lanes_sum(squares, lanes), args.head_size, args.epsilon);
        held = units <= lanes;
    }
    const NormWeights weights{head.weight, args.float_weights != 0, args.weight_offset};
    for (int index = lane; index < units; index += lanes) {
        if (!held) load(index);
        const bool changes = unit.num_pairs > 0 || head.weight != nullptr;
        if (changes) {
            float x[2 * kVec];
            unpack<scalar_t>(raw[0], x);
            unpack<scalar_t>(raw[1], x + kVec);
            if (head.weight != nullptr) {
                float weight[2 * kVec];
                weights.load<kAligned, scalar_t>(unit.a, unit.count_a, weight);
                weights.load<kAligned, scalar_t>(unit.b, unit.count_b, weight + kVec);
#pragma unroll
                for (int i = 0; i < 2 * kVec; ++i) x[i] = x[i] * inverse * weight[i];
            }
            if (unit.num_pairs > 0) rotate_unit<kAligned>(args, unit, token, x);
            raw[0] = pack<scalar_t>(x);
            raw[1] = pack<scalar_t>(x + kVec);
        }
        if (head.cache == nullptr) {
            if (changes) store_unit<kAligned>(head.query, unit, raw);
            continue;
        }
#ifdef CUPAGED_CACHE_DTYPE
        store_codes<kAligned>(head.cache, unit, raw, head.inverse_scale);
#else
        store_unit<kAligned>(head.cache, unit, raw);
#endif
    }
}

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS)
    rope_and_cache(const __grid_constant__ cupaged::RopeAndCacheArguments args) {
    using namespace cupaged;
    const int thread = blockIdx.y * CUPAGED_THREADS + threadIdx.x;
    const int lanes = 1 << args.lane_shift;
    const int64 token = blockIdx.x;
    const Head head = head_of(args, token, thread >> args.lane_shift);
    if (args.aligned)
        process_head<true>(args, token, head, thread & (lanes - 1), lanes);
    else
        process_head<false>(args, token, head, thread & (lanes - 1), lanes);
}
