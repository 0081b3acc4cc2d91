"""Find the kernel of a call, and keep what the layout of its tensors determines.

Most operators are called in every layer, with little to do for one token. What the layout determines is kept
with it; the rest are the first fields of the kernel's arguments, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from ...layout import Layout
from . import formats, launch

DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: formats.BFLOAT16,
    torch.float8_e4m3fn: formats.FLOAT8_E4M3,
    torch.float8_e5m2: formats.FLOAT8_E5M2,
    torch.int8: formats.INT8,
}


@cache
def kernel_of(build: Callable[..., Any], arguments: type, *dtypes: np.dtype | None) -> launch.Kernel:
    """Return the kernel that `build` makes for the dtypes."""
    entry, work_of_thread = build(*dtypes)
    return launch.Kernel(entry, work_of_thread, arguments)


def keep(
    layout: Layout, kernel: launch.Kernel, arguments: Any, **fixed: float
) -> tuple[launch.Kernel, tuple[float, ...]]:
    """Keep a kernel and the last of its arguments, which are given by name; return both."""
    names = arguments._fields[-len(fixed) :]
    layout.prepared = kernel, tuple(fixed[name] for name in names)
    return layout.prepared
