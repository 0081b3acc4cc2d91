// Write the keys and values of T tokens into their slots of the paged cache.
//
//   key, value    [T, Hkv, D], contiguous in D
//   cache         [num_blocks, 2, Hkv, B, D]
//   slot_mapping  int64 [T]: block * B + offset, -1 to skip the token
//
// Grid (T): one block writes one token, each thread 16 bytes at a time of a key and the value
// beside it. No shared memory.
//
// Macro CUPAGED_DTYPE. D is a multiple of 8.
#include "common.cuh"
#include "paged.cuh"
#include "vec.cuh"

extern "C" __global__ void __launch_bounds__(128)
    reshape_and_cache(const scalar_t* __restrict__ key, const scalar_t* __restrict__ value,
                      scalar_t* __restrict__ cache_data,
                      const cupaged::int64* __restrict__ slot_mapping,
                      cupaged::int64 key_token_stride, cupaged::int64 key_head_stride,
                      cupaged::int64 value_token_stride, cupaged::int64 value_head_stride,
                      cupaged::int64 block_stride, int num_kv_heads, int head_size, int block_shift,
                      int aligned) {
    using namespace cupaged;
    constexpr int kVec = kVecSize<scalar_t>;
    const int chunks = head_size / kVec;  // of 16 bytes in a row

    const int64 token = blockIdx.x;
    const int64 slot = slot_mapping[token];
    if (slot < 0) return;
    const PagedCache<scalar_t> cache{cache_data, block_stride, num_kv_heads, block_shift,
                                     head_size};
    const int64 block = slot >> block_shift;
    const int offset = static_cast<int>(slot & ((1 << block_shift) - 1));
    key += token * key_token_stride;
    value += token * value_token_stride;

    for (int i = threadIdx.x; i < num_kv_heads * chunks; i += blockDim.x) {
        const int head = i / chunks;
        const int element = (i % chunks) * kVec;
        scalar_t* const target = cache.key(block, head, offset) + element;
        const uint4 k = load_vec(key + head * key_head_stride + element, aligned);
        const uint4 v = load_vec(value + head * value_head_stride + element, aligned);
        store_vec(target, k, true);
        store_vec(target + cache.value_offset(), v, true);
    }
}
