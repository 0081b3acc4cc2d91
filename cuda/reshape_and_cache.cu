// Write the keys and values of T tokens into their slots of the paged cache, quantising them where
// the cache is quantised.
//
//   key, value        [T, Hkv, D], contiguous in D
//   kv_cache          [num_blocks, 2, Hkv, B, D]
//   slot_mapping      int64 [T]: block * B + offset, -1 to skip the token
//   k_scale, v_scale  float32 [Hkv], null where the cache is not quantised
//
// Grid (T): one block writes one token, each thread 16 bytes at a time of a key and the value
// beside it: with a quantised cache, 16 codes of 32 or 64 bytes. No shared memory.
//
// Predicted, not measured yet: with 8 heads of 128 in 16 bits a block reads 4 KB and is gone, and
// the 16 blocks that fit have three times under way what covers the latency of an H100's memory.
//
// Macros CUPAGED_DTYPE, CUPAGED_CACHE_DTYPE. D is a multiple of 8, of 16 with a quantised cache.
#include "common.cuh"
#include "paged.cuh"
#include "quant.cuh"
#include "vec.cuh"

namespace cupaged {

constexpr int kVec = kVecSize<cache_t>;
constexpr int kSourceVec = kVecSize<scalar_t>;

// kVec elements of a row, as the cache keeps them.
__device__ __forceinline__ uint4 load_codes(const scalar_t* source, float inverse_scale,
                                            bool aligned) {
#ifdef CUPAGED_CACHE_DTYPE
    float x[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i += kSourceVec)
        unpack<scalar_t>(load_vec(source + i, aligned), x + i);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] *= inverse_scale;
    return pack<cache_t>(x);
#else
    return load_vec(source, aligned);
#endif
}

struct ReshapeAndCacheArguments {
    const scalar_t* key;
    const scalar_t* value;
    cache_t* kv_cache;
    const int64* slot_mapping;
    const float* k_scale;
    const float* v_scale;
    int64 key_token_stride;
    int64 key_head_stride;
    int64 value_token_stride;
    int64 value_head_stride;
    int64 block_stride;
    int num_kv_heads;
    int head_size;
    int block_shift;
    int aligned;
};

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS)
    reshape_and_cache(const __grid_constant__ cupaged::ReshapeAndCacheArguments args) {
    using namespace cupaged;
    cache_t* __restrict__ const kv_cache = args.kv_cache;
    const int chunks = args.head_size / kVec;  // of 16 bytes in a row of the cache

    const int64 token = blockIdx.x;
    const int64 slot = args.slot_mapping[token];
    if (slot < 0) return;
    const PagedCache<cache_t> cache{kv_cache, args.block_stride, args.num_kv_heads,
                                    args.block_shift, args.head_size};
    const int64 block = slot >> args.block_shift;
    const int offset = static_cast<int>(slot & ((1 << args.block_shift) - 1));
    const scalar_t* const key = args.key + token * args.key_token_stride;
    const scalar_t* const value = args.value + token * args.value_token_stride;

    // A row of keys is stored before that of values is loaded: fewer registers, more blocks.
    const auto copy = [&](bool aligned) {
        for (int i = threadIdx.x; i < args.num_kv_heads * chunks; i += blockDim.x) {
            const int head = i / chunks;
            const int element = (i % chunks) * kVec;
            cache_t* const target = cache.key(block, head, offset) + element;
            const float inverse_k = args.k_scale == nullptr ? 1.0f : 1.0f / args.k_scale[head];
            const float inverse_v = args.v_scale == nullptr ? 1.0f : 1.0f / args.v_scale[head];
            store_vec(target,
                      load_codes(key + head * args.key_head_stride + element, inverse_k, aligned),
                      true);
            store_vec(
                target + cache.value_offset(),
                load_codes(value + head * args.value_head_stride + element, inverse_v, aligned),
                true);
        }
    };
    if (args.aligned)
        copy(true);
    else
        copy(false);
}
