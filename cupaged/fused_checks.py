"""Check the arguments of the fused operators. Each check raises a ValueError that names the argument.

Letters in shapes are those of `checks`, and C channels, I channels of the gate, R rotated dimensions of a
head.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf

import torch

from . import checks
from .layout import LAYOUTS, Layout

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def norm_settings(epsilon: float, weight_offset: float) -> None:
    """Check the numbers of an RMS norm."""
    if type(epsilon) is type(weight_offset) is float and 0 <= epsilon < inf and -inf < weight_offset < inf:
        return  # the usual case, in half the time
    if not checks.is_finite(epsilon) or epsilon < 0:
        raise ValueError(f"epsilon must be a finite number of at least 0, got {epsilon!r}")
    if not checks.is_finite(weight_offset):
        raise ValueError(
            f"weight_offset must be a finite number (1.0 for models that store weight - 1), "
            f"got {weight_offset!r}"
        )


def activation_name(activation: str) -> None:
    """Check that there is an activation of this name."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _weight_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes that weights, cosines and sines may have beside tensors of ``dtype``."""
    return (dtype,) if dtype == torch.float32 else (dtype, torch.float32)


def _rows(
    name: str, value: torch.Tensor, dims: str, sizes: dict[str, int], like: torch.Tensor, written: bool
) -> None:
    """Check a matrix of ``like``'s dtype, contiguous in its last dimension; if written, with rows apart."""
    checks.tensor(name, value, dims, sizes, dtype=like.dtype, device=like.device)
    checks.last_dim_contiguous(name, value)
    if written:
        checks.rows_apart(name, value.unsqueeze(1))


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `rms_norm`."""
    sizes: dict[str, int] = {}
    checks.tensor("input", input, "T C", sizes, dtype=checks.DTYPES)
    checks.last_dim_contiguous("input", input)
    weight_dtypes = _weight_dtypes(input.dtype)
    checks.tensor("weight", weight, "C", sizes, dtype=weight_dtypes, device=input.device)
    checks.last_dim_contiguous("weight", weight)
    if residual is not None:
        _rows("residual", residual, "T C", sizes, input, written=True)
    if input_weight is not None:
        if residual is None:
            raise ValueError(
                "input_weight is for the norm before a residual is added; pass residual too, or call "
                "rms_norm(input, input_weight)"
            )
        checks.tensor("input_weight", input_weight, "C", sizes, dtype=weight.dtype, device=input.device)
        checks.last_dim_contiguous("input_weight", input_weight)
    _rows("out", out, "T C", sizes, input, written=True)


def act_and_mul(input: torch.Tensor, out: torch.Tensor) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `act_and_mul`."""
    sizes: dict[str, int] = {}
    checks.tensor("input", input, "T 2I", sizes, dtype=checks.DTYPES)
    checks.last_dim_contiguous("input", input)
    if input.shape[1] % 2:
        raise ValueError(f"input must be [T, 2I], gate and up side by side, got shape {list(input.shape)}")
    sizes["I"] = input.shape[1] // 2
    _rows("out", out, "T I", sizes, input, written=True)


def rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `rope_and_cache`."""
    checks.cache_write(key, value, kv_cache, slot_mapping, k_scale, v_scale)
    device = kv_cache.device
    sizes = {"T": key.shape[0], "D": key.shape[2]}
    checks.tensor("query", query, "T H D", sizes, dtype=key.dtype, device=device)
    checks.last_dim_contiguous("query", query)
    checks.rows_apart("query", query)
    _pair("cos", cos, "sin", sin)
    if cos is not None and sin is not None:
        checks.tensor("cos", cos, "T R/2", sizes, dtype=_weight_dtypes(query.dtype), device=device)
        checks.tensor("sin", sin, "T R/2", sizes, dtype=cos.dtype, device=device)
        if 2 * sizes["R/2"] > sizes["D"]:
            pairs = sizes["D"] // 2
            raise ValueError(
                f"cos has {sizes['R/2']} columns, one for each pair of rotated dimensions, but a head of "
                f"size {sizes['D']} has {pairs} pairs; pass cos[:, :{pairs}] if its halves repeat"
            )
        checks.last_dim_contiguous("cos", cos)
        checks.last_dim_contiguous("sin", sin)
    _pair("query_weight", query_weight, "key_weight", key_weight)
    if query_weight is not None and key_weight is not None:
        weight_dtypes = _weight_dtypes(query.dtype)
        checks.tensor("query_weight", query_weight, "D", sizes, dtype=weight_dtypes, device=device)
        checks.tensor("key_weight", key_weight, "D", sizes, dtype=query_weight.dtype, device=device)
        checks.last_dim_contiguous("query_weight", query_weight)
        checks.last_dim_contiguous("key_weight", key_weight)


def _pair(first: str, a: torch.Tensor | None, second: str, b: torch.Tensor | None) -> None:
    if (a is None) != (b is None):
        given, missing = (first, second) if b is None else (second, first)
        raise ValueError(f"{missing} is missing: pass both {given} and {missing}, or neither")


@lru_cache(3 * LAYOUTS)
def _layout(*described: object) -> Layout:
    return Layout()


# As `layout.once_per_layout`, written out: these are called in every layer, and a loop over tensors would
# take a fifth longer.


def rms_norm_once(
    input: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    out: torch.Tensor,
) -> Layout:
    """Check the tensors of `rms_norm` once per layout, which is returned."""
    layout = _layout(
        "rms_norm",
        input.shape,
        input.stride(),
        input.dtype,
        input.device,
        weight.shape,
        weight.stride(),
        weight.dtype,
        weight.device,
        None if residual is None else _describe(residual),
        None if input_weight is None else _describe(input_weight),
        out.shape,
        out.stride(),
        out.dtype,
        out.device,
    )
    if not layout.passed:
        rms_norm(input, weight, residual, input_weight, out)
        layout.passed = True
    return layout


def act_and_mul_once(input: torch.Tensor, activation: str, out: torch.Tensor) -> Layout:
    """Check the tensors of `act_and_mul` once per layout and activation; return what stands for both."""
    layout = _layout(
        activation,
        input.shape,
        input.stride(),
        input.dtype,
        input.device,
        out.shape,
        out.stride(),
        out.dtype,
        out.device,
    )
    if not layout.passed:
        act_and_mul(input, out)
        layout.passed = True
    return layout


def rope_and_cache_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> Layout:
    """Check the tensors of `rope_and_cache` once per layout, which is returned."""
    layout = _layout(
        "rope_and_cache",
        query.shape,
        query.stride(),
        query.dtype,
        query.device,
        key.shape,
        key.stride(),
        key.dtype,
        key.device,
        value.shape,
        value.stride(),
        value.dtype,
        value.device,
        kv_cache.shape,
        kv_cache.stride(),
        kv_cache.dtype,
        kv_cache.device,
        slot_mapping.shape,
        slot_mapping.stride(),
        slot_mapping.dtype,
        slot_mapping.device,
        None if cos is None else _describe(cos),
        None if sin is None else _describe(sin),
        None if query_weight is None else _describe(query_weight),
        None if key_weight is None else _describe(key_weight),
        None if k_scale is None else _describe(k_scale),
        None if v_scale is None else _describe(v_scale),
    )
    if not layout.passed:
        rope_and_cache(
            query, key, value, cos, sin, kv_cache, slot_mapping, query_weight, key_weight, k_scale, v_scale
        )
        layout.passed = True
    return layout


def _describe(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
