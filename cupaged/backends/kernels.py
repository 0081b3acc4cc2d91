"""The kernels in `cuda/`: which one to launch, on what grid, with which arguments.

`Kernels` decides all that from shapes alone and hands it to a `Launcher`: that of `cuda.py`, or the tests',
which runs the same sources on the CPU. Nothing on the way waits for the GPU, reads its memory or allocates
outside torch's allocator, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch

from .. import compile as kernel_compiler
from ..compile import KernelSpec
from ..params import AttentionParams

Dim3 = tuple[int, int, int]
# A tensor stands for its address, None for a null pointer; numbers carry their width.
Argument = torch.Tensor | np.int32 | np.int64 | np.float32 | None

LOG2E = 1.4426950408889634  # softmax is in base 2
THREADS = 128  # of a block of every attention kernel

# Decode (work.cuh): a sequence of up to MAX_SPLITS pieces has pieces of this many tokens, a longer one larger
# pieces: the workspace stays bounded. Pieces that spread the batch evenly may be smaller.
SPLIT_TOKENS = 512
SMALLEST_SPLIT_TOKENS = 128
MAX_SPLITS = 64
DECODE_TILE_ROWS = 16  # of the tensor core kernel: (token, head) pairs
# Blocks to launch per multiprocessor: 2 to 6 fit at once, and more even out pieces of different length.
DECODE_BLOCKS_PER_SM = 8
# Up to this many query tokens a sequence go through the decode kernels.
MAX_DECODE_QUERY_LEN = 8

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
CACHE_DTYPE_NAMES = DTYPE_NAMES | {
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.int8: "int8",
}


class Launcher(Protocol):
    """Runs a kernel. All tensors of a launch are on one device."""

    def launch(
        self, spec: KernelSpec, grid: Dim3, block: Dim3, smem_bytes: int, args: Sequence[Argument]
    ) -> None:
        """Run ``spec.entry`` on the current stream.

        Args:
            smem_bytes: dynamic shared memory of a block.
            args: the entry point's parameters in order.
        """

    def sm_count(self, device: torch.device) -> int:
        """Streaming multiprocessors of the device."""

    def arch(self, device: torch.device) -> str:
        """What kernels for the device are compiled for: "75", "90a"."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Workspace that lives at least until what is launched now has run."""


