"""The public functions of multi-head latent attention (MLA, DeepSeek-V2 and later): write latents, attend.

The keys of all heads are expanded from one latent of a token, ``k[h] = W_UK[h] @ kv_c``, beside a part with
RoPE ``k_pe``, and so are its values, ``v[h] = W_UV[h] @ kv_c``. The cache has the latent and ``k_pe``. A
model gets the same attention with the expansions absorbed into query and output: the query of head h is
``W_UK[h].T @ q_nope`` with ``q_pe`` after it, and ``W_UV[h]`` is applied to what `mla_attention` returns.

Letters in shapes: T tokens, S sequences, H query heads, B block size; Dk is the size of a cached row, 576 in
DeepSeek's models, Dv that of a latent, 512. See `ops` for arrays that are no torch tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from . import checks
from .dlpack import Array, as_tensor
from .registration import call


def concat_and_cache_mla(kv_c: Array, k_pe: Array, kv_cache: Array, slot_mapping: Array) -> None:
    """Write the latents of T tokens into their slots of the cache. Mutates ``kv_cache``.

    Args:
        kv_c: [T, Dv], the compressed keys and values, after their norm; contiguous in Dv, a multiple of 8.
        k_pe: [T, Dk - Dv] of the same dtype, the part of the keys with RoPE, after it; likewise.
        kv_cache: [num_blocks, B, Dk] of the same dtype. Each block is contiguous; the stride between blocks
            is free.
        slot_mapping: int64 [T], block id * B + offset within the block; -1 skips the token. Slots must be
            distinct: if two tokens name one slot, it is undefined which of them it holds.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, or a slot is outside the cache
            (checked on the CPU, and on a GPU when ``CUPAGED_CHECK=1`` is set).
    """
    kv_c, k_pe = as_tensor("kv_c", kv_c), as_tensor("k_pe", k_pe)
    kv_cache = as_tensor("kv_cache", kv_cache, written=True)
    call("concat_and_cache_mla", kv_c, k_pe, kv_cache, as_tensor("slot_mapping", slot_mapping))


def mla_attention(
    query: Array,
    kv_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array | None = None,
    *,
    scale: float,
    value_size: int = 512,
    causal: bool = True,
    max_query_len: int | None = None,
    out: Array | None = None,
    return_lse: bool = False,
) -> torch.Tensor | Any:  # with return_lse a pair: Any, so that a type checker takes either use
    """Compute multi-head latent attention of a batch of sequences over their paged cache of latents.

    Decode, prefill and chunked prefill are one call, as in `paged_attention`. The cached row of a token is
    the key of every head, and its first ``value_size`` elements are the value of every head: it is read once
    for all. The logit of a query q and a row k is ``scale * q.k``. Sums are accumulated in float32. A
    sequence's result is bitwise independent of the rest of the batch. There are no gradients.

    Args:
        query: [T, H, Dk], float32, float16 or bfloat16, contiguous in Dk.
        kv_cache: [num_blocks, B, Dk] in query's dtype, as `concat_and_cache_mla` fills it: Dk a multiple of 8
            and at most 576, B a power of two from 1 to 256.
        block_tables: int32 [S, max_blocks]; entries past a sequence's last block are never read.
        seq_lens: int32 [S], number of tokens of each sequence, its query tokens included. The output of a
            sequence of length 0 is zeros.
        query_start_loc: int32 [S + 1], starting at 0; None means one query token per sequence (decode).
            Rows from ``query_start_loc[S]`` on are padding; their output is zeros.
        scale: factor of ``q.k``. It is that of the expanded heads, in DeepSeek's models
            ``(128 + 64) ** -0.5`` times the square of YaRN's factor, and does not follow from Dk.
        value_size: Dv, a multiple of 8, at most 512 and at most Dk.
        causal: let a query see only the keys at or before its own position.
        max_query_len: maximum number of query tokens in a sequence, if known: with up to 8 (speculative
            decoding) long sequences are divided among more blocks of the GPU. A hint, which affects speed
            only.
        out: [T, H, Dv] to write into, in query's dtype; returned as given.
        return_lse: also return the natural logarithm of the softmax's denominator.

    Returns:
        The output [T, H, Dv] and, with ``return_lse``, the logarithms, float32 [T, H]. A row that sees no key
        has zeros and -inf. `merge_attention_states` merges both.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, or a length or block id is out
            of range. Lengths and block ids are checked on the CPU, and on a GPU when ``CUPAGED_CHECK=1`` is
            set.
    """
    query, kv_cache = as_tensor("query", query), as_tensor("kv_cache", kv_cache)
    block_tables, seq_lens = as_tensor("block_tables", block_tables), as_tensor("seq_lens", seq_lens)
    query_start_loc = None if query_start_loc is None else as_tensor("query_start_loc", query_start_loc)
    if scale is None:
        raise ValueError("scale must be a finite number, got None; it is that of the expanded heads")
    checks.attention_settings(scale, causal, None, None, max_query_len, True, False)
    if not checks.is_integer(value_size) or value_size < 1:
        raise ValueError(f"value_size must be an integer of at least 1, got {value_size!r}")
    if query.dim() != 3:
        raise ValueError(f"query must have 3 dimensions [T, H, Dk], got shape {list(query.shape)}")
    shape = (*query.shape[:2], value_size)
    if out is None:
        out = out_tensor = torch.empty(shape, dtype=query.dtype, device=query.device)
    else:
        out_tensor = as_tensor("out", out, written=True)
        if out_tensor.shape != shape:
            raise ValueError(f"out must be [T, H, value_size] = {list(shape)}, got {list(out_tensor.shape)}")
    lse = None
    if return_lse:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    call(
        "mla_attention",
        query,
        kv_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        float(scale),
        causal,
        max_query_len,
        out_tensor,
        lse,
    )
    return out if lse is None else (out, lse)  # out is the caller's own array, if given
