"""Copy arrays to a device at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

_ALIGNMENT = 16  # bytes, the largest word that kernels read
_Shape = tuple[np.dtype, tuple[int, ...]]
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Return arrays of integers or floats as tensors on a device.

    They are copied together, by one transfer that the host does not wait for. On a CPU the tensors are the
    arrays themselves.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # torch does not give pinned memory to others before the copy from it has ended.
    packed = pack(arrays, pin_memory=device.type == "cuda")
    return unpack(packed.to(device, non_blocking=True), arrays)


def with_sampled(token_ids: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Return token IDs in which ``-1 - i`` is replaced by ``sampled[i]``."""
    return torch.where(token_ids < 0, sampled[(-1 - token_ids).clamp_(min=0)], token_ids)


def pack(arrays: Sequence[np.ndarray], pin_memory: bool = False) -> torch.Tensor:
    """Return the bytes of arrays in one tensor, each from a multiple of 16 bytes on."""
    packing = Packing.of(arrays)
    packed = torch.empty(packing.num_bytes, dtype=torch.uint8, pin_memory=pin_memory)
    for place, array in zip(packing.arrays(packed), arrays):
        place[...] = array
    return packed


def unpack(packed: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Return views of `pack`'s tensor, or of a copy, with the shapes and dtypes of the arrays."""
    return Packing.of(arrays).tensors(packed)


class Packing:
    """Place arrays in one piece of memory, each from a multiple of 16 bytes on.

    Args:
        shapes: dtype and shape of each array.

    Attributes:
        num_bytes: number of bytes of all.
    """

    def __init__(self, shapes: Sequence[_Shape]) -> None:
        self._shapes = shapes
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in shapes]
        ends = accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)
        *starts, self.num_bytes = 0, *ends
        self._places = [slice(start, start + size) for start, size in zip(starts, sizes)]

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Packing:
        return cls([(array.dtype, array.shape) for array in arrays])

    def tensors(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Return the arrays as views of uint8 memory on any device."""
        placed = zip(self._shapes, self._places)
        return [packed[place].view(_DTYPES[dtype]).view(shape) for (dtype, shape), place in placed]

    def arrays(self, packed: torch.Tensor) -> list[np.ndarray]:
        """Return the arrays as views of uint8 memory on the CPU."""
        memory = packed.numpy()
        placed = zip(self._shapes, self._places)
        return [memory[place].view(dtype).reshape(shape) for (dtype, shape), place in placed]


class Staging:
    """Copy to memory on a device from two buffers in turns, so that the host does not wait for a copy.

    A buffer is written again when the copy before the last one has ended, which is almost always the case.

    Args:
        target: uint8 memory on the device.
    """

    def __init__(self, target: torch.Tensor) -> None:
        pinned = target.is_cuda
        self._target = target
        self._turn = 0
        self.buffers = tuple(
            torch.empty(target.shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        )
        self._copied = [torch.cuda.Event() for _ in self.buffers] if pinned else []

    def begin(self) -> int:
        """Return which of the buffers is to be written."""
        self._turn ^= 1
        if self._copied:
            self._copied[self._turn].synchronize()
        return self._turn

    def send(self, num_bytes: int) -> None:
        """Copy the beginning of that buffer to the device, on the current stream."""
        source = self.buffers[self._turn][:num_bytes]
        self._target[:num_bytes].copy_(source, non_blocking=True)
        if self._copied:
            self._copied[self._turn].record(torch.cuda.current_stream(self._target.device))