class Kernels:
    """The backend's functions over a launcher."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def reshape_and_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        _require_aligned_cache(kv_cache)
        num_tokens, num_kv_heads, head_size = key.shape
        self._launcher.launch(
            kernel_compiler.spec_reshape_and_cache(DTYPE_NAMES[key.dtype], CACHE_DTYPE_NAMES[kv_cache.dtype]),
            (num_tokens, 1, 1),
            (128, 1, 1),
            0,
            (
                key,
                value,
                kv_cache,
                slot_mapping,
                k_scale,
                v_scale,
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

    def copy_blocks(self, kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
        block_bytes = kv_cache.shape[1:].numel() * kv_cache.element_size()
        stride_bytes = kv_cache.stride(0) * kv_cache.element_size()
        aligned = (block_bytes | stride_bytes | kv_cache.data_ptr()) % 16 == 0
        unit_bytes = 16 if aligned else 1
        units = block_bytes // unit_bytes
        threads = 256
        # A few units a thread keep enough loads in flight; large blocks are shared by several CUDA blocks.
        self._launcher.launch(
            kernel_compiler.spec_copy_blocks(unit_bytes),
            (block_mapping.shape[0], min(64, _ceil_div(units, 4 * threads)), 1),
            (threads, 1, 1),
            0,
            (kv_cache, block_mapping, np.int64(stride_bytes // unit_bytes), np.int64(units)),
        )

    def paged_attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None:
        _require_aligned_cache(kv_cache)
        longest_query = params.max_query_len or MAX_DECODE_QUERY_LEN + 1
        if query_start_loc is None:
            longest_query = 1
        if query_start_loc is None or longest_query <= MAX_DECODE_QUERY_LEN:
            self._decode(
                query, kv_cache, block_tables, seq_lens, query_start_loc, longest_query, out, lse, params
            )
        else:
            self._prefill(query, kv_cache, block_tables, seq_lens, query_start_loc, out, lse, params)

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        longest_query: int,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None:
        num_tokens, num_heads, head_size = query.shape
        num_seqs = seq_lens.shape[0]
        num_kv_heads, block_size = kv_cache.shape[2:4]
        dtype, cache_dtype = DTYPE_NAMES[query.dtype], CACHE_DTYPE_NAMES[kv_cache.dtype]
        group = num_heads // num_kv_heads
        arch = self._launcher.arch(query.device)
        window = params.sliding_window or 0
        # A piece before a window is not whole, so there is nothing to share.
        share = params.shared_prefix and not window
        kernel = _decode_kernel(dtype, cache_dtype, head_size, group, longest_query, share, arch)
        # Sequences can share pieces only if they are divided alike.
        invariant = params.batch_invariant or share
        split_tokens = SPLIT_TOKENS if invariant else 0
        # The width of the table bounds the pieces, but never changes how a sequence is divided.
        longest = block_tables.shape[1] * block_size
        visible = min(longest, window + longest_query - 1 if window else longest)
        max_splits = min(MAX_SPLITS, _ceil_div(visible, split_tokens or SMALLEST_SPLIT_TOKENS))
        # Each sequence can end in a partly filled tile of query tokens, and the padding is one more.
        row_tiles = num_seqs if query_start_loc is None else num_tokens // kernel.tile_tokens + num_seqs + 1
        items = row_tiles * num_kv_heads * kernel.head_tiles * max_splits
        partial_out = partial_lse = split_size = None
        if max_splits > 1:
            rows = (num_tokens, num_heads, max_splits)
            partial_out = self._launcher.empty((*rows, head_size), torch.float32, query.device)
            partial_lse = self._launcher.empty(rows, torch.float32, query.device)
        if not invariant:
            split_size = self._launcher.empty((1,), torch.int32, query.device)
        tile_arguments: tuple[Argument, ...] = ()
        if kernel.can_share:
            tile_arguments = (None, None)
            if share and max_splits > 1 and kernel.tile_tokens > 1:
                tile_arguments = self._find_shared_pieces(
                    block_tables,
                    seq_lens,
                    query_start_loc,
                    num_tokens,
                    _block_shift(kv_cache),
                    max_splits,
                    kernel,
                    row_tiles,
                )
        query_scale, soft_cap = _logit_factors(params)
        self._launcher.launch(
            kernel.spec,
            (min(items, DECODE_BLOCKS_PER_SM * self._launcher.sm_count(query.device)), 1, 1),
            (kernel.spec.threads, 1, 1),
            kernel.spec.dynamic_shared_memory,
            (
                query,
                kv_cache,
                block_tables,
                seq_lens,
                query_start_loc,
                params.alibi_slopes,
                params.sinks,
                params.k_scale,
                params.v_scale,
                out,
                lse,
                partial_out,
                partial_lse,
                split_size,
                *tile_arguments,
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
                *((np.int32(row_tiles),) if kernel.can_share else ()),
                query_scale,
                soft_cap,
                np.int32(_rows_aligned(query)),
                np.int32(_rows_aligned(out)),
            ),
        )
        if max_splits == 1:
            return
        self._launcher.launch(
            kernel_compiler.spec_merge_splits(dtype),
            (_ceil_div(out.numel() // 8, THREADS), 1, 1),
            (THREADS, 1, 1),
            0,
            (
                partial_out,
                partial_lse,
                seq_lens,
                query_start_loc,
                split_size,
                params.sinks,
                out,
                lse,
                np.int64(out.stride(0)),
                np.int64(out.stride(1)),
                np.int32(num_tokens),
                np.int32(num_seqs),
                np.int32(num_heads),
                np.int32(head_size),
                np.int32(window),
                np.int32(split_tokens),
                np.int32(max_splits),
                np.int32(_rows_aligned(out)),
            ),
        )

    def _find_shared_pieces(
        self,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        num_tokens: int,
        block_shift: int,
        max_splits: int,
        kernel: DecodeKernel,
        capacity: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tiles of query rows of every piece: their counts, and lists of ``capacity``."""
        device = block_tables.device
        counts = self._launcher.empty((max_splits,), torch.int32, device)
        tiles = self._launcher.empty((max_splits, capacity), torch.int32, device)
        self._launcher.launch(
            kernel_compiler.spec_find_shared_pieces(),
            (max_splits, 1, 1),
            (THREADS, 1, 1),
            0,
            (
                block_tables,
                seq_lens,
                query_start_loc,
                counts,
                tiles,
                np.int64(block_tables.stride(0)),
                np.int32(num_tokens),
                np.int32(seq_lens.shape[0]),
                np.int32(block_shift),
                np.int32(SPLIT_TOKENS),
                np.int32(max_splits),
                np.int32(kernel.tile_tokens),
                np.int32(capacity),
            ),
        )
        return counts, tiles

    def _prefill(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None:
        num_tokens, num_heads, head_size = query.shape
        num_kv_heads = kv_cache.shape[2]
        num_seqs = seq_lens.shape[0]
        group = num_heads // num_kv_heads
        rows = _prefill_tile_rows(head_size * query.element_size())
        tile_heads = min(_next_power_of_two(group), rows)
        # Each sequence can end in a partly filled tile, and the padding after the last is one more.
        tiles = num_tokens // (rows // tile_heads) + num_seqs + 1
        query_scale, soft_cap = _logit_factors(params)
        self._launcher.launch(
            kernel_compiler.spec_paged_prefill(
                DTYPE_NAMES[query.dtype], CACHE_DTYPE_NAMES[kv_cache.dtype], head_size
            ),
            (tiles, num_kv_heads * _ceil_div(group, tile_heads), 1),
            (THREADS, 1, 1),
            0,
            (
                query,
                kv_cache,
                block_tables,
                seq_lens,
                query_start_loc,
                params.alibi_slopes,
                params.sinks,
                params.k_scale,
                params.v_scale,
                out,
                lse,
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
                np.int32(params.sliding_window or 0),
                query_scale,
                soft_cap,
                np.int32(_rows_aligned(query)),
                np.int32(_rows_aligned(out)),
            ),
        )

    def merge_attention_states(
        self, outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        num_states, num_tokens, num_heads, head_size = outs.shape
        self._launcher.launch(
            kernel_compiler.spec_merge_states(DTYPE_NAMES[outs.dtype]),
            (_ceil_div(out.numel() // 8, THREADS), 1, 1),
            (THREADS, 1, 1),
            0,
            (
                outs,
                lses,
                out,
                lse,
                np.int64(num_tokens * num_heads),
                np.int32(num_states),
                np.int32(head_size),
                np.int32(_rows_aligned(outs[0]) and _rows_aligned(out)),
            ),
        )

    def swap_blocks(self, src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
        # One copy a run of neighbouring blocks: the copy engine is slow on small pieces.
        merge_runs = src.is_contiguous() and dst.is_contiguous()
        for first_src, first_dst, count in _runs(block_mapping.tolist(), merge_runs):
            dst[first_dst : first_dst + count].copy_(src[first_src : first_src + count], non_blocking=True)


@dataclass(frozen=True)
class DecodeKernel:
    """A decode kernel and how it tiles the query rows of a KV head."""

    spec: KernelSpec
    tile_tokens: int  # query tokens of a tile
    head_tiles: int  # tiles that the query heads of a KV head take
    can_share: bool  # a tile may hold query tokens of several sequences


@cache
def _decode_kernel(
    dtype: str, cache_dtype: str, head_size: int, group: int, longest_query: int, share: bool, arch: str
) -> DecodeKernel:
    """The choice between the two decode kernels.

    Tensor cores where they take 16 bits and where keys serve more than one query row; else CUDA cores.
    """
    if dtype != "fp32" and (group * longest_query > 1 or share) and kernel_compiler.has_mma(arch):
        spec = kernel_compiler.spec_paged_decode_mma(dtype, cache_dtype, head_size, arch)
        heads = min(group, DECODE_TILE_ROWS)
        return DecodeKernel(spec, DECODE_TILE_ROWS // heads, _ceil_div(group, heads), True)
    tiles = kernel_compiler.head_tiles(cache_dtype)
    tile = next((tile for tile in tiles if tile >= group), tiles[-1])
    spec = kernel_compiler.spec_paged_decode(dtype, cache_dtype, head_size, tile)
    return DecodeKernel(spec, 1, _ceil_div(group, tile), False)


def _runs(pairs: list[list[int]], merge: bool) -> Iterator[tuple[int, int, int]]:
    """(source, destination, count) of runs in which both ids rise by one, or of single pairs."""
    start = 0
    for i in range(1, len(pairs) + 1):
        continues = (
            merge
            and i < len(pairs)
            and pairs[i][0] == pairs[i - 1][0] + 1
            and pairs[i][1] == pairs[i - 1][1] + 1
        )
        if not continues:
            yield pairs[start][0], pairs[start][1], i - start
            start = i


def _logit_factors(params: AttentionParams) -> tuple[np.float32, np.float32]:
    """The query's factor, and the soft cap or 0, such that logits come out in units of log2(e)."""
    cap = params.logits_soft_cap or 0.0
    return np.float32(params.scale / cap if cap else params.scale * LOG2E), np.float32(cap * LOG2E)


def _prefill_tile_rows(row_bytes: int) -> int:
    """Query rows of a tile of paged_prefill: as many as leave its shared memory below 48 KiB."""
    return 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _block_shift(kv_cache: torch.Tensor) -> int:
    return kv_cache.shape[3].bit_length() - 1


def _rows_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row [token, head] starts at a multiple of 16 bytes."""
    strides = tensor.stride(0) | tensor.stride(1)
    return tensor.data_ptr() % 16 == 0 and strides * tensor.element_size() % 16 == 0


def _require_aligned_cache(kv_cache: torch.Tensor) -> None:
    stride_bytes = kv_cache.stride(0) * kv_cache.element_size()
    if kv_cache.data_ptr() % 16 or (kv_cache.shape[0] > 1 and stride_bytes % 16):
        raise ValueError(
            "kv_cache must start at a multiple of 16 bytes and have a block stride that is one, got address "
            f"{kv_cache.data_ptr():#x} and a stride of {stride_bytes} bytes; allocate it with torch.empty"
        )
