"""The functions of the CPU backend, over numba kernels that read caches of every dtype in place.

A kernel is compiled at its first use and cached on disk by numba: beside this file, in NUMBA_CACHE_DIR or in
the user's cache directory (`disk_cache.py`). Kernels run on torch's threads (`launch.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import numpy as np
import torch

from ... import checks
from ...params import AttentionParams
from . import attention, formats, launch, memory, team, work

CHECKS_DATA = True  # the kernels check ids and scales themselves

_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: formats.BFLOAT16,
    torch.float8_e4m3fn: formats.FLOAT8_E4M3,
    torch.float8_e5m2: formats.FLOAT8_E5M2,
    torch.int8: formats.INT8,
}


@cache
def _kernel(build: Callable[..., Any], arguments: type, *dtypes: np.dtype | None) -> launch.Kernel:
    """Return the kernel that `build` makes for the dtypes."""
    entry, work_of_thread = build(*dtypes)
    return launch.Kernel(entry, work_of_thread, arguments)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    params: AttentionParams,
    layout: Hashable = None,
) -> None:
    num_tokens, num_heads, head_size = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    query_size, size = query.element_size(), kv_cache.element_size()
    # The softmax is in base 2. With a soft cap the kernel's dot products are s / cap.
    q_scale, cap = params.scale * math.log2(math.e), 0.0
    if params.logits_soft_cap is not None:
        q_scale, cap = params.scale / params.logits_soft_cap, params.logits_soft_cap * math.log2(math.e)
    batch = work.Batch(
        query=query.data_ptr(),
        query_token_stride=query.stride(0) * query_size,
        query_head_stride=query.stride(1) * query_size,
        out=out.data_ptr(),
        out_token_stride=out.stride(0) * query_size,
        out_head_stride=out.stride(1) * query_size,
        lse=_address(lse),
        cache=kv_cache.data_ptr(),
        block_stride=kv_cache.stride(0) * size,
        value_offset=num_kv_heads * block_size * head_size * size,
        kv_head_stride=block_size * head_size * size,
        row_bytes=head_size * size,
        block_tables=block_tables.data_ptr(),
        table_stride=block_tables.stride(0) * 4,
        seq_lens=seq_lens.data_ptr(),
        query_start_loc=_address(query_start_loc),
        alibi_slopes=_address(params.alibi_slopes),
        sinks=_address(params.sinks),
        k_scale=_address(params.k_scale),
        v_scale=_address(params.v_scale),
        num_seqs=seq_lens.shape[0],
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        itemsize=query_size,
        block_size=block_size,
        num_blocks=kv_cache.shape[0],
        table_width=block_tables.shape[1],
        causal=int(params.causal),
        window=params.sliding_window or 0,
        q_scale=q_scale,
        cap=cap,
    )
    kernel = _kernel(attention.build, work.Batch, _DTYPES[query.dtype], _DTYPES[kv_cache.dtype])
    if kernel(batch) == team.INVALID:
        checks.attention_ids(query, kv_cache, block_tables, seq_lens, query_start_loc, params.sliding_window)
        raise ValueError("seq_lens, block_tables or query_start_loc changed while they were used")


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    layout: Hashable = None,
) -> None:
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    key_size, size = key.element_size(), kv_cache.element_size()
    tokens = memory.Tokens(
        key=key.data_ptr(),
        key_token_stride=key.stride(0) * key_size,
        key_head_stride=key.stride(1) * key_size,
        value=value.data_ptr(),
        value_token_stride=value.stride(0) * key_size,
        value_head_stride=value.stride(1) * key_size,
        cache=kv_cache.data_ptr(),
        block_stride=kv_cache.stride(0) * size,
        value_offset=num_kv_heads * block_size * head_size * size,
        kv_head_stride=block_size * head_size * size,
        row_bytes=head_size * size,
        slot_mapping=slot_mapping.data_ptr(),
        num_tokens=key.shape[0],
        num_kv_heads=num_kv_heads,
        num_slots=kv_cache.shape[0] * block_size,
        block_size=block_size,
        head_size=head_size,
        itemsize=key_size,
        k_scale=_address(k_scale),
        v_scale=_address(v_scale),
        smallest_scale=checks.SCALE_RANGE[0],
        largest_scale=checks.SCALE_RANGE[1],
    )
    dtypes = (None, None) if k_scale is None else (_DTYPES[key.dtype], _DTYPES[kv_cache.dtype])
    if _kernel(memory.build_reshape_and_cache, memory.Tokens, *dtypes)(tokens) == team.INVALID:
        checks.slots(slot_mapping, kv_cache)
        checks.scale_values("k_scale", k_scale)
        checks.scale_values("v_scale", v_scale)
        raise ValueError("slot_mapping, k_scale or v_scale changed while they were used")


def merge_attention_states(
    outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    num_states, num_tokens, num_heads, head_size = outs.shape
    states = memory.States(
        outs=outs.data_ptr(),
        lses=lses.data_ptr(),
        num_states=num_states,
        rows=num_tokens * num_heads,
        head_size=head_size,
        itemsize=outs.element_size(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    _kernel(memory.build_merge, memory.States, _DTYPES[outs.dtype])(states)


def copy_blocks(kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
    swap_blocks(kv_cache, kv_cache, block_mapping)


def swap_blocks(src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
    size = src.element_size()
    blocks = memory.Blocks(
        target=dst.data_ptr(),
        target_stride=dst.stride(0) * size,
        source=src.data_ptr(),
        source_stride=src.stride(0) * size,
        block_bytes=src[0].numel() * size,
        pairs=block_mapping.data_ptr(),
        count=block_mapping.shape[0],
    )
    _kernel(memory.build_move_blocks, memory.Blocks)(blocks)
