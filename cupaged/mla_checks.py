"""Check the arguments of multi-head latent attention, as `checks` does those of attention.

Letters in shapes: T tokens, S sequences, H query heads, Dk and Dv sizes of keys and values, B block size.
"""

from __future__ import annotations

import torch

from .checks import DTYPES, batch, block_size, blocks_contiguous, last_dim_contiguous, rows_apart, tensor
from .layout import once_per_layout

MAX_KEY_SIZE = 576
MAX_VALUE_SIZE = 512


def latent_cache(name: str, value: torch.Tensor, sizes: dict[str, int]) -> None:
    """Check a cache of latents [num_blocks, B, Dk], in which only the stride between blocks is free."""
    tensor(name, value, "num_blocks B Dk", sizes, dtype=DTYPES)
    blocks_contiguous(name, value)
    block_size(name, sizes["B"])
    _size(f"{name} has keys", sizes["Dk"], MAX_KEY_SIZE)


def _size(what: str, size: int, largest: int) -> None:
    if size % 8 or not 0 < size <= largest:
        raise ValueError(f"{what} of size {size}; it must be a multiple of 8 and at most {largest}")


def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `mla_attention`."""
    sizes: dict[str, int] = {}
    latent_cache("kv_cache", kv_cache, sizes)
    device = kv_cache.device
    tensor("query", query, "T H Dk", sizes, dtype=kv_cache.dtype, device=device)
    last_dim_contiguous("query", query)
    batch(block_tables, seq_lens, query_start_loc, sizes, device)
    tensor("out", out, "T H Dv", sizes, dtype=query.dtype, device=device)
    last_dim_contiguous("out", out)
    rows_apart("out", out)
    if sizes["Dv"] > sizes["Dk"]:
        raise ValueError(
            f"out has values of size {sizes['Dv']}, which are the first elements of kv_cache's keys of size "
            f"{sizes['Dk']}; pass a value_size of at most {sizes['Dk']}"
        )
    _size("out has values", sizes["Dv"], MAX_VALUE_SIZE)


attention_once = once_per_layout(attention)


def cache_write(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `concat_and_cache_mla`."""
    sizes: dict[str, int] = {}
    latent_cache("kv_cache", kv_cache, sizes)
    device = kv_cache.device
    for name, value, size in (("kv_c", kv_c, "Dv"), ("k_pe", k_pe, "Dr")):
        tensor(name, value, f"T {size}", sizes, dtype=kv_cache.dtype, device=device)
        last_dim_contiguous(name, value)
        if sizes[size] % 8:
            raise ValueError(f"{name} has rows of {sizes[size]} elements; it must be a multiple of 8")
    if sizes["Dv"] + sizes["Dr"] != sizes["Dk"]:
        raise ValueError(
            f"kv_c and k_pe have rows of {sizes['Dv']} and {sizes['Dr']} elements, which must be as many as "
            f"kv_cache's {sizes['Dk']} together"
        )
    tensor("slot_mapping", slot_mapping, "T", sizes, dtype=torch.int64, device=device)
    last_dim_contiguous("slot_mapping", slot_mapping)


cache_write_once = once_per_layout(cache_write)
