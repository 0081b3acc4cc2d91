"""The address spaces of a launch. Every access is checked: in bounds, aligned to its own size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

POISON = 0xFF
GAP = 256  # bytes that belong to nothing, between tensors


class PtxError(RuntimeError):
    """The program did what PTX does not define."""


class Space:
    """Bytes that are read and written by many lanes at once.

    Args:
        base: address of the first byte, a multiple of 256.
    """

    def __init__(self, name: str, base: int, content: np.ndarray) -> None:
        self._name, self.base, self._size = name, base, content.size
        self._views = by_width(content)

    @property
    def content(self) -> np.ndarray:
        return self._views[1]

    def load(self, addresses: np.ndarray, width: int, count: int = 1) -> np.ndarray:
        """``count`` words of ``width`` bytes from each address on: [count, lanes]."""
        return self._views[width][self._indices(addresses, width, count)]

    def store(self, addresses: np.ndarray, words: np.ndarray, width: int) -> None:
        """Words [count, lanes], from each address on."""
        self._views[width][self._indices(addresses, width, len(words))] = words

    def _indices(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - self.base
        if not offsets.size:
            return np.zeros((count, 0), np.int64)
        if int(np.bitwise_or.reduce(offsets)) % (width * count):
            raise PtxError(f"an address in {self._name} memory is no multiple of {width * count}")
        if offsets.min() < 0 or offsets.max() + width * count > self._size:
            raise PtxError(f"an access beyond {self._name} memory")
        return offsets // width + np.arange(count)[:, None]


class TensorSpace(Space):
    """Global memory, of which only tensors may be touched, and what is read as constant not written.

    Args:
        allowed: 1 for the bytes of tensors.
    """

    def __init__(self, base: int, content: np.ndarray, allowed: np.ndarray) -> None:
        super().__init__("global", base, content)
        self._allowed = by_width(allowed)
        self._constant, self._written = (by_width(np.zeros_like(allowed)) for _ in range(2))

    def load(self, addresses: np.ndarray, width: int, count: int = 1, constant: bool = False) -> np.ndarray:
        """See `Space`.

        Args:
            constant: as ld.global.nc reads: what no thread of the launch writes.
        """
        indices = self._indices(addresses, width, count)
        if constant:
            if self._written[width][indices].any():
                raise PtxError("ld.global.nc of what this launch has written")
            self._constant[width][indices] = 1
        return self._views[width][indices]

    def store(self, addresses: np.ndarray, words: np.ndarray, width: int) -> None:
        indices = self._indices(addresses, width, len(words))
        if self._constant[width][indices].any():
            raise PtxError("a write to what this launch has read with ld.global.nc")
        self._written[width][indices] = 1
        self._views[width][indices] = words

    def _indices(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        indices = super()._indices(addresses, width, count)
        if (self._allowed[width][indices] != _ALL_ALLOWED[width]).any():
            raise PtxError("an access to global memory outside every tensor")
        return indices


def by_width(content: np.ndarray) -> dict[int, np.ndarray]:
    return {width: content.view(f"u{width}") for width in (1, 2, 4, 8)}


_ALL_ALLOWED = {width: int.from_bytes(b"\1" * width, "little") for width in (1, 2, 4, 8)}


class GlobalMemory:
    """Copies of tensors, with nothing that may be touched between them.

    Tensors of one storage share a copy, at the distance they have. What no tensor covers, as the padding of a
    stride, may not be touched either.
    """

    BASE = 0x7F00_0000_0000

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        self._offsets: dict[int, int] = {}
        size = GAP
        for address, storage in storages.items():
            self._offsets[address] = size + address % 256
            size += -(-(storage.nbytes() + 256) // GAP) * GAP + GAP
        content, allowed = np.full(size, POISON, np.uint8), np.zeros(size, np.uint8)
        self._originals: list[tuple[Any, slice]] = []
        for address, storage in storages.items():
            own = slice(self._offsets[address], self._offsets[address] + storage.nbytes())
            original = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
            content[own] = original
            self._originals.append((original, own))
        for tensor in tensors:
            if tensor.numel():
                _mark(allowed, self.address(tensor) - self.BASE, tensor)
        self.space = TensorSpace(self.BASE, content, allowed)

    def address(self, tensor: torch.Tensor) -> int:
        if not tensor.numel():
            return self.BASE
        storage = tensor.untyped_storage().data_ptr()
        return self.BASE + self._offsets[storage] + tensor.data_ptr() - storage

    def copy_back(self) -> None:
        for original, own in self._originals:
            original[:] = self.space.content[own]


def _mark(allowed: np.ndarray, start: int, tensor: torch.Tensor) -> None:
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    view = np.lib.stride_tricks.as_strided(allowed[start:], (*tensor.shape, size), (*strides, 1))
    view[...] = 1
