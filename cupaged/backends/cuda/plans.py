"""Plan the launches of a call: which kernel in `cuda/`, on what grid, with which arguments.

All of it follows from the layouts of the tensors, the settings and the GPU; nothing here reads memory or
launches, so that `kernels.py` can keep a plan for the calls that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ...params import AttentionParams
from . import specs as kernel_specs
from .kernel_choice import DECODE_TILE_ROWS, ceil_div, decode_kernel, prefill_kernel
from .specs import KernelSpec

Number = np.int32 | np.int64 | np.float32  # carries its width

LOG2E = 1.4426950408889634  # softmax is in base 2
THREADS = 128  # of a block of every attention kernel

# Decode (work.cuh): a sequence of up to MAX_SPLITS pieces has pieces of this many tokens, a longer one larger
# pieces: the workspace stays bounded. Pieces that spread the batch evenly may be smaller.
SPLIT_TOKENS = 512
SMALLEST_SPLIT_TOKENS = 128
MAX_SPLITS = 64
MAX_SHARED_TILES = 2  # of those on a shared piece; where they would be more, they are larger
MAX_SHARED_ROWS = 1 << 26  # of a KV head, that lists of tiles can name (pack_tile in work.cuh)
# Blocks to launch per multiprocessor: 2 to 6 fit at once, and more even out pieces of different length.
DECODE_BLOCKS_PER_SM = 8
DECODE_WIDE_BLOCKS_PER_SM = 1  # that fit at once; the pieces are of equal length
MAX_PREFILL_SPLITS = 16
SMALLEST_PREFILL_SPLIT_TOKENS = 512  # kSmallestPiece in plan_prefill.cu
ALL_SEQUENCES, SINGLES, MULTI_TOKEN = range(3)  # Subset in work.cuh
# Up to this many query tokens a sequence go through the decode kernels.
MAX_DECODE_QUERY_LEN = 8

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
CACHE_DTYPE_NAMES = DTYPE_NAMES | {
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class KernelCall:
    """A launch without its addresses, over blocks of ``spec.threads``."""

    spec: KernelSpec
    grid: tuple[int, int]
    numbers: tuple[Number, ...]  # the entry point's parameters after its pointers


@dataclass(frozen=True)
class DecodePlan:
    """The launches of a decode, and the workspace that they need."""

    decode: KernelCall
    can_share: bool  # the kernel takes lists of tiles, or none
    balances: bool  # it divides sequences by the load, and writes how
    merge: KernelCall | None = None  # of the pieces that sequences are divided into
    records: tuple[int, int, int, int] | None = None  # [T or S, H, pieces, D + 4]: what it reads of them
    search: KernelCall | None = None  # for pieces that sequences share
    tile_lists: tuple[int, int, int] | None = None  # [lists, pieces, tiles] that it fills
    wide: KernelCall | None = None  # decode of the second list, if there is one


@dataclass(frozen=True)
class PrefillPlan:
    """The launches of a prefill, and the workspace that they need."""

    schedule: KernelCall  # orders the sequences
    prefill: KernelCall
    schedule_size: int  # int32 elements
    merge: KernelCall | None = None  # of the pieces that sequences are divided into
    records: tuple[int, int, int, int] | None = None  # [T, H, pieces, D + 4]: what it reads of them


def reshape_and_cache(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor) -> KernelCall:
    _require_aligned_cache(kv_cache)
    num_tokens, num_kv_heads, head_size = key.shape
    return KernelCall(
        kernel_specs.reshape_and_cache(DTYPE_NAMES[key.dtype], CACHE_DTYPE_NAMES[kv_cache.dtype]),
        (num_tokens, 1),
        (
            np.int64(key.stride(0)),
            np.int64(key.stride(1)),
            np.int64(value.stride(0)),
            np.int64(value.stride(1)),
            np.int64(kv_cache.stride(0)),
            np.int32(num_kv_heads),
            np.int32(head_size),
            np.int32(_block_shift(kv_cache)),
            np.int32(_rows_aligned(key) and _rows_aligned(value)),
        ),
    )


def copy_blocks(src: torch.Tensor, dst: torch.Tensor, num_pairs: int) -> KernelCall:
    unit_bytes = copy_unit(src, dst)
    units = _block_bytes(src) // unit_bytes
    spec = kernel_specs.copy_blocks(unit_bytes)
    # A few units a thread keep enough loads in flight; large blocks are shared by several CUDA blocks.
    return KernelCall(
        spec,
        (num_pairs, min(64, ceil_div(units, 4 * spec.threads))),
        (
            np.int64(_stride_bytes(src) // unit_bytes),
            np.int64(_stride_bytes(dst) // unit_bytes),
            np.int64(units),
        ),
    )


def copy_unit(src: torch.Tensor, dst: torch.Tensor) -> int:
    """Bytes that a thread of copy_blocks moves at once between these caches: 16 or 1."""
    positions = src.data_ptr() | dst.data_ptr() | _stride_bytes(src) | _stride_bytes(dst)
    return 16 if (positions | _block_bytes(src)) % 16 == 0 else 1


def _block_bytes(cache: torch.Tensor) -> int:
    return cache.shape[1:].numel() * cache.element_size()


def _stride_bytes(cache: torch.Tensor) -> int:
    """From a block to the next. A single block has none next to it, and any stride."""
    return cache.stride(0) * cache.element_size() if cache.shape[0] > 1 else 0


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
    _require_aligned_cache(kv_cache)
    num_tokens, num_heads, head_size = query.shape
    num_seqs, table_width = block_tables.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    singles = not all_decode(params, query_start_loc)
    longest_query = 1 if query_start_loc is None or singles else params.max_query_len or 1
    dtype = DTYPE_NAMES[query.dtype]
    window = params.sliding_window or 0
    # A piece before a window is not whole, so there is nothing to share.
    group = num_heads // num_kv_heads
    share = params.shared_prefix and not window and not singles and num_tokens * group <= MAX_SHARED_ROWS
    cache_dtype = CACHE_DTYPE_NAMES[kv_cache.dtype]
    kernel = decode_kernel(dtype, cache_dtype, head_size, group, arch)
    # Sequences can share pieces only if they are divided alike.
    invariant = params.batch_invariant or params.shared_prefix or singles
    split_tokens = SPLIT_TOKENS if invariant else 0
    # The width of the table bounds the pieces, but never changes how a sequence is divided.
    longest = table_width * block_size
    visible = min(longest, window + longest_query - 1 if window else longest)
    max_splits = min(MAX_SPLITS, ceil_div(visible, split_tokens or SMALLEST_SPLIT_TOKENS))
    # Each sequence can end in a partly filled tile of query tokens, and the padding is one more.
    one_each = singles or query_start_loc is None
    row_tiles = num_seqs if one_each else num_tokens // kernel.tile_tokens + num_seqs + 1
    items = row_tiles * num_kv_heads * kernel.head_tiles * max_splits
    call = KernelCall(
        kernel.spec,
        (min(items, DECODE_BLOCKS_PER_SM * sm_count), 1),
        (
            np.int64(query.stride(0)),
            np.int64(query.stride(1)),
            np.int64(out.stride(0)),
            np.int64(out.stride(1)),
            np.int64(kv_cache.stride(0)),
            np.int64(block_tables.stride(0)),
            np.int32(num_tokens),
            np.int32(num_seqs),
            np.int32(num_heads),
            np.int32(num_kv_heads),
            np.int32(_block_shift(kv_cache)),
            np.int32(params.causal),
            np.int32(window),
            np.int32(split_tokens),
            np.int32(max_splits),
            np.int32(SINGLES if singles else ALL_SEQUENCES),
            *((np.int32(row_tiles * kernel.head_tiles),) if kernel.can_share else ()),
            *_logit_factors(params),
            np.int32(_rows_aligned(query)),
            np.int32(_rows_aligned(out)),
        ),
    )
    if max_splits == 1:
        return DecodePlan(call, kernel.can_share, not invariant)
    subset = SINGLES if singles else ALL_SEQUENCES
    merge, records = _merge(out, num_seqs, window, split_tokens, max_splits, subset)
    plan = DecodePlan(call, kernel.can_share, not invariant, merge, records)
    if not share or kernel.wide_spec is None:
        return plan
    # Tiles of rows in a row are never more than those of whole tokens or heads.
    capacity = row_tiles * kernel.head_tiles
    most_wide = num_tokens * group // (MAX_SHARED_TILES * DECODE_TILE_ROWS)  # of a piece
    wide = None
    if most_wide:
        wide_items = most_wide * num_kv_heads * max_splits
        grid = min(wide_items, DECODE_WIDE_BLOCKS_PER_SM * sm_count), 1
        wide = replace(call, spec=kernel.wide_spec, grid=grid)
    search = KernelCall(
        kernel_specs.find_shared_pieces(),
        (max_splits, 1),
        (
            np.int64(block_tables.stride(0)),
            np.int32(num_tokens),
            np.int32(num_seqs),
            np.int32(_block_shift(kv_cache)),
            np.int32(SPLIT_TOKENS),
            np.int32(max_splits),
            np.int32(group),
            np.int32(kernel_specs.decode_mma_rows(head_size, arch, wide=True) if wide else 0),
            np.int32(capacity),
        ),
    )
    return replace(plan, search=search, tile_lists=(2 if wide else 1, max_splits, capacity), wide=wide)


def _merge(
    out: torch.Tensor, num_seqs: int, window: int, split_tokens: int, max_splits: int, subset: int
) -> tuple[KernelCall, tuple[int, int, int, int]]:
    """Plan the merge of KV splits; return the shape of their partials too."""
    num_tokens, num_heads, head_size = out.shape
    slots = num_seqs if subset == SINGLES else num_tokens
    call = KernelCall(
        kernel_specs.merge_splits(DTYPE_NAMES[out.dtype]),
        (ceil_div(slots * num_heads * head_size // 8, THREADS), 1),
        (
            np.int64(out.stride(0)),
            np.int64(out.stride(1)),
            np.int32(num_tokens),
            np.int32(num_seqs),
            np.int32(num_heads),
            np.int32(head_size),
            np.int32(window),
            np.int32(split_tokens),
            np.int32(max_splits),
            np.int32(subset),
            np.int32(_rows_aligned(out)),
        ),
    )
    return call, (slots, num_heads, max_splits, head_size + 4)


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
    _require_aligned_cache(kv_cache)
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
        # As many as give work to all blocks. So the records are of no more rows than two tiles a block have.
        wanted = ceil_div(blocks, ceil_div(num_tokens, kernel.tile_tokens) * head_tiles)
        longest = block_tables.shape[1] * kv_cache.shape[3]
        most = min(MAX_PREFILL_SPLITS, ceil_div(longest, SMALLEST_PREFILL_SPLIT_TOKENS))
        max_splits = min(wanted, most)
    schedule = KernelCall(
        kernel_specs.plan_prefill(),
        (1, 1),
        (
            np.int32(num_tokens),
            np.int32(num_seqs),
            np.int32(kernel.tile_tokens),
            np.int32(group),
            np.int32(num_kv_heads),
            np.int32(tile_heads),
            np.int32(window),
            np.int32(max_splits),
            np.int32(blocks),
        ),
    )
    # Each sequence can end in a partly filled tile, and the padding after the last is one more.
    tiles = num_tokens // kernel.tile_tokens + num_seqs + 1
    call = KernelCall(
        kernel.spec,
        (min(tiles * head_tiles * max_splits, blocks), 1),
        (
            np.int64(query.stride(0)),
            np.int64(query.stride(1)),
            np.int64(out.stride(0)),
            np.int64(out.stride(1)),
            np.int64(kv_cache.stride(0)),
            np.int64(block_tables.stride(0)),
            np.int32(num_tokens),
            np.int32(num_seqs),
            np.int32(num_heads),
            np.int32(num_kv_heads),
            np.int32(tile_heads),
            np.int32(_block_shift(kv_cache)),
            np.int32(params.causal),
            np.int32(window),
            np.int32(max_splits),
            *_logit_factors(params),
            np.int32(_rows_aligned(query)),
            np.int32(_rows_aligned(out)),
        ),
    )
    plan = PrefillPlan(schedule, call, 2 * num_seqs + 6)
    if max_splits == 1:
        return plan
    merge, records = _merge(out, num_seqs, window, 0, max_splits, MULTI_TOKEN)
    return replace(plan, merge=merge, records=records)


def merge_states(outs: torch.Tensor, out: torch.Tensor) -> KernelCall:
    num_states, num_tokens, num_heads, head_size = outs.shape
    return KernelCall(
        kernel_specs.merge_states(DTYPE_NAMES[outs.dtype]),
        (ceil_div(out.numel() // 8, THREADS), 1),
        (
            np.int64(num_tokens * num_heads),
            np.int32(num_states),
            np.int32(head_size),
            np.int32(_rows_aligned(outs[0]) and _rows_aligned(out)),
        ),
    )


def _logit_factors(params: AttentionParams) -> tuple[np.float32, np.float32]:
    """Return the query's factor, and the soft cap or 0, such that logits are in units of log2(e)."""
    cap = params.logits_soft_cap or 0.0
    return np.float32(params.scale / cap if cap else params.scale * LOG2E), np.float32(cap * LOG2E)


def _block_shift(kv_cache: torch.Tensor) -> int:
    return kv_cache.shape[3].bit_length() - 1


def _rows_aligned(tensor: torch.Tensor) -> bool:
    """Return whether every row [token, head] starts at a multiple of 16 bytes."""
    strides = tensor.stride(0) | tensor.stride(1)
    return tensor.data_ptr() % 16 == 0 and strides * tensor.element_size() % 16 == 0


def _require_aligned_cache(kv_cache: torch.Tensor) -> None:
    stride_bytes = kv_cache.stride(0) * kv_cache.element_size()
    if kv_cache.data_ptr() % 16 or (kv_cache.shape[0] > 1 and stride_bytes % 16):
        raise ValueError(
            "kv_cache must start at a multiple of 16 bytes and have a block stride that is one, got address "
            f"{kv_cache.data_ptr():#x} and a stride of {stride_bytes} bytes; allocate it with torch.empty"
        )
