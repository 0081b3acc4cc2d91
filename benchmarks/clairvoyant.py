"""An eviction policy that knows which requests will come: how much there is to win over the others."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from math import inf

from benchmarks.simulation import Request
from cupaged.engine.memory.eviction import Ranked
from cupaged.engine.memory.prefix_hash import extend_keys, root_key

Uses = dict[Hashable, deque[int]]  # of a content: numbers of the requests that begin with it


class Clairvoyant(Ranked):
    """Evict the block whose content is used again last, or never (Belady's policy).

    Requests are taken to use blocks in the order of their arrival. They use them only together with all
    blocks before, and preempted ones look for them again: neither is foreseen, so it is not quite a bound.

    Args:
        uses: when contents are used, in ascending order; changed.
        now: returns the number of the first request that was not admitted.
    """

    def __init__(self, uses: Uses, now: Callable[[], int]) -> None:
        super().__init__()
        self._uses_of = uses
        self._now = now
        self._soonest: list[tuple[float, int, int, Hashable]] = []  # next use, order, block, key

    def add(self, block: int, key: Hashable, num_lost: int) -> None:
        super().add(block, key, num_lost)
        self._expect(block, key)

    def evict(self) -> int:
        now = self._now()
        while (
            self._soonest and self._soonest[0][0] < now
        ):  # a use that came to nothing: there is another next
            _, order, block, key = heapq.heappop(self._soonest)
            entry = self._entries.get(block)
            if entry is not None and entry[1] == order:
                entry = self._entries[block] = self.rank(key, 0, 0), order, block
                heapq.heappush(self._heap, entry)
                self._expect(block, key)
        return super().evict()

    def _expect(self, block: int, key: Hashable) -> None:
        rank, order, _ = self._entries[block]
        if rank > -inf:
            heapq.heappush(self._soonest, (-rank, order, block, key))

    def rank(self, key: Hashable, num_uses: int, num_lost: int) -> float:
        """Return the negated number of the next request that uses the content."""
        uses = self._uses_of.get(key)
        now = self._now()
        while uses and uses[0] < now:
            uses.popleft()
        return -uses[0] if uses else -inf


def uses_of(requests: Sequence[Request], block_size: int) -> Uses:
    """Return which requests could use which contents."""
    uses: Uses = defaultdict(deque)
    for number, request in enumerate(requests):
        keys: list[bytes] = []
        prompt = list(request.prompt)
        extend_keys(keys, root_key(None), prompt, len(prompt), block_size)
        for key in keys:
            uses[key].append(number)
    return dict(uses)
