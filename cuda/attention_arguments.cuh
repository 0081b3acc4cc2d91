// The arguments of the attention kernels, see cupaged/backends/cuda/arguments.py.
//
// The compiler ignores __restrict__ in a struct. So a kernel has the pointers that it writes
// through in restrict locals: its other loads then need not wait for its stores.
#pragma once

#include "common.cuh"
#include "quant.cuh"

namespace cupaged {

struct DecodeArguments {
    const scalar_t* query;
    const cache_t* kv_cache;
    const int* block_tables;
    const int* seq_lens;
    const int* query_start_loc;
    const float* alibi_slopes;
    const float* sinks;
    const float* k_scale;
    const float* v_scale;
    scalar_t* out;
    float* lse;
    float* partials;
    int* split_size;
    const int* tile_counts;
    const unsigned* tile_lists;
    int64 query_token_stride;
    int64 query_head_stride;
    int64 out_token_stride;
    int64 out_head_stride;
    int64 block_stride;
    int64 table_stride;
    int num_tokens;
    int num_seqs;
    int num_heads;
    int num_kv_heads;
    int block_shift;
    int causal;
    int window;
    int max_splits;
    int query_aligned;
    int out_aligned;
    int split_tokens;
    int subset;
    int list_capacity;
    float query_scale;
    float soft_cap_log2;
};

struct PrefillArguments {
    const scalar_t* query;
    const cache_t* kv_cache;
    const int* block_tables;
    const int* seq_lens;
    const int* query_start_loc;
    const float* alibi_slopes;
    const float* sinks;
    const float* k_scale;
    const float* v_scale;
    scalar_t* out;
    float* lse;
    int* workspace;
    float* partials;
    int64 query_token_stride;
    int64 query_head_stride;
    int64 out_token_stride;
    int64 out_head_stride;
    int64 block_stride;
    int64 table_stride;
    int num_tokens;
    int num_seqs;
    int num_heads;
    int num_kv_heads;
    int block_shift;
    int causal;
    int window;
    int max_splits;
    int query_aligned;
    int out_aligned;
    int tile_heads;
    float query_scale;
    float soft_cap_log2;
};

}  // namespace cupaged
