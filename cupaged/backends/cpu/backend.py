"""The functions of the CPU backend, over numba kernels that read caches of every dtype in place.

A kernel is compiled at its first use and cached on disk by numba: beside this file, in NUMBA_CACHE_DIR or in
the user's cache directory (`disk_cache.py`). Kernels run on torch's threads (`launch.py`).
"""

from __future__ import annotations

from typing import NoReturn

import torch

from ... import checks
from ...layout import Layout
from ...params import AttentionParams, SamplingSettings, fraction_bits
from . import activation, launch, memory, norm, rope, team, work
from . import sample as sampling
from .mla import concat_and_cache_mla as concat_and_cache_mla
from .mla import mla_attention as mla_attention
from .prepared import DTYPES, keep, keep_attention, kernel_of

CHECKS_DATA = True  # the kernels check ids and scales themselves


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    params: AttentionParams,
    layout: Layout,
) -> None:
    kernel, fixed = layout.prepared or keep_attention(
        query, kv_cache, block_tables, out, layout, _cache_numbers(kv_cache)
    )
    # The softmax is in base 2. With a soft cap the kernel's dot products are s / cap.
    if params.logits_soft_cap is None:
        factors = params.scale * work.LOG2E, 0.0
    else:
        factors = params.scale / params.logits_soft_cap, params.logits_soft_cap * work.LOG2E
    arguments = (
        query.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        kv_cache.data_ptr(),
        block_tables.data_ptr(),
        seq_lens.data_ptr(),
        0 if query_start_loc is None else query_start_loc.data_ptr(),
        0 if params.alibi_slopes is None else params.alibi_slopes.data_ptr(),
        0 if params.sinks is None else params.sinks.data_ptr(),
        0 if params.k_scale is None else params.k_scale.data_ptr(),
        0 if params.v_scale is None else params.v_scale.data_ptr(),
        params.causal,
        params.sliding_window or 0,
        *factors,
        *fixed,
    )
    if kernel(arguments) == team.INVALID:
        checks.attention_ids(query, kv_cache, block_tables, seq_lens, query_start_loc, params.sliding_window)
        raise ValueError("seq_lens, block_tables or query_start_loc changed while they were used")


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    layout: Layout,
) -> None:
    kernel, fixed = layout.prepared or _prepare_cache_write(key, value, kv_cache, k_scale, layout)
    addresses = (
        key.data_ptr(),
        value.data_ptr(),
        kv_cache.data_ptr(),
        slot_mapping.data_ptr(),
        0 if k_scale is None else k_scale.data_ptr(),
        0 if v_scale is None else v_scale.data_ptr(),
    )
    if kernel((*addresses, *fixed)) == team.INVALID:
        _raise_for_cache_write(kv_cache, slot_mapping, k_scale, v_scale)


def _prepare_cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    layout: Layout,
) -> tuple[launch.Kernel, tuple[float, ...]]:
    size = key.element_size()
    dtypes = (None, None) if k_scale is None else (DTYPES[key.dtype], DTYPES[kv_cache.dtype])
    return keep(
        layout,
        kernel_of(memory.build_reshape_and_cache, memory.Tokens, *dtypes),
        memory.Tokens,
        key_token_stride=key.stride(0) * size,
        key_head_stride=key.stride(1) * size,
        value_token_stride=value.stride(0) * size,
        value_head_stride=value.stride(1) * size,
        num_tokens=key.shape[0],
        num_slots=kv_cache.shape[0] * kv_cache.shape[3],
        itemsize=size,
        key_bytes=key.shape[2] * size,
        value_bytes=value.shape[2] * size,
        smallest_scale=checks.SCALE_RANGE[0],
        largest_scale=checks.SCALE_RANGE[1],
        **_cache_numbers(kv_cache),
    )


def _cache_numbers(kv_cache: torch.Tensor) -> dict[str, int]:
    """Return a cache's sizes, and its strides in bytes, by the names that all kernels have for them."""
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    row_bytes = head_size * kv_cache.element_size()
    return {
        "block_stride": kv_cache.stride(0) * kv_cache.element_size(),
        "value_offset": num_kv_heads * block_size * row_bytes,
        "kv_head_stride": block_size * row_bytes,
        "row_bytes": row_bytes,
        "num_kv_heads": num_kv_heads,
        "block_size": block_size,
        "head_size": head_size,
    }


