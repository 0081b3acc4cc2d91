"""Which accesses to memory are in order, by vector clocks of the threads of a block.

What a thread did is known to another only through barriers: `bar.sync`, `bar.warp.sync`, and `mbarrier`,
whose arrival tells what this one thread knows. Two accesses to a word, one of them a write, must be in order.
A copy (cp.async) writes until its thread has waited for it. A product (wgmma) reads until its warp has
waited, and through the async proxy, for which the writer has to fence before it tells.
"""

from __future__ import annotations

import numpy as np

from .memory import PtxError

WORD = 4
UNDER_WAY = np.iinfo(np.int32).max


class Order:
    """What the threads of a block know of each other."""

    def __init__(self, threads: int) -> None:
        # clocks[0, t, u]: what thread t knows that u did; clocks[1, t, u]: and that u fenced after.
        self.clocks = np.zeros((2, threads, threads), np.int32)
        own = np.arange(threads)
        self.clocks[0, own, own] = 1
        self._arriving: dict[tuple[str, int], np.ndarray] = {}
        self._told: dict[tuple[str, int], np.ndarray] = {}

    def now(self, threads: np.ndarray) -> np.ndarray:
        return self.clocks[0, threads, threads]

    def fence_proxy(self, threads: np.ndarray) -> None:
        self.clocks[1, threads, threads] = self.now(threads)
        self.clocks[0, threads, threads] += 1

    def meet(self, threads: np.ndarray) -> None:
        """All of them wait for each other."""
        self.clocks[:, threads] = self.clocks[:, threads].max(axis=1, keepdims=True)
        self.clocks[0, threads, threads] += 1

    def arrive(self, barrier: tuple[str, int], threads: np.ndarray) -> None:
        """They tell the barrier what they know."""
        _merge(self._arriving, barrier, self.clocks[:, threads].max(axis=1))
        self.clocks[0, threads, threads] += 1

    def complete(self, barrier: tuple[str, int]) -> None:
        """All have arrived that it waits for."""
        _merge(self._told, barrier, self._arriving.pop(barrier))

    def learn(self, barrier: tuple[str, int], threads: np.ndarray) -> None:
        """What was told until the barrier was last complete."""
        if (told := self._told.get(barrier)) is not None:
            self.clocks[:, threads] = np.maximum(self.clocks[:, threads], told[:, None])


def _merge(known: dict[tuple[str, int], np.ndarray], barrier: tuple[str, int], more: np.ndarray) -> None:
    known[barrier] = np.maximum(known[barrier], more) if barrier in known else more


class Races:
    """The accesses to one memory.

    Args:
        name: of the memory.
        base: address of the first of ``size`` bytes.
    """

    def __init__(self, name: str, order: Order, base: int, size: int) -> None:
        self._name, self._order, self._base = name, order, base
        words, threads = -(-size // WORD), order.clocks.shape[1]
        self._writer = np.zeros(words, np.int32)
        self._written = np.zeros(words, np.int32)  # the writer's clock, 0 if there is none
        self._read = np.zeros((words, threads), np.int32)  # the readers' clocks

    # Accesses. `threads` [n] access the `size` bytes from `addresses` [n] on.

    def read(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> None:
        words = self._words(addresses, size)
        self._check_written(threads[:, None], words, 0)
        self._read[words, threads[:, None]] = self._order.now(threads)[:, None]

    def read_by_all(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """Each of the threads reads from all of the addresses."""
        words = self._words(addresses, size).ravel()
        self._check_written(threads[:, None], words, 0)
        self._read[words[:, None], threads] = self._order.now(threads)

    def write(self, threads: np.ndarray, addresses: np.ndarray, size: int, under_way: bool = False) -> None:
        words = self._words(addresses, size)
        self._check_written(threads[:, None], words, 0)
        known = self._order.clocks[0][threads][:, None]
        if (self._read[words] > known).any():
            raise PtxError(f"a write to {self._name} memory that another thread still reads")
        self._writer[words] = threads[:, None]
        self._written[words] = UNDER_WAY if under_way else self._order.now(threads)[:, None]
        self._read[words] = 0

    def landed(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """Writes that were under way."""
        self._written[self._words(addresses, size)] = self._order.now(threads)[:, None]

    def begin_product(self, threads: np.ndarray, addresses: np.ndarray) -> None:
        """A product begins to read 16-bit elements, for all of these threads."""
        words = self._words_of_elements(addresses)
        self._check_written(threads[:, None], words, 1)
        self._read[words[:, None], threads] = UNDER_WAY

    def end_product(self, threads: np.ndarray, addresses: np.ndarray) -> None:
        self._read[self._words_of_elements(addresses)[:, None], threads] = self._order.now(threads)

    def _words_of_elements(self, addresses: np.ndarray) -> np.ndarray:
        return (addresses[addresses % WORD == 0] - self._base) // WORD  # they come in pairs

    def _words(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if size % WORD:
            raise PtxError(f"an access of {size} bytes: races are known of whole words only")
        return ((addresses.astype(np.int64) - self._base) // WORD)[:, None] + np.arange(size // WORD)

    def _check_written(self, threads: np.ndarray, words: np.ndarray, proxy: int) -> None:
        writer, written = self._writer[words], self._written[words]
        known = self._order.clocks[proxy, threads, writer]
        own = (writer == threads) & (written != UNDER_WAY) if proxy == 0 else False
        if (~own & (written > known)).any():
            raise PtxError(f"an access to {self._name} memory before what another thread writes is known")
