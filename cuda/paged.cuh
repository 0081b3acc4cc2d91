// Compute the address of (block, head, offset) in the cache; no other file does.
#pragma once

#include "common.cuh"

namespace cupaged {

// One layer's cache [num_blocks, 2, Hkv, B, D]. The last four dimensions are contiguous, the stride
// between blocks is free. B is a power of two, given by its logarithm.
template <typename T>
struct PagedCache {
    T* data;
    int64 block_stride;  // in elements
    int num_kv_heads;
    int block_shift;  // log2(B)
    int head_size;    // D

    // The D elements of the key of one token and KV head.
    __device__ __forceinline__ T* key(int64 block, int head, int offset) const {
        const int row = (head << block_shift) + offset;
        return data + block * block_stride + static_cast<int64>(row) * head_size;
    }
    // From the address of a key to that of its value.
    __device__ __forceinline__ int64 value_offset() const {
        return (static_cast<int64>(num_kv_heads) << block_shift) * head_size;
    }
    // Token j of a sequence lies in this entry of its block table, at this offset in the block.
    __device__ __forceinline__ int table_index(int token) const { return token >> block_shift; }
    __device__ __forceinline__ int offset_in_block(int token) const {
        return token & ((1 << block_shift) - 1);
    }
};

}  // namespace cupaged
