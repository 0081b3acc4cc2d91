"""Plan the launches of the fused operators and of the sampler, as `plans.py` does those of attention."""

from __future__ import annotations

import torch

from ...fused_checks import ACTIVATIONS
from ...params import fraction_bits
from . import specs as kernel_specs
from .arguments import ActAndMulArguments, RmsNormArguments, RopeAndCacheArguments, SampleArguments
from .kernel_choice import CACHE_DTYPE_NAMES, DTYPE_NAMES
from .layouts import all_aligned, block_shift, ceil_div, require_aligned_cache
from .specs import KernelCall

WARP = 32
WARP_ROW = 1024  # elements of the longest rows that rms_norm gives to a warp
CHUNK_BYTES = 16
MAX_GRID_Y = 65535  # blocks


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_offset: float,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    out: torch.Tensor,
) -> KernelCall:
    spec = kernel_specs.rms_norm(DTYPE_NAMES[input.dtype])
    num_rows, size = input.shape
    whole_block = size > WARP_ROW
    rows = 1 if whole_block else spec.threads // WARP
    aligned = all_aligned(input, weight, residual, input_weight, out)
    return KernelCall(
        spec,
        (ceil_div(num_rows, rows), 1),
        RmsNormArguments(
            input_stride=input.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            out_stride=out.stride(0),
            num_rows=num_rows,
            size=size,
            whole_block=whole_block,
            float_weight=weight.dtype == torch.float32,
            aligned=aligned and size % _chunk(input) == 0,
            epsilon=epsilon,
            weight_offset=weight_offset,
        ),
    )


def act_and_mul(input: torch.Tensor, activation: str, out: torch.Tensor) -> KernelCall:
    spec = kernel_specs.act_and_mul(DTYPE_NAMES[input.dtype])
    num_rows, size = out.shape
    chunk = _chunk(input)
    return KernelCall(
        spec,
        (num_rows, min(MAX_GRID_Y, ceil_div(size, chunk * spec.threads))),
        ActAndMulArguments(
            input_stride=input.stride(0),
            out_stride=out.stride(0),
            size=size,
            activation=ACTIVATIONS.index(activation),
            aligned=all_aligned(input, out) and size % chunk == 0,
        ),
    )


def rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    interleaved: bool,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    epsilon: float,
    weight_offset: float,
) -> KernelCall:
    require_aligned_cache(kv_cache)
    spec = kernel_specs.rope_and_cache(DTYPE_NAMES[query.dtype], CACHE_DTYPE_NAMES[kv_cache.dtype])
    num_tokens, num_kv_heads, head_size = key.shape
    num_pairs = 0 if cos is None else cos.shape[1]
    changes_query = num_pairs > 0 or query_weight is not None
    num_heads = query.shape[1] if changes_query else 0
    chunk = _chunk(query)
    units = ceil_div(num_pairs, chunk) + ceil_div(head_size - 2 * num_pairs, 2 * chunk)
    lane_shift = (min(units, WARP) - 1).bit_length()
    threads = (num_heads + 2 * num_kv_heads) << lane_shift
    aligned = all_aligned(query, key, value, cos, sin, query_weight, key_weight)
    return KernelCall(
        spec,
        (num_tokens, ceil_div(threads, spec.threads)),
        RopeAndCacheArguments(
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            key_token_stride=key.stride(0),
            key_head_stride=key.stride(1),
            value_token_stride=value.stride(0),
            value_head_stride=value.stride(1),
            cos_stride=0 if cos is None else cos.stride(0),
            sin_stride=0 if sin is None else sin.stride(0),
            block_stride=kv_cache.stride(0),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            num_pairs=num_pairs,
            block_shift=block_shift(kv_cache),
            lane_shift=lane_shift,
            interleaved=interleaved,
            float_angles=cos is not None and cos.dtype == torch.float32,
            float_weights=query_weight is not None and query_weight.dtype == torch.float32,
            aligned=aligned and num_pairs % chunk == 0,
            epsilon=epsilon,
            weight_offset=weight_offset,
        ),
    )


def sample(logits: torch.Tensor) -> KernelCall:
    num_rows, size = logits.shape
    return KernelCall(
        kernel_specs.sample(DTYPE_NAMES[logits.dtype]),
        (num_rows, 1),
        SampleArguments(
            stride=logits.stride(0),
            size=size,
            fraction_bits=fraction_bits(size),
            aligned=all_aligned(logits) and size % _chunk(logits) == 0,
        ),
    )


def _chunk(tensor: torch.Tensor) -> int:
    """Return the elements of 16 bytes."""
    return CHUNK_BYTES // tensor.element_size()
