"""The public functions: write the paged KV cache, attend over it, merge partials, copy and swap blocks.

Each runs the backend for its tensors' device through an operator of torch.library (`registration`), so
torch.compile traces it without a graph break. Letters in shapes: T tokens, S sequences, H query heads,
Hkv KV heads, D head size, B block size.

Besides torch tensors, an array argument may be any object with ``__dlpack__`` (CuPy, NumPy, JAX). It is not
copied: a function writes into the caller's memory. Results are torch tensors, which have ``__dlpack__`` too;
``out``, if given, is returned as it is. JAX takes its arrays to be immutable: pass them only for arguments
that are not written. NumPy and CuPy cannot pass bfloat16 or fp8: pass a view of integers, as in
``torch.from_dlpack(x.view("uint16")).view(torch.bfloat16)``. Keep arrays on a GPU alive until their kernel
has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import checks
from .dlpack import Array, as_tensor
from .registration import call


def reshape_and_cache(
    key: Array,
    value: Array,
    kv_cache: Array,
    slot_mapping: Array,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> None:
    """Write the keys and values of T tokens into their slots of the cache. Mutates ``kv_cache``.

    Args:
        key, value: [T, Hkv, D] of one dtype, contiguous in D.
        kv_cache: [num_blocks, 2, Hkv, B, D] of the same dtype, or quantised: float8_e4m3fn, float8_e5m2
            or int8 (D a multiple of 16). Index 0 of dimension 1 holds the keys. Each block is contiguous;
            the stride between blocks is free.
        slot_mapping: int64 [T], block id * B + offset within the block; -1 skips the token. Slots must be
            distinct: if two tokens name one slot, it is undefined which of them it holds.
        k_scale, v_scale: float32 [Hkv], positive and with a finite reciprocal; required with a quantised
            cache. The cache stores x * (1 / scale), rounded to the nearest code with ties to even. Values
            beyond the largest code (448, 57344, 127) saturate; NaN stays NaN in fp8 and becomes 0 in int8.
            For float8_e4m3fn the scale that just holds every key is
            ``key.abs().amax(dim=(0, 2)).float().clamp(min=1e-6) / 448``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, a slot is outside the cache, or
            a scale is out of range. Slots and scales are checked on the CPU, and on a GPU when
            ``CUPAGED_CHECK=1`` is set.
    """
    key, value = as_tensor("key", key), as_tensor("value", value)
    kv_cache = as_tensor("kv_cache", kv_cache, written=True)
    slot_mapping = as_tensor("slot_mapping", slot_mapping)
    k_scale = None if k_scale is None else as_tensor("k_scale", k_scale)
    v_scale = None if v_scale is None else as_tensor("v_scale", v_scale)
    call("reshape_and_cache", key, value, kv_cache, slot_mapping, k_scale, v_scale)


def paged_attention(
    query: Array,
    kv_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    max_query_len: int | None = None,
    batch_invariant: bool = True,
    shared_prefix: bool = False,
    out: Array | None = None,
    return_lse: bool = False,
) -> torch.Tensor | Any:  # with return_lse a pair: Any, so that a type checker takes either use
    """Compute attention of a batch of sequences over their paged KV cache (PagedAttention, section 4.1).

    Decode, prefill and chunked prefill are one call: sequence s owns the query rows
    ``query_start_loc[s]`` to ``query_start_loc[s + 1]``, the last tokens of its ``seq_lens[s]``.
    Their keys and values must be in the cache already (`reshape_and_cache`). No function of this module
    computes gradients, even for inputs that require them.

    The logit of query position i and key position j is ``s = scale * q.k``, then
    ``cap * tanh(s / cap)``, then ``+ alibi_slope[h] * (j - i)``. Sums are accumulated in float32.

    Args:
        query: [T, H, D], float32, float16 or bfloat16, contiguous in D; H a multiple of Hkv.
        kv_cache: [num_blocks, 2, Hkv, B, D] in query's dtype, or quantised: float8_e4m3fn, float8_e5m2 or
            int8 (D a multiple of 16).
        block_tables: int32 [S, max_blocks]; entries past a sequence's last block, or entirely before
            its sliding window, are never read.
        seq_lens: int32 [S], number of tokens of each sequence, its query tokens included. The output of a
            sequence of length 0 is zeros.
        query_start_loc: int32 [S + 1], starting at 0; None means one query token per sequence (decode).
            Rows from ``query_start_loc[S]`` on are padding; their output is zeros.
        scale: factor of ``q.k``; ``D ** -0.5`` by default.
        causal: let a query see only the keys at or before its own position.
        sliding_window: let a query at i see only the keys at j > i - sliding_window.
        logits_soft_cap: bound of the logits (Gemma 2).
        alibi_slopes: float32 [H].
        sinks: float32 [H], an additional logit per head in the softmax, without a value (gpt-oss). Of the
            states that `merge_attention_states` merges, exactly one must include them, and each of its rows
            must see a key.
        k_scale, v_scale: float32 [Hkv], the scales of `reshape_and_cache`: a stored code reads as
            code * scale. Required with a quantised cache. On a GPU a visible NaN in a float8_e4m3fn cache
            may read as a number (480 * scale).
        max_query_len: maximum number of query tokens in a sequence, if known: with a few (speculative
            decoding) the decode kernel is used. A hint, which affects speed only.
        batch_invariant: make a sequence's result bitwise independent of the rest of the batch. With False
            the number of KV splits of a long sequence depends on the load of the GPU, which can be faster
            for few sequences: in decode, and in prefill of some hundred tokens over a long prefix.
        shared_prefix: detect neighbouring sequences that share leading blocks, as after a common prompt, and
            read these blocks once for all of them (cascade attention). Prefixes are detected in
            ``block_tables``, in KV splits of 512 tokens; without any, the result is bitwise the same. Pays
            off for prefixes of some thousand tokens. Implies ``batch_invariant``; ignored in float32, with
            a sliding window, in prefill, and on the CPU.
        out: [T, H, D] to write into, in query's dtype; returned as given.
        return_lse: also return the natural logarithm of the softmax's denominator.

    Returns:
        The output [T, H, D] and, with ``return_lse``, the logarithms, float32 [T, H]. A row that sees no key
        has zeros and -inf.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, or a length or block id is out
            of range. Lengths and block ids are checked on the CPU, and on a GPU when ``CUPAGED_CHECK=1`` is
            set.
    """
    query, kv_cache = as_tensor("query", query), as_tensor("kv_cache", kv_cache)
    block_tables, seq_lens = as_tensor("block_tables", block_tables), as_tensor("seq_lens", seq_lens)
    query_start_loc = None if query_start_loc is None else as_tensor("query_start_loc", query_start_loc)
    alibi_slopes = None if alibi_slopes is None else as_tensor("alibi_slopes", alibi_slopes)
    sinks = None if sinks is None else as_tensor("sinks", sinks)
    k_scale = None if k_scale is None else as_tensor("k_scale", k_scale)
    v_scale = None if v_scale is None else as_tensor("v_scale", v_scale)
    checks.attention_settings(
        scale, causal, sliding_window, logits_soft_cap, max_query_len, batch_invariant, shared_prefix
    )
    if out is None:
        out = out_tensor = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        out_tensor = as_tensor("out", out, written=True)
    lse = None
    if return_lse:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    call(
        "paged_attention",
        query,
        kv_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        None if scale is None else float(scale),
        causal,
        sliding_window,
        None if logits_soft_cap is None else float(logits_soft_cap),
        max_query_len,
        batch_invariant,
        shared_prefix,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        out_tensor,
        lse,
    )
    return out if lse is None else (out, lse)  # out is the caller's own array, if given


def merge_attention_states(
    outs: Array | Sequence[Array], lses: Array | Sequence[Array]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge N attention states of the same queries over disjoint keys into the attention over all keys.

    Sinks count once for each state that was computed with them: pass them for one state only.

    Args:
        outs: [N, T, H, D], or a sequence of N tensors [T, H, D].
        lses: float32 [N, T, H], or a sequence of N tensors [T, H]: natural logarithms as returned by
            `paged_attention`. A state whose lse is -inf is empty; its output is not read.

    Returns:
        The output [T, H, D] in the inputs' dtype and its lse, float32 [T, H]; zeros and -inf where every
        state is empty.

    Raises:
        ValueError: there is no state, or shapes, dtypes or devices do not agree.
    """
    stacked_outs, stacked_lses = checks.states("outs", outs), checks.states("lses", lses)
    sizes: dict[str, int] = {}
    checks.tensor("outs", stacked_outs, "N T H D", sizes, dtype=checks.DTYPES)
    checks.tensor("lses", stacked_lses, "N T H", sizes, dtype=torch.float32, device=stacked_outs.device)
    if sizes["N"] == 0:
        raise ValueError("outs holds no state to merge; pass at least one")
    if sizes["D"] % 8:
        raise ValueError(f"outs has head size {sizes['D']}; it must be a multiple of 8")
    if torch.is_grad_enabled():  # otherwise the results would be part of autograd's graph
        stacked_outs, stacked_lses = stacked_outs.detach(), stacked_lses.detach()
    return call("merge_attention_states", stacked_outs.contiguous(), stacked_lses.contiguous())


