"""Find the kernel of a call, and keep what the layout of its tensors determines.

Most operators are called in every layer, with little to do for one token. What the layout determines is kept
with it; the rest are the first fields of the kernel's arguments, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from ...layout import Layout
from . import attention, formats, launch, work

DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: formats.BFLOAT16,
    torch.float8_e4m3fn: formats.FLOAT8_E4M3,
    torch.float8_e5m2: formats.FLOAT8_E5M2,
    torch.int8: formats.INT8,
}


@cache
def kernel_of(build: Callable[..., Any], arguments: type, *dtypes: np.dtype | None) -> launch.Kernel:
    """Return the kernel that `build` makes for the dtypes."""
    entry, work_of_thread = build(*dtypes)
    return launch.Kernel(entry, work_of_thread, arguments)


def keep(
    layout: Layout, kernel: launch.Kernel, arguments: Any, **fixed: float
) -> tuple[launch.Kernel, tuple[float, ...]]:
    """Keep a kernel and the last of its arguments, which are given by name; return both."""
    names = arguments._fields[-len(fixed) :]
    layout.prepared = kernel, tuple(fixed[name] for name in names)
    return layout.prepared


def keep_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    cache_numbers: dict[str, int],
) -> tuple[launch.Kernel, tuple[float, ...]]:
    """Keep the kernel of attention over a cache, and its arguments; return both.

    Args:
        cache_numbers: the cache's sizes, and its strides in bytes, by the names of `work.Batch`.
    """
    num_tokens, num_heads, _ = query.shape
    itemsize = query.element_size()
    return keep(
        layout,
        kernel_of(attention.build, work.Batch, DTYPES[query.dtype], DTYPES[kv_cache.dtype]),
        work.Batch,
        query_token_stride=query.stride(0) * itemsize,
        query_head_stride=query.stride(1) * itemsize,
        out_token_stride=out.stride(0) * itemsize,
        out_head_stride=out.stride(1) * itemsize,
        table_stride=block_tables.stride(0) * 4,
        num_seqs=block_tables.shape[0],
        num_tokens=num_tokens,
        num_heads=num_heads,
        itemsize=itemsize,
        value_size=out.shape[2],
        value_row_bytes=out.shape[2] * kv_cache.element_size(),
        num_blocks=kv_cache.shape[0],
        table_width=block_tables.shape[1],
        **cache_numbers,
    )
