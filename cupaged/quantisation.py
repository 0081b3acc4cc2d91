"""8-bit caches: their dtypes, and in plain torch what quantising and reading back mean.

Each KV head has two scales, of its keys and of its values. What is stored is x * (1 / scale), rounded to
the nearest code with ties to even; what is read is code * scale.
"""

from __future__ import annotations

import torch

# The largest magnitude that is stored: beyond it values saturate. int8 leaves -128 out, so that codes are
# symmetric.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
NAN_CODE = 0x7F  # of both fp8 types


def quantise(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of ``values``. A NaN becomes a NaN in fp8 and 0 in int8, which has none.

    Args:
        values: [..., Hkv, D], floating point. The product with the reciprocal of the scale is rounded to
            float32, or to float64 for float64 values.
        scale: float32 [Hkv], positive.
        dtype: of the codes, one of `LARGEST`.
    """
    compute = torch.promote_types(values.dtype, torch.float32)
    scaled = values.to(compute) * scale.to(compute).reciprocal()[:, None]
    limited = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == torch.int8:
        return limited.nan_to_num(nan=0.0).round().to(dtype)
    codes = limited.to(dtype).view(torch.uint8)
    return codes.masked_fill(scaled.isnan(), NAN_CODE).view(dtype)


def dequantise(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of ``codes`` [..., Hkv, B, D] in ``dtype``; exact in float64."""
    return codes.to(dtype) * scale.to(dtype)[:, None, None]
