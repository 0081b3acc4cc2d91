"""Check the public functions' arguments. Each check raises a ValueError that names the argument.

Letters in shapes: T tokens, S sequences, H query heads, Hkv KV heads, D head size, B block size. A letter is
bound to the first size it occurs with; later sizes must agree.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real

import torch

from .dlpack import Array, as_tensor
from .layout import once_per_layout
from .quantisation import LARGEST

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTISED = tuple(LARGEST)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
CASTS = {torch.int32: "int", torch.int64: "long"}  # tensor methods that cast to an integer dtype
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_HEAD_SIZE = 256
SCALE_RANGE = (2.0**-126, 2.0**126)  # the GPU flushes smaller numbers to 0; so for the reciprocal


@cache
def device_checks_enabled() -> bool:
    """Return whether ``CUPAGED_CHECK=1`` asks to check ids and scales on the GPU, which synchronises."""
    return os.environ.get("CUPAGED_CHECK", "") not in ("", "0")


def tensor(
    name: str,
    value: torch.Tensor,
    dims: str,
    sizes: dict[str, int],
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Check a tensor's rank, sizes, dtype and device.

    Args:
        dims: names of the dimensions, separated by spaces: ``"T H D"``; a number is an exact size.
        sizes: sizes bound so far; new names are added.
    """
    names = dims.split()
    shape = value.shape
    if len(shape) != len(names):
        raise ValueError(
            f"{name} must have {len(names)} dimensions [{', '.join(names)}], got shape {list(shape)}"
        )
    for dim, letter in enumerate(names):
        expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, shape[dim])
        if shape[dim] != expected:
            wanted = f"{letter} in dimension {dim}" if letter.isdigit() else f"{letter} = {expected}"
            raise ValueError(f"{name} must be [{', '.join(names)}] with {wanted}, got shape {list(shape)}")
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    if value.dtype not in allowed:
        wanted = " or ".join(str(d) for d in allowed)
        cast = CASTS.get(allowed[0]) if value.dtype in INTEGERS else None
        remedy = f"; pass {name}.{cast}()" if cast else ""
        raise ValueError(f"{name} must be {wanted}, got {value.dtype}{remedy}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other arguments, got {value.device}")


def last_dim_contiguous(name: str, value: torch.Tensor) -> None:
    """Check that the last dimension has stride 1."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {list(value.stride())}; "
            f"pass {name}.contiguous()"
        )


def rows_apart(name: str, value: torch.Tensor) -> None:
    """Check that no two elements of a tensor [T, H, D], contiguous in D, share memory."""
    (tokens, heads, size), (token_stride, head_stride, _) = value.shape, value.stride()
    # The usual cases. The first does not depend on T, which may be a symbol.
    if (head_stride >= size or heads <= 1) and (
        token_stride >= (heads - 1) * head_stride + size or tokens <= 1
    ):
        return
    if token_stride >= size and head_stride >= (tokens - 1) * token_stride + size:
        return
    # Other strides may interleave the rows: compare each head's offset with the nearest tokens' offsets.
    for h in range(heads if tokens else 0):
        before = min(h * head_stride // token_stride if token_stride else 0, tokens - 1)
        for t in (before, min(before + 1, tokens - 1)):
            if (t or h) and abs(t * token_stride - h * head_stride) < size:
                raise ValueError(
                    f"the rows of {name} overlap: shape {list(value.shape)} with strides "
                    f"{list(value.stride())}; pass one with memory for each of its elements"
                )


def layer_cache(name: str, value: torch.Tensor, sizes: dict[str, int]) -> None:
    """Check a layer's cache [num_blocks, 2, Hkv, B, D], in which only the stride between blocks is free."""
    tensor(name, value, "num_blocks 2 Hkv B D", sizes, dtype=DTYPES + QUANTISED)
    blocks_contiguous(name, value)
    block_size(name, sizes["B"])
    if sizes["D"] % 8 or not 0 < sizes["D"] <= MAX_HEAD_SIZE:
        raise ValueError(
            f"{name} has head size {sizes['D']}; it must be a multiple of 8 and at most {MAX_HEAD_SIZE}"
        )
    if value.dtype in QUANTISED and sizes["D"] % 16:
        raise ValueError(
            f"{name} has head size {sizes['D']}; a cache of {value.dtype} needs a multiple of 16, "
            "so use a 16-bit cache"
        )


def block_size(name: str, size: int) -> None:
    """Check that the cache has blocks of a size that the kernels take."""
    if size not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"{name} has block size {size}; supported are {allowed}")


def blocks_contiguous(name: str, value: torch.Tensor) -> None:
    """Check that each block is contiguous and that blocks do not overlap."""
    expected = 1
    for dim in range(value.dim() - 1, 0, -1):
        if value.shape[dim] > 1 and value.stride(dim) != expected:
            raise ValueError(
                f"each block of {name} must be contiguous (only the stride of dimension 0 is free), "
                f"got shape {list(value.shape)} with strides {list(value.stride())}"
            )
        expected *= value.shape[dim]
    if value.shape[0] > 1 and value.stride(0) < expected:
        raise ValueError(f"the blocks of {name} overlap: stride {value.stride(0)} for {expected} elements")


