"""Choose the attention kernel of a call, and how it tiles the query rows of a KV head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from . import specs as kernel_specs
from .constants import DECODE_TILE_ROWS, PREFILL_WGMMA_ROWS
from .layouts import ceil_div
from .specs import KernelSpec

# Blocks of prefill to launch per multiprocessor: the most that fit on any, by their registers and shared
# memory (`python -m cupaged.compile`). Where fewer fit, the others come last and find no tile left.
PREFILL_BLOCKS_PER_SM = 4
PREFILL_MMA_BLOCKS_PER_SM = 2
PREFILL_MMA_SMALL_BLOCKS_PER_SM = 3  # head sizes up to 64

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
CACHE_DTYPE_NAMES = DTYPE_NAMES | {
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class DecodeKernel:
    """A decode kernel and how it tiles the query rows of a KV head."""

    spec: KernelSpec
    tile_tokens: int  # query tokens of a tile
    head_tiles: int  # tiles that the query heads of a KV head take
    wide_spec: KernelSpec | None = None  # over larger tiles, for KV splits that many query rows share


@cache
def decode_kernel(dtype: str, cache_dtype: str, head_size: int, group: int, arch: str) -> DecodeKernel:
    """Choose between the decode kernels: tensor cores where they take 16 bits, else CUDA cores.

    A single query row leaves 15 of 16 idle, which should not show, though no GPU has measured it yet: a tile
    of 16 keys of 128 elements takes 32 products of 8 cycles on one of four tensor cores, and 550 cycles to
    arrive at a multiprocessor's share of an H100's memory.
    """
    if dtype != "fp32" and kernel_specs.has_mma(arch):
        spec = kernel_specs.paged_decode_mma(dtype, cache_dtype, head_size, arch)
        wide = kernel_specs.paged_decode_mma(dtype, cache_dtype, head_size, arch, wide=True)
        heads = min(group, DECODE_TILE_ROWS)
        return DecodeKernel(spec, DECODE_TILE_ROWS // heads, ceil_div(group, heads), wide)
    tiles = kernel_specs.head_tiles(cache_dtype)
    tile = next((tile for tile in tiles if tile >= group), tiles[-1])
    spec = kernel_specs.paged_decode(dtype, cache_dtype, head_size, tile)
    return DecodeKernel(spec, 1, ceil_div(group, tile))


@dataclass(frozen=True)
class PrefillKernel:
    """A prefill kernel and how it tiles the query rows of a KV head."""

    spec: KernelSpec
    tile_tokens: int  # query tokens of a tile
    tile_heads: int  # query heads of a tile
    blocks_per_sm: int  # that fit on one at most


@cache
def prefill_kernel(dtype: str, cache_dtype: str, head_size: int, group: int, arch: str) -> PrefillKernel:
    """Choose between the prefill kernels: tensor cores for 16 bits, Hopper's where the cache has 16 too."""
    if kernel_specs.has_wgmma(arch) and dtype != "fp32" and cache_dtype == dtype:
        spec = kernel_specs.paged_prefill_wgmma(dtype, head_size)
        rows = PREFILL_WGMMA_ROWS
        blocks = 1
    elif dtype != "fp32" and kernel_specs.has_mma(arch):
        spec = kernel_specs.paged_prefill_mma(dtype, cache_dtype, head_size, arch)
        rows = kernel_specs.prefill_mma_rows(head_size)
        blocks = PREFILL_MMA_BLOCKS_PER_SM if head_size > 64 else PREFILL_MMA_SMALL_BLOCKS_PER_SM
    else:
        spec = kernel_specs.paged_prefill(dtype, cache_dtype, head_size)
        rows = _prefill_tile_rows(head_size * (4 if dtype == "fp32" else 2))
        blocks = PREFILL_BLOCKS_PER_SM
    tile_heads = min(group, rows)
    return PrefillKernel(spec, rows // tile_heads, tile_heads, blocks)


@dataclass(frozen=True)
class MlaKernel:
    """A kernel of latent attention and how it tiles the query rows."""

    spec: KernelSpec
    tile_rows: int


@cache
def mla_kernel(
    dtype: str, key_size: int, value_size: int, num_heads: int, arch: str, prefills: bool
) -> MlaKernel:
    """Choose the kernel of latent attention: on tensor cores with as many rows as a token has, or many.

    What a sequence of one token is computed with depends on nothing else, so that it has the same bits in
    any batch.
    """
    sizes = kernel_specs.mla_sizes(key_size, value_size)
    if dtype == "fp32" or not kernel_specs.has_mma(arch):
        spec = kernel_specs.mla_attention(dtype, *sizes)
    else:
        most = kernel_specs.MLA_TILE_ROWS[-1]
        rows = next((rows for rows in kernel_specs.MLA_TILE_ROWS if rows >= num_heads), most)
        spec = kernel_specs.mla_attention_mma(dtype, *sizes, most if prefills else rows, arch)
    return MlaKernel(spec, int(dict(spec.defines)["CUPAGED_TILE_ROWS"]))


def _prefill_tile_rows(row_bytes: int) -> int:
    """Return the query rows of a tile of paged_prefill: as many as fit into 48 KiB of shared memory."""
    return 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
