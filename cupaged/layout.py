"""Remember that tensors of a layout were checked, and what follows from the layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

LAYOUTS = 1024  # maximum number of layouts remembered per check


class Layout:
    """Stand for the shapes, strides, dtypes and devices of a call's tensors: one object per combination."""

    passed = False  # True once the check has passed
    prepared: Any = None  # what the CPU backend derives from it


def once_per_layout(check: Callable[..., None]) -> Callable[..., Layout]:
    """Return a version of ``check`` that runs once per layout of its tensors and returns that `Layout`.

    The layout serves as a cache key for whatever shapes, strides, dtypes and devices determine. Not for fake
    tensors, whose sizes may be symbols.
    """

    @lru_cache(LAYOUTS)
    def layout_of(*described: object) -> Layout:
        return Layout()

    def checked(*tensors: torch.Tensor | None) -> Layout:
        layout = layout_of(
            *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
        )
        if not layout.passed:
            check(*tensors)
            layout.passed = True
        return layout

    return checked
