"""Plan the launches of the functions of multi-head latent attention, as `plans.py` does of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...params import AttentionParams
from . import plans
from . import specs as kernel_specs
from .arguments import ConcatAndCacheMlaArguments, MlaArguments
from .constants import ALL_SEQUENCES, MULTI_TOKEN, SINGLES
from .kernel_choice import DTYPE_NAMES, mla_kernel
from .layouts import all_aligned, block_shift, ceil_div, require_aligned_cache, rows_aligned
from .specs import KernelCall

WHOLE_SEQUENCE = 1 << 30  # tokens of a KV split: more than a sequence has


@dataclass(frozen=True)
class MlaPlan:
    """The launches for some sequences of a batch, and the workspace that they need."""

    attend: KernelCall
    merge: KernelCall | None = None  # of the KV splits that sequences are divided into
    partials: tuple[int, int, int, int] | None = None  # [T or S, H, KV splits, Dv + 4]: what it reads of them

    def prepare(self, launcher: Any, device: torch.device) -> tuple[Any, Any, Any]:
        """Return what is called to launch both, and the shape of the workspace."""
        merge = None if self.merge is None else launcher.prepare(self.merge, device)
        return launcher.prepare(self.attend, device), merge, self.partials


def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
    params: AttentionParams,
    arch: str,
    sm_count: int,
) -> list[MlaPlan]:
    """Plan the attention of sequences of one or a few query tokens, and of the others apart.

    The others are not divided into KV splits: they have enough rows, and partials of them all would be many
    times as large as the output.
    """
    require_aligned_cache(kv_cache)
    tensors = query, kv_cache, block_tables, out, params
    if plans.all_decode(params, query_start_loc):
        return [_launches(*tensors, arch, sm_count, ALL_SEQUENCES, query_start_loc is None)]
    return [
        _launches(*tensors, arch, sm_count, subset, subset == SINGLES) for subset in (SINGLES, MULTI_TOKEN)
    ]


def _launches(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    params: AttentionParams,
    arch: str,
    sm_count: int,
    subset: int,
    one_token_each: bool,
) -> MlaPlan:
    num_tokens, num_heads, key_size = query.shape
    num_seqs, table_width = block_tables.shape
    value_size = out.shape[-1]
    prefills = subset == MULTI_TOKEN
    kernel = mla_kernel(DTYPE_NAMES[query.dtype], key_size, value_size, num_heads, arch, prefills)
    split_tokens, max_splits = WHOLE_SEQUENCE, 1
    if not prefills:  # the width of the table bounds the KV splits, but never changes their size
        split_tokens = plans.SPLIT_TOKENS
        max_splits = min(plans.MAX_SPLITS, ceil_div(table_width * kv_cache.shape[1], split_tokens))
    tile_heads = min(num_heads, kernel.tile_rows)
    # Each sequence can end in a partly filled tile, and the padding is one more.
    tile_tokens = kernel.tile_rows // tile_heads
    tiles = num_seqs + (0 if one_token_each else num_tokens // tile_tokens + 1)
    items = tiles * ceil_div(num_heads, tile_heads) * max_splits
    call = KernelCall(
        kernel.spec,
        (min(items, plans.DECODE_BLOCKS_PER_SM * sm_count), 1),
        MlaArguments(
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            out_token_stride=out.stride(0),
            out_head_stride=out.stride(1),
            block_stride=kv_cache.stride(0),
            table_stride=block_tables.stride(0),
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            num_heads=num_heads,
            key_size=key_size,
            value_size=value_size,
            block_shift=block_shift(kv_cache),
            causal=params.causal,
            max_splits=max_splits,
            query_aligned=rows_aligned(query),
            out_aligned=rows_aligned(out),
            split_tokens=split_tokens,
            subset=subset,
            query_scale=params.scale * plans.LOG2E,
        ),
    )
    if max_splits == 1:
        return MlaPlan(call)
    return MlaPlan(call, *plans.merge_splits(out, num_seqs, 0, split_tokens, max_splits, subset))


def concat_and_cache(kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor) -> KernelCall:
    require_aligned_cache(kv_cache)
    return KernelCall(
        kernel_specs.concat_and_cache_mla(DTYPE_NAMES[kv_cache.dtype]),
        (len(kv_c), 1),
        ConcatAndCacheMlaArguments(
            kv_c_stride=kv_c.stride(0),
            k_pe_stride=k_pe.stride(0),
            block_stride=kv_cache.stride(0),
            key_size=kv_cache.shape[2],
            value_size=kv_c.shape[1],
            block_shift=block_shift(kv_cache),
            aligned=all_aligned(kv_c, k_pe),
        ),
    )
