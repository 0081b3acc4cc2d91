"""The fused operators between a decoder's linear layers: norms, activations, and RoPE with the cache write.

Each takes one kernel where plain torch takes 4 to 15. They compute in float32 and round once for each value
that they store. Arrays are as in `ops`, and there are no gradients either. Letters in shapes: T tokens,
C channels, I channels of the gate, H query heads, Hkv KV heads, D head size, R rotated dimensions of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from . import fused_checks
from .dlpack import Array, as_tensor
from .registration import call


def rms_norm(
    input: Array,
    weight: Array,
    *,
    epsilon: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Array | None = None,
    input_weight: Array | None = None,
    out: Array | None = None,
) -> torch.Tensor | Any:
    """Normalise rows by their root mean square, after adding them to a residual stream if there is one.

    The result is ``x / sqrt(mean(x ** 2) + epsilon) * (weight_offset + weight)``. Without ``residual`` x is
    the input. With it, the input is added to the residual in place, and x is that sum as it was stored.

    Args:
        input: [T, C], float32, float16 or bfloat16, contiguous in C; the stride between rows is free.
        weight: [C] in input's dtype or float32.
        epsilon: number that is added to the mean square.
        weight_offset: number that is added to each weight; 1.0 for models that store weight - 1 (Gemma).
        residual: [T, C] in input's dtype, contiguous in C. Mutated.
        input_weight: [C] in weight's dtype: normalise the input with this weight, by the same formula, before
            it is added (the norm after a block of Gemma 2 and 3). Needs ``residual``.
        out: [T, C] to write into, in input's dtype; returned as given. It may be ``input`` itself, and shares
            no memory with the other arguments.

    Returns:
        The normalised rows [T, C].

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, or a number is out of range.
    """
    input, weight = as_tensor("input", input), as_tensor("weight", weight)
    residual_tensor = None if residual is None else as_tensor("residual", residual, written=True)
    input_weight = None if input_weight is None else as_tensor("input_weight", input_weight)
    fused_checks.norm_settings(epsilon, weight_offset)
    if out is None:
        out = out_tensor = torch.empty_like(input)
    elif out is residual:
        raise ValueError("out must not be residual, which holds the sum afterwards; pass another tensor")
    else:
        out_tensor = as_tensor("out", out, written=True)
    call(
        "rms_norm",
        input,
        weight,
        float(epsilon),
        float(weight_offset),
        residual_tensor,
        input_weight,
        out_tensor,
    )
    return out


def act_and_mul(input: Array, *, activation: str, out: Array | None = None) -> torch.Tensor | Any:
    """Compute ``act(gate) * up`` of a gated MLP, whose gate and up projection stand side by side.

    Args:
        input: [T, 2I], the gate's I columns before the up projection's, float32, float16 or bfloat16,
            contiguous in the last dimension; the stride between rows is free.
        activation: ``"silu"``, ``"gelu"`` (with erf) or ``"gelu_tanh"``.
        out: [T, I] to write into, in input's dtype; returned as given. It shares no memory with the input.

    Returns:
        The products [T, I].

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, or no activation has the name.
    """
    input = as_tensor("input", input)
    fused_checks.activation_name(activation)
    if out is None:
        *rows, columns = input.shape or (0,)  # a tensor without dimensions is refused below
        out = out_tensor = input.new_empty(*rows, columns // 2)  # with a tuple it takes half as long again
    else:
        out_tensor = as_tensor("out", out, written=True)
    call("act_and_mul", input, activation, out_tensor)
    return out


def rope_and_cache(
    query: Array,
    key: Array,
    value: Array,
    cos: Array | None,
    sin: Array | None,
    kv_cache: Array,
    slot_mapping: Array,
    *,
    interleaved: bool = False,
    query_weight: Array | None = None,
    key_weight: Array | None = None,
    epsilon: float = 1e-6,
    weight_offset: float = 0.0,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> None:
    """Rotate queries and keys by their positions (RoPE), and write keys and values into the cache.

    Mutates ``query``, which is rotated in place, and ``kv_cache``; ``key`` and ``value`` stay as they are.
    The rotated key is rounded to its dtype and then stored as `reshape_and_cache` stores it, bit for bit.

    Args:
        query: [T, H, D], float32, float16 or bfloat16, contiguous in D; the other strides are free, so that
            query, key and value may be views of a merged projection. Any H, also one that is no multiple of
            Hkv.
        key, value: [T, Hkv, D] in query's dtype, contiguous in D.
        cos, sin: [T, R/2], contiguous in the last dimension, both float32 or both in query's dtype. The first
            R dimensions of a head are rotated, the others are not (partial rotary). Pass None for both in
            layers without positions.
        kv_cache, slot_mapping, k_scale, v_scale: as in `reshape_and_cache`. A query whose slot is -1 is
            rotated too.
        interleaved: rotate the pairs of dimensions (2i, 2i + 1) instead of (i, i + R/2).
        query_weight, key_weight: [D], both float32 or both in query's dtype: normalise each head by its root
            mean square over D first, as `rms_norm` does but without rounding (Qwen 3, Gemma 3).
        epsilon, weight_offset: as in `rms_norm`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, strides or device, a number or a scale is out of
            range, or a slot is outside the cache. Slots and scales are checked on the CPU, and on a GPU when
            ``CUPAGED_CHECK=1`` is set.
    """
    query = as_tensor("query", query, written=True)
    key, value = as_tensor("key", key), as_tensor("value", value)
    cos = None if cos is None else as_tensor("cos", cos)
    sin = None if sin is None else as_tensor("sin", sin)
    kv_cache = as_tensor("kv_cache", kv_cache, written=True)
    slot_mapping = as_tensor("slot_mapping", slot_mapping)
    query_weight = None if query_weight is None else as_tensor("query_weight", query_weight)
    key_weight = None if key_weight is None else as_tensor("key_weight", key_weight)
    k_scale = None if k_scale is None else as_tensor("k_scale", k_scale)
    v_scale = None if v_scale is None else as_tensor("v_scale", v_scale)
    if not isinstance(interleaved, bool):
        raise ValueError(f"interleaved must be True or False, got {interleaved!r}")
    fused_checks.norm_settings(epsilon, weight_offset)
    call(
        "rope_and_cache",
        query,
        key,
        value,
        cos,
        sin,
        kv_cache,
        slot_mapping,
        interleaved,
        query_weight,
        key_weight,
        float(epsilon),
        float(weight_offset),
        k_scale,
        v_scale,
    )
