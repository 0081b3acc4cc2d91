"""Record the calls of kernels, and repeat them all in one native call.

Where there is little to do in each call, as in a decode step of one sequence, most of the time is Python's.
A tape holds what Python has made of a part of a step: kernels, and addresses and numbers for them. As with a
CUDA graph, all tensors must stay where they are, and only their contents may change.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from . import launch, player


class Tape:
    """Hold recorded calls.

    Args:
        calls: for each call the address of the kernel's entry, and its packed arguments.
    """

    def __init__(self, calls: list[tuple[int, bytes]]) -> None:
        self._arguments = [ctypes.create_string_buffer(packed, len(packed)) for _, packed in calls]
        entries = [entry for entry, _ in calls]
        addresses = [ctypes.addressof(arguments) for arguments in self._arguments]
        self._table = np.array([entries, addresses], dtype=np.int64).T.copy()
        self._play = player.Calls(self._table.ctypes.data, len(calls))

    def __len__(self) -> int:
        return len(self._table)

    def replay(self) -> bool:
        """Repeat the calls in their order, until one refuses its arguments; return whether none did."""
        return _player()(self._play) == 0


@cache
def _player() -> launch.Kernel:
    return launch.Kernel(player.play, None, player.Calls)


@contextmanager
def recorded() -> Iterator[list[tuple[int, bytes]]]:
    """Collect the calls of kernels that this thread makes in the block, for a `Tape`."""
    calls: list[tuple[int, bytes]] = []
    token = launch.RECORDING.set(calls)
    try:
        yield calls
    finally:
        launch.RECORDING.reset(token)
