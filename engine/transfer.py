"""Copy arrays to a device at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

_ALIGNMENT = 16  # bytes, the largest word that kernels read
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float64): torch.float64,
}


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Return int32, int64 and float64 arrays as tensors on a device.

    They are copied together, by one transfer that the host does not wait for. On a CPU the tensors are the
    arrays themselves.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # torch does not give pinned memory to others before the copy from it has ended.
    packed = pack(arrays, pin_memory=device.type == "cuda")
    return unpack(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[np.ndarray], pin_memory: bool = False) -> torch.Tensor:
    """Return the bytes of arrays in one tensor, each from a multiple of 16 bytes on."""
    places = _places(arrays)
    packed = torch.empty(places[-1], dtype=torch.uint8, pin_memory=pin_memory)
    for array, place in zip(arrays, places):
        part = packed[place : place + array.nbytes].numpy()
        part.view(array.dtype).reshape(array.shape)[...] = array
    return packed


def unpack(packed: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Return views of `pack`'s tensor, or of a copy, with the shapes and dtypes of the arrays."""
    return [
        packed[place : place + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for array, place in zip(arrays, _places(arrays))
    ]


def _places(arrays: Sequence[np.ndarray]) -> list[int]:
    """Return the place of each array in bytes, and the end of the last one."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    return [0, *accumulate(sizes)]
