"""Check the arguments of `sample`. Each check raises a ValueError that names the argument."""

from __future__ import annotations

import torch

from . import checks
from .layout import once_per_layout

SETTINGS = {
    "temperature": torch.float64,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "seeds": torch.int64,
    "indices": torch.int64,
    "positions": torch.int64,
}


def sample(logits: torch.Tensor, *settings_and_out: torch.Tensor) -> None:
    """Check shapes, strides, dtypes and devices of the tensors of `sample`."""
    sizes: dict[str, int] = {}
    checks.tensor("logits", logits, "N V", sizes, dtype=checks.DTYPES)
    checks.last_dim_contiguous("logits", logits)
    if sizes["V"] == 0:
        raise ValueError("logits must be [N, V] with at least one token, got V = 0")
    for (name, dtype), value in zip((SETTINGS | {"out": torch.int64}).items(), settings_and_out, strict=True):
        checks.tensor(name, value, "N", sizes, dtype=dtype, device=logits.device)
        checks.last_dim_contiguous(name, value)


sample_once = once_per_layout(sample)
