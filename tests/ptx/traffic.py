"""What accesses to memory cost, counted as a profiler on a GPU counts them.

Shared memory has 32 banks of 4 bytes and answers 128 bytes in a turn: all lanes if they want 4 bytes each, 8
lanes if they want 16, in the order of the lanes. Where lanes of a turn want different words of a bank, it
takes more of them. Global memory is moved in sectors of 32 bytes. Of PTX: what ptxas joins is still apart.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

BANKS, WORD, SECTOR = 32, 4, 32


@dataclass
class Cost:
    """Of all accesses by an instruction: turns of shared memory, or sectors of global memory."""

    requests: int = 0
    taken: int = 0
    fewest: int = 0  # that as many bytes need


class Traffic:
    """Counts by source line and opcode."""

    def __init__(self) -> None:
        self.shared: dict[tuple[str, str], Cost] = defaultdict(Cost)
        self.globally: dict[tuple[str, str], Cost] = defaultdict(Cost)

    def count_shared(self, place: tuple[str, str], addresses: np.ndarray, size: int) -> None:
        cost, lanes = self.shared[place], max(1, BANKS * WORD // max(size, WORD))
        cost.requests += 1
        for first in range(0, addresses.size, lanes):
            words = (addresses[first : first + lanes, None] // WORD) + np.arange(max(1, size // WORD))
            distinct = np.unique(words)
            cost.taken += int(np.bincount(distinct % BANKS).max())
            cost.fewest += -(-distinct.size // BANKS)

    def count_global(self, place: tuple[str, str], addresses: np.ndarray, size: int) -> None:
        cost = self.globally[place]
        cost.requests += 1
        bytes_read = np.unique(addresses[:, None] + np.arange(size))
        cost.taken += np.unique(bytes_read // SECTOR).size
        cost.fewest += -(-bytes_read.size // SECTOR)
