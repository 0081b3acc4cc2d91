"""Multi-head latent attention on the CPU: the kernels of attention and of the cache write, with other sizes.

A cache of latents is one of a single KV head whose values are the first elements of its keys.
"""

from __future__ import annotations

import torch

from ... import checks
from ...layout import Layout
from ...params import AttentionParams
from . import launch, memory, team, work
from .prepared import keep, keep_attention, kernel_of


def mla_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    params: AttentionParams,
    layout: Layout,
) -> None:
    kernel, fixed = layout.prepared or keep_attention(
        query, kv_cache, block_tables, out, layout, _cache_numbers(kv_cache, 0)
    )
    arguments = (
        query.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        kv_cache.data_ptr(),
        block_tables.data_ptr(),
        seq_lens.data_ptr(),
        0 if query_start_loc is None else query_start_loc.data_ptr(),
        *[0] * 4,  # slopes, sinks and scales
        params.causal,
        0,
        params.scale * work.LOG2E,
        0.0,
        *fixed,
    )
    if kernel(arguments) == team.INVALID:
        checks.attention_ids(query, kv_cache, block_tables, seq_lens, query_start_loc, None)
        raise ValueError("seq_lens, block_tables or query_start_loc changed while they were used")


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Layout,
) -> None:
    kernel, fixed = layout.prepared or _prepare_cache_write(kv_c, k_pe, kv_cache, layout)
    addresses = kv_c.data_ptr(), k_pe.data_ptr(), kv_cache.data_ptr(), slot_mapping.data_ptr(), 0, 0
    if kernel((*addresses, *fixed)) == team.INVALID:
        checks.slots(slot_mapping, kv_cache)
        raise ValueError("slot_mapping changed while it was used")


def _prepare_cache_write(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, layout: Layout
) -> tuple[launch.Kernel, tuple[float, ...]]:
    size = kv_c.element_size()
    return keep(
        layout,
        kernel_of(memory.build_reshape_and_cache, memory.Tokens, None, None),
        memory.Tokens,
        key_token_stride=kv_c.stride(0) * size,
        key_head_stride=0,
        value_token_stride=k_pe.stride(0) * size,
        value_head_stride=0,
        key_bytes=kv_c.shape[1] * size,
        value_bytes=k_pe.shape[1] * size,
        num_tokens=kv_c.shape[0],
        num_slots=kv_cache.shape[0] * kv_cache.shape[1],
        itemsize=size,
        smallest_scale=checks.SCALE_RANGE[0],
        largest_scale=checks.SCALE_RANGE[1],
        **_cache_numbers(kv_cache, kv_c.shape[1] * size),
    )


def _cache_numbers(kv_cache: torch.Tensor, value_offset: int) -> dict[str, int]:
    """Return a cache's sizes, and its strides in bytes, as `backend` does those of keys and values."""
    _, block_size, key_size = kv_cache.shape
    row_bytes = key_size * kv_cache.element_size()
    return {
        "block_stride": kv_cache.stride(0) * kv_cache.element_size(),
        "value_offset": value_offset,
        "kv_head_stride": block_size * row_bytes,
        "row_bytes": row_bytes,
        "num_kv_heads": 1,
        "block_size": block_size,
        "head_size": key_size,
    }
