"""Accept arrays of other libraries (CuPy, NumPy, JAX) as arguments, through DLPack."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class SupportsDLPack(Protocol):
    """Describe an array with the array API standard's interface for exchange between libraries."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


# The type of the public functions' array arguments. Tensors are fastest: they are passed on unchanged.
Array = torch.Tensor | SupportsDLPack


def as_tensor(name: str, value: Array, *, written: bool = False) -> torch.Tensor:
    """Return a tensor that shares the array's memory; never a copy.

    Args:
        name: name of the argument, for the error message.
        written: whether the function writes into the argument.

    Raises:
        ValueError: the value is not an array, DLPack cannot pass it, or it is read-only and `written`.
    """
    if isinstance(value, torch.Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise ValueError(
            f"{name} must be a torch.Tensor or an array with __dlpack__, got {type(value).__name__}"
        )
    if any(stride < 0 for stride in getattr(value, "strides", None) or ()):  # torch would abort the process
        raise ValueError(f"{name} must not have negative strides; pass a copy")
    if written and not getattr(getattr(value, "flags", None), "writeable", True):
        raise ValueError(f"{name} is written, but the {type(value).__name__} is read-only; pass a copy")
    try:
        return torch.from_dlpack(value)
    except Exception as error:  # each library raises its own
        raise ValueError(
            f"{name} is a {type(value).__name__} that torch cannot take through DLPack: {error}"
        ) from error
