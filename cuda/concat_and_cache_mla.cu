// Write the latents of T tokens, each in two parts, into their slots of the paged cache.
//
//   kv_c          [T, Dv], contiguous in Dv: the compressed keys and values
//   k_pe          [T, Dk - Dv], contiguous in its last dimension: the part of the key with RoPE
//   kv_cache      [num_blocks, B, Dk]
//   slot_mapping  int64 [T]: block * B + offset, -1 to skip the token
//
// Grid (T): one block writes one token, each thread 16 bytes at a time. No shared memory.
//
// Macro CUPAGED_DTYPE. Dk and Dv are multiples of 8.
#include "common.cuh"
#include "paged.cuh"
#include "vec.cuh"

namespace cupaged {

struct ConcatAndCacheMlaArguments {
    const scalar_t* kv_c;
    const scalar_t* k_pe;
    scalar_t* kv_cache;
    const int64* slot_mapping;
    int64 kv_c_stride;
    int64 k_pe_stride;
    int64 block_stride;
    int key_size;
    int value_size;
    int block_shift;
    int aligned;
};

}  // namespace cupaged

extern "C" __global__ void __launch_bounds__(CUPAGED_THREADS)
    concat_and_cache_mla(const __grid_constant__ cupaged::ConcatAndCacheMlaArguments args) {
    using namespace cupaged;
    constexpr int kVec = kVecSize<scalar_t>;
    scalar_t* __restrict__ const kv_cache = args.kv_cache;

    const int64 token = blockIdx.x;
    const int64 slot = args.slot_mapping[token];
    if (slot < 0) return;
    const PagedCache<scalar_t> cache{kv_cache, args.block_stride, 1, args.block_shift,
                                     args.key_size};
    const int offset = static_cast<int>(slot & ((1 << args.block_shift) - 1));
    scalar_t* const target = cache.key(slot >> args.block_shift, 0, offset);
    const scalar_t* const kv_c = args.kv_c + token * args.kv_c_stride;
    // So that both parts are read at the index in the cache.
    const scalar_t* const k_pe = args.k_pe + token * args.k_pe_stride - args.value_size;
    const auto copy = [&](bool aligned) {
        for (int i = threadIdx.x * kVec; i < args.key_size; i += blockDim.x * kVec)
            store_vec(target + i, load_vec((i < args.value_size ? kv_c : k_pe) + i, aligned), true);
    };
    if (args.aligned)
        copy(true);
    else
        copy(false);
}
