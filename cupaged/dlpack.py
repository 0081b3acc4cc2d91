"""Arrays of other libraries as arguments, through DLPack: CuPy, NumPy, JAX."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class SupportsDLPack(Protocol):
    """What the array API standard asks of an array that other libraries may look into."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


# What the public functions take. A tensor is the fast one: it is passed on as it is.
Array = torch.Tensor | SupportsDLPack


def as_tensor(name: str, value: Array, *, written: bool = False) -> torch.Tensor:
    """A tensor over the array's own memory, never a copy.

    Args:
        name: of the argument, for the message.
        written: the argument is one that the function writes into.

    Raises:
        ValueError: it is no array, or DLPack cannot pass it, or it is read-only and `written`.
    """
    if isinstance(value, torch.Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise ValueError(
            f"{name} must be a torch.Tensor or an array with __dlpack__, got {type(value).__name__}"
        )
    if any(stride < 0 for stride in getattr(value, "strides", None) or ()):  # torch would end the process
        raise ValueError(f"{name} must not have negative strides; pass a copy")
    if written and not getattr(getattr(value, "flags", None), "writeable", True):
        raise ValueError(f"{name} is written, but the {type(value).__name__} is read-only; pass a copy")
    try:
        return torch.from_dlpack(value)
    except Exception as error:  # each library has its own
        raise ValueError(
            f"{name} is a {type(value).__name__} that torch cannot take through DLPack: {error}"
        ) from error
