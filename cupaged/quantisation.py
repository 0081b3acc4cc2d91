"""Quantise and dequantise values of an 8-bit KV cache, in plain torch.

Each KV head has a scale for its keys and one for its values. A value x is stored as x * (1 / scale), rounded
to the nearest code with ties to even, and read as code * scale.
"""

from __future__ import annotations

import torch

# The largest magnitude of a code, at which values saturate. int8 does not use -128, so that codes are
# symmetric.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
NAN_CODE = 0x7F  # in both fp8 dtypes


def quantise(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the codes of ``values``. NaN stays NaN in fp8 and becomes 0 in int8, which has no NaN.

    Args:
        values: [..., Hkv, D], floating point. The product with the reciprocal of the scale is rounded to
            float32, or to float64 for float64 values.
        scale: float32 [Hkv], positive.
        dtype: dtype of the codes, one of `LARGEST`.
    """
    compute = torch.promote_types(values.dtype, torch.float32)
    scaled = values.to(compute) * scale.to(compute).reciprocal()[:, None]
    saturated = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == torch.int8:
        return saturated.nan_to_num(nan=0.0).round().to(dtype)
    codes = saturated.to(dtype).view(torch.uint8)
    return codes.masked_fill(scaled.isnan(), NAN_CODE).view(dtype)


def dequantise(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of ``codes`` [..., Hkv, B, D] in ``dtype``; exact in float64."""
    return codes.to(dtype) * scale.to(dtype)[:, None, None]