def model_dtypes(kv_cache: torch.Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that queries, keys and values may have: with a quantised cache, any of `DTYPES`."""
    return DTYPES if kv_cache.dtype in QUANTISED else (kv_cache.dtype,)


def scales(
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, kv_cache: torch.Tensor, sizes: dict[str, int]
) -> None:
    """Check that a quantised cache has both scales, and any other cache none."""
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if kv_cache.dtype not in QUANTISED:
            if value is not None:
                raise ValueError(
                    f"{name} is for quantised caches; kv_cache is {kv_cache.dtype}, so pass None"
                )
        elif value is None:
            raise ValueError(
                f"{name} is missing: a kv_cache of {kv_cache.dtype} needs k_scale and v_scale, float32 [Hkv]"
            )
        else:
            tensor(name, value, "Hkv", sizes, dtype=torch.float32, device=kv_cache.device)
            last_dim_contiguous(name, value)


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `reshape_and_cache`."""
    sizes: dict[str, int] = {}
    layer_cache("kv_cache", kv_cache, sizes)
    tensor("key", key, "T Hkv D", sizes, dtype=model_dtypes(kv_cache), device=kv_cache.device)
    tensor("value", value, "T Hkv D", sizes, dtype=key.dtype, device=kv_cache.device)
    last_dim_contiguous("key", key)
    last_dim_contiguous("value", value)
    tensor("slot_mapping", slot_mapping, "T", sizes, dtype=torch.int64, device=kv_cache.device)
    last_dim_contiguous("slot_mapping", slot_mapping)
    scales(k_scale, v_scale, kv_cache, sizes)


cache_write_once = once_per_layout(cache_write)


def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `paged_attention`."""
    sizes: dict[str, int] = {}
    layer_cache("kv_cache", kv_cache, sizes)
    device = kv_cache.device
    tensor("query", query, "T H D", sizes, dtype=model_dtypes(kv_cache), device=device)
    last_dim_contiguous("query", query)
    if sizes["Hkv"] == 0 or sizes["H"] % sizes["Hkv"]:
        raise ValueError(
            f"query has {sizes['H']} heads, not a multiple of kv_cache's {sizes['Hkv']} KV heads"
        )
    batch(block_tables, seq_lens, query_start_loc, sizes, device)
    tensor("out", out, "T H D", sizes, dtype=query.dtype, device=device)
    last_dim_contiguous("out", out)
    rows_apart("out", out)
    for name, value in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if value is not None:
            tensor(name, value, "H", sizes, dtype=torch.float32, device=device)
            last_dim_contiguous(name, value)
    scales(k_scale, v_scale, kv_cache, sizes)


attention_once = once_per_layout(attention)


def batch(
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    sizes: dict[str, int],
    device: torch.device,
) -> None:
    """Check the tensors that say which query rows and blocks a sequence has; ``sizes`` has T."""
    tensor("seq_lens", seq_lens, "S", sizes, dtype=torch.int32, device=device)
    tensor("block_tables", block_tables, "S max_blocks", sizes, dtype=torch.int32, device=device)
    last_dim_contiguous("block_tables", block_tables)
    last_dim_contiguous("seq_lens", seq_lens)
    if query_start_loc is None:
        if sizes["T"] != sizes["S"]:
            raise ValueError(
                f"query has {sizes['T']} tokens for {sizes['S']} sequences; without query_start_loc "
                "each sequence has exactly one query token"
            )
    else:
        tensor("query_start_loc", query_start_loc, "S_plus_1", sizes, dtype=torch.int32, device=device)
        if sizes["S_plus_1"] != sizes["S"] + 1:
            raise ValueError(
                f"query_start_loc must be [S + 1] with S = {sizes['S']}, got [{sizes['S_plus_1']}]"
            )
        last_dim_contiguous("query_start_loc", query_start_loc)


def attention_settings(
    scale: float | None,
    causal: bool,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    max_query_len: int | None,
    batch_invariant: bool,
    shared_prefix: bool,
) -> None:
    """Check the arguments of `paged_attention` that are not tensors."""
    if scale is not None and not is_finite(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, got {causal!r}")
    if sliding_window is not None and (not is_integer(sliding_window) or sliding_window < 1):
        raise ValueError(f"sliding_window must be an integer of at least 1 or None, got {sliding_window!r}")
    if logits_soft_cap is not None and (not is_finite(logits_soft_cap) or logits_soft_cap <= 0):
        raise ValueError(f"logits_soft_cap must be a positive number or None, got {logits_soft_cap!r}")
    if max_query_len is not None and (not is_integer(max_query_len) or max_query_len < 1):
        raise ValueError(f"max_query_len must be an integer of at least 1 or None, got {max_query_len!r}")
    for name, value in (("batch_invariant", batch_invariant), ("shared_prefix", shared_prefix)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


# Under torch.compile a number may be a symbol.
def is_integer(value: object) -> bool:
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    if type(value) is float:  # isinstance of an abstract class is slow
        return -math.inf < value < math.inf
    is_number = isinstance(value, (Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    return is_number and -math.inf < value < math.inf  # type: ignore[operator]


def states(name: str, value: Array | Sequence[Array]) -> torch.Tensor:
    """Return a tensor [N, ...] from such a tensor or from a sequence of N tensors."""
    if not isinstance(value, (list, tuple)):
        return as_tensor(name, value)  # type: ignore[arg-type]
    if not value:
        raise ValueError(f"{name} holds no state to merge; pass at least one")
    tensors = [as_tensor(f"{name}[{index}]", state) for index, state in enumerate(value)]
    first = tensors[0]
    for index, state in enumerate(tensors):
        if (state.shape, state.dtype, state.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"{name}[{index}] must be like {name}[0], {list(first.shape)} of {first.dtype} on "
                f"{first.device}, got {list(state.shape)} of {state.dtype} on {state.device}"
            )
    return torch.stack(tensors)


def block_mapping(name: str, mapping: torch.Tensor, device: torch.device) -> None:
    """Check that a block mapping is a contiguous int64 tensor [N, 2] on the device."""
    tensor(name, mapping, "N 2", {}, dtype=torch.int64, device=device)
    if not mapping.is_contiguous():
        raise ValueError(f"{name} must be contiguous; pass {name}.contiguous()")


def slots(slot_mapping: torch.Tensor, kv_cache: torch.Tensor) -> None:
    """Check that every slot is -1 or inside the cache. Reads the data."""
    limit = kv_cache.shape[0] * kv_cache.shape[-2]
    _in_range("slot_mapping", slot_mapping, -1, limit)


def scale_values(name: str, scale: torch.Tensor | None) -> None:
    """Check that each scale is positive and in `SCALE_RANGE`. Reads the data."""
    if scale is None or scale.numel() == 0:
        return
    smallest, largest = (float(x) for x in torch.aminmax(scale))  # NaN if any scale is
    if not SCALE_RANGE[0] <= smallest <= largest <= SCALE_RANGE[1]:
        raise ValueError(
            f"{name} must be positive and finite, and 1 / {name} too (from {SCALE_RANGE[0]:.1e} to "
            f"{SCALE_RANGE[1]:.1e}), got {scale.tolist()}; where a head is all zeros any scale will do: "
            f"pass {name}.clamp(min=1e-9)"
        )


def mapping_ids(mapping: torch.Tensor, num_src: int, num_dst: int) -> None:
    """Check that every block ID is inside its cache. Reads the data."""
    _in_range("block_mapping[:, 0] (source)", mapping[:, 0], 0, num_src)
    _in_range("block_mapping[:, 1] (destination)", mapping[:, 1], 0, num_dst)


def attention_ids(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    sliding_window: int | None,
) -> None:
    """Check that lengths fit the block tables, whose used entries are in the cache. Reads the data."""
    if seq_lens.numel() == 0:
        return
    seq_lens = seq_lens.long()  # differences of int32 could overflow
    block_size = kv_cache.shape[-2]
    capacity = block_tables.shape[1] * block_size
    longest = int(seq_lens.max())
    if longest > capacity:
        raise ValueError(
            f"block_tables is too narrow: {block_tables.shape[1]} blocks of {block_size} hold {capacity} "
            f"tokens, but seq_lens has a sequence of {longest}"
        )
    _in_range("seq_lens", seq_lens, 0, capacity + 1)
    if query_start_loc is None:
        query_lens = torch.ones_like(seq_lens)
    else:
        query_lens = query_start_loc.long().diff()
        if int(query_start_loc[0]) != 0 or int(query_lens.min()) < 0:
            raise ValueError("query_start_loc must start at 0 and never decrease")
        if int(query_start_loc[-1]) > query.shape[0]:
            raise ValueError(
                f"query_start_loc ends at {int(query_start_loc[-1])}, but query has {query.shape[0]} tokens"
            )
        longer = (query_lens > seq_lens).logical_and(seq_lens > 0)
        if bool(longer.any()):
            s = int(longer.nonzero()[0])
            raise ValueError(
                f"seq_lens counts the query's own tokens: sequence {s} has {int(query_lens[s])} query "
                f"tokens, but seq_lens[{s}] is {int(seq_lens[s])}"
            )
    first = torch.zeros_like(seq_lens)
    if sliding_window is not None:
        first = (seq_lens - query_lens - sliding_window + 1).clamp(min=0) // block_size
    column = torch.arange(block_tables.shape[1], device=block_tables.device)
    used = (column < (seq_lens[:, None] + block_size - 1) // block_size) & (column >= first[:, None])
    _in_range("block_tables", block_tables[used], 0, kv_cache.shape[0])


def _in_range(name: str, values: torch.Tensor, low: int, high: int) -> None:
    if values.numel() == 0:
        return
    smallest, largest = (int(x) for x in torch.aminmax(values))
    if smallest < low or largest >= high:
        raise ValueError(f"{name} must be from {low} to {high - 1}, got values from {smallest} to {largest}")
