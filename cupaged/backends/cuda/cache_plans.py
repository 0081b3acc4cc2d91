"""Plan the launches of the functions on a KV cache, as `plans.py` does those of attention."""

from __future__ import annotations

import torch

from . import specs as kernel_specs
from .arguments import CopyBlocksArguments, ReshapeAndCacheArguments
from .kernel_choice import CACHE_DTYPE_NAMES, DTYPE_NAMES
from .layouts import (
    block_bytes,
    block_shift,
    ceil_div,
    copy_unit,
    require_aligned_cache,
    rows_aligned,
    stride_bytes,
)
from .specs import KernelCall


def reshape_and_cache(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor) -> KernelCall:
    require_aligned_cache(kv_cache)
    num_tokens, num_kv_heads, head_size = key.shape
    return KernelCall(
        kernel_specs.reshape_and_cache(DTYPE_NAMES[key.dtype], CACHE_DTYPE_NAMES[kv_cache.dtype]),
        (num_tokens, 1),
        ReshapeAndCacheArguments(
            key_token_stride=key.stride(0),
            key_head_stride=key.stride(1),
            value_token_stride=value.stride(0),
            value_head_stride=value.stride(1),
            block_stride=kv_cache.stride(0),
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_shift=block_shift(kv_cache),
            aligned=rows_aligned(key) and rows_aligned(value),
        ),
    )


def copy_blocks(src: torch.Tensor, dst: torch.Tensor, num_pairs: int) -> KernelCall:
    unit_bytes = copy_unit(src, dst)
    units = block_bytes(src) // unit_bytes
    spec = kernel_specs.copy_blocks(unit_bytes)
    # A few units a thread keep enough loads in flight; large blocks are shared by several CUDA blocks.
    return KernelCall(
        spec,
        (num_pairs, min(64, ceil_div(units, 4 * spec.threads))),
        CopyBlocksArguments(
            source_stride=stride_bytes(src) // unit_bytes,
            target_stride=stride_bytes(dst) // unit_bytes,
            block_units=units,
        ),
    )