def copy_blocks(kv_cache: Array, block_mapping: Array) -> None:
    """Copy whole blocks inside a cache, for copy-on-write (section 4.4). Mutates ``kv_cache``.

    Args:
        kv_cache: [num_blocks, ...], each block contiguous. With the block-major allocation
            [num_blocks, num_layers, 2, Hkv, B, D] one call copies all layers.
        block_mapping: int64 [N, 2] of (source, destination) on the cache's device. The order of the copies
            is undefined: no block may be a destination twice, or both a source and a destination.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, or a block id is outside the
            cache (checked on the CPU, and on a GPU when ``CUPAGED_CHECK=1`` is set).
    """
    kv_cache = as_tensor("kv_cache", kv_cache, written=True)
    block_mapping = as_tensor("block_mapping", block_mapping)
    _check_block_cache("kv_cache", kv_cache)
    checks.block_mapping("block_mapping", block_mapping, kv_cache.device)
    call("copy_blocks", kv_cache, block_mapping)


def swap_blocks(src: Array, dst: Array, block_mapping: Array) -> None:
    """Copy whole blocks from one cache to another, GPU to CPU or back (section 4.5). Mutates ``dst``.

    The copies are asynchronous on the current stream: the CPU cache should be pinned, and must stay alive and
    unmodified until the stream has been synchronised.

    Args:
        src, dst: [num_blocks, ...] with blocks of one shape and dtype, each block contiguous.
        block_mapping: int64 [N, 2] of (block of src, block of dst), on the CPU; may be modified once the call
            has returned. The order of the copies is undefined: no block of dst may be named twice, or be a
            source as well where src and dst share memory.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, or a block id is outside its
            cache.
    """
    src, dst = as_tensor("src", src), as_tensor("dst", dst, written=True)
    block_mapping = as_tensor("block_mapping", block_mapping)
    _check_block_cache("src", src)
    _check_block_cache("dst", dst)
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise ValueError(
            f"dst must have blocks like src's, {list(src.shape[1:])} of {src.dtype}, "
            f"got {list(dst.shape[1:])} of {dst.dtype}"
        )
    checks.block_mapping("block_mapping", block_mapping, torch.device("cpu"))
    call("swap_blocks", src, dst, block_mapping)


def _check_block_cache(name: str, cache: torch.Tensor) -> None:
    if cache.dim() < 2:
        raise ValueError(f"{name} must be a tensor [num_blocks, ...] of at least 2 dimensions")
    checks.blocks_contiguous(name, cache)
