"""Check how tensors lie in memory, as far as it decides which kernel is launched with what arguments."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def block_shift(kv_cache: torch.Tensor) -> int:
    """Return log2 of the block size, which comes before the size of a row."""
    return kv_cache.shape[-2].bit_length() - 1


def rows_aligned(tensor: torch.Tensor) -> bool:
    """Return whether every row [token, head] starts at a multiple of 16 bytes."""
    strides = tensor.stride(0) | tensor.stride(1)
    return tensor.data_ptr() % 16 == 0 and strides * tensor.element_size() % 16 == 0


def all_aligned(*tensors: torch.Tensor | None) -> bool:
    """Return whether each row, along the last dimension, begins at a multiple of 16 bytes."""
    positions = 0
    for tensor in tensors:
        if tensor is not None:
            positions |= tensor.data_ptr()
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
                positions |= stride * tensor.element_size() if size > 1 else 0
    return positions % 16 == 0


def require_aligned_cache(kv_cache: torch.Tensor) -> None:
    """Refuse a cache whose blocks do not start at multiples of 16 bytes."""
    stride_bytes = kv_cache.stride(0) * kv_cache.element_size()
    if kv_cache.data_ptr() % 16 or (kv_cache.shape[0] > 1 and stride_bytes % 16):
        raise ValueError(
            "kv_cache must start at a multiple of 16 bytes and have a block stride that is one, got address "
            f"{kv_cache.data_ptr():#x} and a stride of {stride_bytes} bytes; allocate it with torch.empty"
        )


def copy_unit(src: torch.Tensor, dst: torch.Tensor) -> int:
    """Return the bytes that a thread of copy_blocks moves at once between these caches: 16 or 1."""
    positions = src.data_ptr() | dst.data_ptr() | stride_bytes(src) | stride_bytes(dst)
    return 16 if (positions | block_bytes(src)) % 16 == 0 else 1


def block_bytes(cache: torch.Tensor) -> int:
    return cache.shape[1:].numel() * cache.element_size()


def stride_bytes(cache: torch.Tensor) -> int:
    """Return the bytes from a block to the next. A single block has none next to it, and any stride."""
    return cache.stride(0) * cache.element_size() if cache.shape[0] > 1 else 0


def runs(pairs: list[list[int]], merge: bool) -> Iterator[list[list[int]]]:
    """Divide (source, destination) pairs into ranges in which both IDs rise by one, or into single pairs."""
    start = 0
    for i in range(1, len(pairs) + 1):
        continues = (
            merge
            and i < len(pairs)
            and pairs[i][0] == pairs[i - 1][0] + 1
            and pairs[i][1] == pairs[i - 1][1] + 1
        )
        if not continues:
            yield pairs[start:i]
            start = i