def _raise_for_cache_write(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> NoReturn:
    checks.slots(slot_mapping, kv_cache)
    checks.scale_values("k_scale", k_scale)
    checks.scale_values("v_scale", v_scale)
    raise ValueError("slot_mapping, k_scale or v_scale changed while they were used")


def merge_attention_states(
    outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    num_states, num_tokens, num_heads, head_size = outs.shape
    states = memory.States(
        outs=outs.data_ptr(),
        lses=lses.data_ptr(),
        num_states=num_states,
        rows=num_tokens * num_heads,
        head_size=head_size,
        itemsize=outs.element_size(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    kernel_of(memory.build_merge, memory.States, DTYPES[outs.dtype])(states)


def copy_blocks(kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
    swap_blocks(kv_cache, kv_cache, block_mapping)


def swap_blocks(src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
    size = src.element_size()
    blocks = memory.Blocks(
        target=dst.data_ptr(),
        target_stride=dst.stride(0) * size,
        source=src.data_ptr(),
        source_stride=src.stride(0) * size,
        block_bytes=src[0].numel() * size,
        pairs=block_mapping.data_ptr(),
        count=block_mapping.shape[0],
    )
    kernel_of(memory.build_move_blocks, memory.Blocks)(blocks)


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_offset: float,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    out: torch.Tensor,
    layout: Layout,
) -> None:
    kernel, fixed = layout.prepared or _prepare_norm(input, weight, residual, out, layout)
    addresses = (
        input.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        0 if input_weight is None else input_weight.data_ptr(),
    )
    kernel((*addresses, epsilon, weight_offset, *fixed))


def _prepare_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    layout: Layout,
) -> tuple[launch.Kernel, tuple[float, ...]]:
    num_rows, size = input.shape
    itemsize = input.element_size()
    return keep(
        layout,
        kernel_of(norm.build, norm.Norm, DTYPES[input.dtype]),
        norm.Norm,
        input_stride=input.stride(0) * itemsize,
        residual_stride=0 if residual is None else residual.stride(0) * itemsize,
        out_stride=out.stride(0) * itemsize,
        num_rows=num_rows,
        size=size,
        itemsize=itemsize,
        weight_itemsize=weight.element_size(),
    )


def act_and_mul(input: torch.Tensor, activation_name: str, out: torch.Tensor, layout: Layout) -> None:
    kernel, fixed = layout.prepared or _prepare_activation(input, activation_name, out, layout)
    kernel((input.data_ptr(), out.data_ptr(), *fixed))


def _prepare_activation(
    input: torch.Tensor, activation_name: str, out: torch.Tensor, layout: Layout
) -> tuple[launch.Kernel, tuple[float, ...]]:
    itemsize = input.element_size()
    return keep(
        layout,
        kernel_of(activation.build, activation.Gated, DTYPES[input.dtype]),
        activation.Gated,
        input_stride=input.stride(0) * itemsize,
        out_stride=out.stride(0) * itemsize,
        num_rows=out.shape[0],
        size=out.shape[1],
        itemsize=itemsize,
        activation=activation.ACTIVATIONS.index(activation_name),
    )


def rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    interleaved: bool,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    epsilon: float,
    weight_offset: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    layout: Layout,
) -> None:
    kernel, fixed = layout.prepared or _prepare_rope(
        query, key, value, cos, sin, kv_cache, query_weight, layout
    )
    addresses = (
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        0 if cos is None else cos.data_ptr(),
        0 if sin is None else sin.data_ptr(),
        kv_cache.data_ptr(),
        slot_mapping.data_ptr(),
        0 if query_weight is None else query_weight.data_ptr(),
        0 if key_weight is None else key_weight.data_ptr(),
        0 if k_scale is None else k_scale.data_ptr(),
        0 if v_scale is None else v_scale.data_ptr(),
    )
    if kernel((*addresses, interleaved, epsilon, weight_offset, *fixed)) == team.INVALID:
        _raise_for_cache_write(kv_cache, slot_mapping, k_scale, v_scale)


def _prepare_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    query_weight: torch.Tensor | None,
    layout: Layout,
) -> tuple[launch.Kernel, tuple[float, ...]]:
    num_tokens, num_heads, _ = query.shape
    itemsize = query.element_size()
    cos_itemsize = 0 if cos is None else cos.element_size()
    return keep(
        layout,
        kernel_of(rope.build, rope.Rotation, DTYPES[query.dtype], DTYPES[kv_cache.dtype]),
        rope.Rotation,
        query_token_stride=query.stride(0) * itemsize,
        query_head_stride=query.stride(1) * itemsize,
        key_token_stride=key.stride(0) * itemsize,
        key_head_stride=key.stride(1) * itemsize,
        value_token_stride=value.stride(0) * itemsize,
        value_head_stride=value.stride(1) * itemsize,
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_slots=kv_cache.shape[0] * kv_cache.shape[3],
        itemsize=itemsize,
        kv_itemsize=kv_cache.element_size(),
        cos_stride=0 if cos is None else cos.stride(0) * cos_itemsize,
        sin_stride=0 if sin is None else sin.stride(0) * cos_itemsize,
        cos_itemsize=cos_itemsize,
        num_pairs=0 if cos is None else cos.shape[1],
        weight_itemsize=0 if query_weight is None else query_weight.element_size(),
        smallest_scale=checks.SCALE_RANGE[0],
        largest_scale=checks.SCALE_RANGE[1],
        **_cache_numbers(kv_cache),
    )


def sample(logits: torch.Tensor, settings: SamplingSettings, out: torch.Tensor, layout: Layout) -> None:
    kernel, fixed = layout.prepared or keep(
        layout,
        kernel_of(sampling.build, sampling.Sampling, DTYPES[logits.dtype]),
        sampling.Sampling,
        stride=logits.stride(0) * logits.element_size(),
        num_rows=logits.shape[0],
        size=logits.shape[1],
        itemsize=logits.element_size(),
        fraction_bits=fraction_bits(logits.shape[1]),
    )
    kernel((logits.data_ptr(), *[tensor.data_ptr() for tensor in settings], out.data_ptr(), *fixed))
