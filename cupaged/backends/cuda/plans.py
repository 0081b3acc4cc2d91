"""Plan the launches of a call: which kernel in `cuda/`, on what grid, with which arguments.

All of it follows from the layouts of the tensors, the settings and the GPU; nothing here reads memory or
launches, so that `kernels.py` can keep a plan for the calls that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...params import AttentionParams
from . import specs as kernel_specs
from .arguments import (
    DecodeArguments,
    FindSharedSplitsArguments,
    MergeSplitsArguments,
    MergeStatesArguments,
    PlanPrefillArguments,
    PrefillArguments,
)
from .constants import (
    ALL_SEQUENCES,
    DECODE_TILE_ROWS,
    MAX_SHARED_TILES,
    MAX_TILE_ROWS,
    MERGE_ELEMENTS,
    MULTI_TOKEN,
    PARTIAL_PADDING,
    SINGLES,
    SMALLEST_PREFILL_SPLIT_TOKENS,
    SMALLEST_SPLIT_TOKENS,
)
from .kernel_choice import CACHE_DTYPE_NAMES, DTYPE_NAMES, decode_kernel, prefill_kernel
from .layouts import block_shift, ceil_div, require_aligned_cache, rows_aligned
from .specs import KernelCall

LOG2E = 1.4426950408889634  # softmax is in base 2

# Decode (work.cuh): a sequence has KV splits of this many tokens, or, if that makes too many, of more:
# the workspace stays bounded. KV splits that spread the batch evenly may be smaller.
SPLIT_TOKENS = 512
MAX_SPLITS = 64
MAX_SHARED_ROWS = (1 << 32) // MAX_TILE_ROWS  # of a KV head, that lists of tiles can name
# Blocks to launch per multiprocessor: 2 to 6 fit at once, and more even out KV splits of different length.
DECODE_BLOCKS_PER_SM = 8
DECODE_WIDE_BLOCKS_PER_SM = 1  # that fit at once; the KV splits are of equal length
MAX_PREFILL_SPLITS = 16
# Up to this many query tokens a sequence go through the decode kernels.
MAX_DECODE_QUERY_LEN = 8


@dataclass(frozen=True)
class DecodePlan:
    """The launches of a decode, and the workspace that they need."""

    decode: KernelCall
    balances: bool  # it divides sequences by the load, and writes how
    merge: KernelCall | None = None  # of the KV splits that sequences are divided into
    partials: tuple[int, int, int, int] | None = None  # [T or S, H, KV splits, D + 4]: what it reads of them
    search: KernelCall | None = None  # for KV splits that sequences share
    tile_lists: tuple[int, int, int] | None = None  # [lists, KV splits, tiles] that it fills
    wide: KernelCall | None = None  # decode of the second list, if there is one


@dataclass(frozen=True)
class PrefillPlan:
    """The launches of a prefill, and the workspace that they need."""

    schedule: KernelCall  # orders the sequences
    prefill: KernelCall
    schedule_size: int  # int32 elements
    merge: KernelCall | None = None  # of the KV splits that sequences are divided into
    partials: tuple[int, int, int, int] | None = None  # [T, H, KV splits, D + 4]: what it reads of them


def all_decode(params: AttentionParams, query_start_loc: torch.Tensor | None) -> bool:
    """Return whether the decode kernels take all sequences, or only those of one query token."""
    if query_start_loc is None:
        return True
    return params.max_query_len is not None and params.max_query_len <= MAX_DECODE_QUERY_LEN


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
    params: AttentionParams,
    arch: str,
    sm_count: int,
) -> DecodePlan:
    """Plan the decode of all sequences, or of those with one query token if `prefill` takes the others."""
    require_aligned_cache(kv_cache)
    num_tokens, num_heads, head_size = query.shape
    num_seqs, table_width = block_tables.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    singles = not all_decode(params, query_start_loc)
    longest_query = 1 if query_start_loc is None or singles else params.max_query_len or 1
    dtype = DTYPE_NAMES[query.dtype]
    window = params.sliding_window or 0
    # A KV split before a window is not whole, so there is nothing to share.
    group = num_heads // num_kv_heads
    share = params.shared_prefix and not window and not singles and num_tokens * group <= MAX_SHARED_ROWS
    cache_dtype = CACHE_DTYPE_NAMES[kv_cache.dtype]
    kernel = decode_kernel(dtype, cache_dtype, head_size, group, arch)
    # Sequences can share KV splits only if they are divided alike.
    invariant = params.batch_invariant or params.shared_prefix or singles
    split_tokens = SPLIT_TOKENS if invariant else 0
    # The width of the table bounds the KV splits, but never changes how a sequence is divided.
    longest = table_width * block_size
    visible = min(longest, window + longest_query - 1 if window else longest)
    max_splits = min(MAX_SPLITS, ceil_div(visible, split_tokens or SMALLEST_SPLIT_TOKENS))
    # Each sequence can end in a partly filled tile of query tokens, and the padding is one more.
    one_each = singles or query_start_loc is None
    row_tiles = num_seqs if one_each else num_tokens // kernel.tile_tokens + num_seqs + 1
    # Tiles of rows in a row are never more than those of whole tokens or heads.
    capacity = row_tiles * kernel.head_tiles
    items = capacity * num_kv_heads * max_splits
    subset = SINGLES if singles else ALL_SEQUENCES
    call = KernelCall(
        kernel.spec,
        (min(items, DECODE_BLOCKS_PER_SM * sm_count), 1),
        DecodeArguments(
            **_attention_numbers(query, kv_cache, block_tables, out, params),
            max_splits=max_splits,
            split_tokens=split_tokens,
            subset=subset,
            list_capacity=capacity,
        ),
    )
    if max_splits == 1:
        return DecodePlan(call, not invariant)
    merge, partials = merge_splits(out, num_seqs, window, split_tokens, max_splits, subset)
    plan = DecodePlan(call, not invariant, merge, partials)
    if not share or kernel.wide_spec is None:
        return plan
    most_wide = num_tokens * group // (MAX_SHARED_TILES * DECODE_TILE_ROWS)  # of a KV split
    wide = None
    if most_wide:
        wide_items = most_wide * num_kv_heads * max_splits
        grid = min(wide_items, DECODE_WIDE_BLOCKS_PER_SM * sm_count), 1
        wide = replace(call, spec=kernel.wide_spec, grid=grid)
    search = KernelCall(
        kernel_specs.find_shared_splits(),
        (max_splits, 1),
        FindSharedSplitsArguments(
            table_stride=block_tables.stride(0),
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            block_shift=block_shift(kv_cache),
            split_tokens=SPLIT_TOKENS,
            max_splits=max_splits,
            group=group,
            wide_rows=kernel_specs.decode_mma_rows(head_size, arch, wide=True) if wide else 0,
            capacity=capacity,
        ),
    )
    return replace(plan, search=search, tile_lists=(2 if wide else 1, max_splits, capacity), wide=wide)


def merge_splits(
    out: torch.Tensor, num_seqs: int, window: int, split_tokens: int, max_splits: int, subset: int
) -> tuple[KernelCall, tuple[int, int, int, int]]:
    """Plan the merge of KV splits; return the shape of their partials too."""
    num_tokens, num_heads, head_size = out.shape
    slots = num_seqs if subset == SINGLES else num_tokens
    spec = kernel_specs.merge_splits(DTYPE_NAMES[out.dtype])
    call = KernelCall(
        spec,
        (ceil_div(slots * num_heads * head_size // MERGE_ELEMENTS, spec.threads), 1),
        MergeSplitsArguments(
            out_token_stride=out.stride(0),
            out_head_stride=out.stride(1),
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            num_heads=num_heads,
            head_size=head_size,
            window=window,
            split_tokens=split_tokens,
            max_splits=max_splits,
            subset=subset,
            aligned=rows_aligned(out),
        ),
    )
    return call, (slots, num_heads, max_splits, head_size + PARTIAL_PADDING)


def prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    params: AttentionParams,
    arch: str,
    sm_count: int,
) -> PrefillPlan:
    """Plan the prefill of all sequences of several query tokens, and of the padding."""
    require_aligned_cache(kv_cache)
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[2]
    num_seqs = block_tables.shape[0]
    group = num_heads // num_kv_heads
    kernel = prefill_kernel(
        DTYPE_NAMES[query.dtype], CACHE_DTYPE_NAMES[kv_cache.dtype], head_size, group, arch
    )
    tile_heads = kernel.tile_heads
    head_tiles = num_kv_heads * ceil_div(group, tile_heads)
    window = params.sliding_window or 0
    blocks = kernel.blocks_per_sm * sm_count  # that run at once
    max_splits = 1
    if not (params.batch_invariant or params.shared_prefix):
        # As many as give work to all blocks. So the partials are of no more rows than two tiles a block have.
        wanted = ceil_div(blocks, ceil_div(num_tokens, kernel.tile_tokens) * head_tiles)
        longest = block_tables.shape[1] * kv_cache.shape[3]
        most = min(MAX_PREFILL_SPLITS, ceil_div(longest, SMALLEST_PREFILL_SPLIT_TOKENS))
        max_splits = min(wanted, most)
    schedule = KernelCall(
        kernel_specs.plan_prefill(),
        (1, 1),
        PlanPrefillArguments(
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            tile_tokens=kernel.tile_tokens,
            group=group,
            num_kv_heads=num_kv_heads,
            tile_heads=tile_heads,
            window=window,
            max_splits=max_splits,
            blocks=blocks,
        ),
    )
    # Each sequence can end in a partly filled tile, and the padding after the last is one more.
    tiles = num_tokens // kernel.tile_tokens + num_seqs + 1
    call = KernelCall(
        kernel.spec,
        (min(tiles * head_tiles * max_splits, blocks), 1),
        PrefillArguments(
            **_attention_numbers(query, kv_cache, block_tables, out, params),
            max_splits=max_splits,
            tile_heads=tile_heads,
        ),
    )
    plan = PrefillPlan(schedule, call, 2 * num_seqs + 6)
    if max_splits == 1:
        return plan
    merge, partials = merge_splits(out, num_seqs, window, 0, max_splits, MULTI_TOKEN)
    return replace(plan, merge=merge, partials=partials)


def merge_states(outs: torch.Tensor, out: torch.Tensor) -> KernelCall:
    num_states, num_tokens, num_heads, head_size = outs.shape
    spec = kernel_specs.merge_states(DTYPE_NAMES[outs.dtype])
    return KernelCall(
        spec,
        (ceil_div(out.numel() // MERGE_ELEMENTS, spec.threads), 1),
        MergeStatesArguments(
            num_rows=num_tokens * num_heads,
            num_states=num_states,
            head_size=head_size,
            aligned=rows_aligned(outs[0]) and rows_aligned(out),
        ),
    )


def _attention_numbers(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    params: AttentionParams,
) -> dict[str, float]:
    """Return the numbers that the arguments of decode and of prefill have in common."""
    num_tokens, num_heads, _ = query.shape
    cap = params.logits_soft_cap or 0.0
    return {
        "query_token_stride": query.stride(0),
        "query_head_stride": query.stride(1),
        "out_token_stride": out.stride(0),
        "out_head_stride": out.stride(1),
        "block_stride": kv_cache.stride(0),
        "table_stride": block_tables.stride(0),
        "num_tokens": num_tokens,
        "num_seqs": len(block_tables),
        "num_heads": num_heads,
        "num_kv_heads": kv_cache.shape[2],
        "block_shift": block_shift(kv_cache),
        "causal": params.causal,
        "window": params.sliding_window or 0,
        "query_aligned": rows_aligned(query),
        "out_aligned": rows_aligned(out),
        # Such that logits are in units of log2(e).
        "query_scale": params.scale / cap if cap else params.scale * LOG2E,
        "soft_cap_log2": cap * LOG2E,
    }
