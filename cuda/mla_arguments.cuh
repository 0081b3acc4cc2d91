// The arguments of the kernels of multi-head latent attention, see
// cupaged/backends/cuda/arguments.py.
#pragma once

#include "common.cuh"

namespace cupaged {

struct MlaArguments {
    const scalar_t* query;
    const scalar_t* kv_cache;
    const int* block_tables;
    const int* seq_lens;
    const int* query_start_loc;
    scalar_t* out;
    float* lse;
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
    int key_size;
    int value_size;
    int block_shift;
    int causal;
    int max_splits;
    int query_aligned;
    int out_aligned;
    int split_tokens;
    int subset;
    float query_scale;
};

}  // namespace cupaged
