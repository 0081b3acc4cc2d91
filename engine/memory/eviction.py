"""Choose which cached block loses its content when memory is needed.

A policy is told of the blocks that hold content and have no references: blocks in use are never evicted. It
orders them by their keys and their use, and knows nothing of tokens.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import count


class EvictionPolicy(ABC):
    """Order the cached blocks of one pool."""

    @abstractmethod
    def add(self, block: int, key: Hashable, num_lost: int) -> None:
        """Note that a block's last reference was dropped.

        Args:
            key: what its content is found by.
            num_lost: number of blocks that are of no use once this one is evicted: itself, and those of its
                last sequence that follow it.
        """

    @abstractmethod
    def remove(self, block: int) -> None:
        """Note that a cached block is in use again, or that its content was forgotten."""

    @abstractmethod
    def evict(self) -> int:
        """Choose a cached block, remove it and return it.

        Raises:
            KeyError: no block is cached.
        """

    @abstractmethod
    def __contains__(self, block: int) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...


class LRU(EvictionPolicy):
    """Evict the least recently used block, in constant time."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def add(self, block: int, key: Hashable, num_lost: int) -> None:
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        del self._blocks[block]

    def evict(self) -> int:
        return self._blocks.popitem(last=False)[0]

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)


class Ranked(EvictionPolicy):
    """Evict the block of the lowest rank, the longest unused one of equals, in logarithmic time.

    A rank is computed when a block becomes cached, from how often that has happened to its content before.
    Uses at the same time count as one.
    """

    def __init__(self) -> None:
        # Entries of blocks that were removed stay in the heap until they are at its top, or too many.
        self._heap: list[tuple[float, int, int]] = []  # rank, order, block
        self._entries: dict[int, tuple[float, int, int]] = {}
        self._uses: dict[int, tuple[Hashable, int]] = {}  # of a block's content; its key tells whose they are
        self._order = count()

    @abstractmethod
    def rank(self, key: Hashable, num_uses: int, num_lost: int) -> float:
        """Return the rank of a block that becomes cached; lower ones are evicted first.

        Args:
            num_uses: how often its content has become cached, this time included.
            num_lost: argument of `add`.
        """

    def add(self, block: int, key: Hashable, num_lost: int) -> None:
        last_key, num_uses = self._uses.get(block, (None, 0))
        num_uses = num_uses + 1 if last_key == key else 1
        self._uses[block] = key, num_uses
        entry = self.rank(key, num_uses, num_lost), next(self._order), block
        self._entries[block] = entry
        heapq.heappush(self._heap, entry)

    def remove(self, block: int) -> None:
        del self._entries[block]
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def evict(self) -> int:
        if not self._entries:
            raise KeyError("no block is cached")
        while True:
            entry = heapq.heappop(self._heap)
            block = entry[2]
            if self._entries.get(block) is entry:
                del self._entries[block], self._uses[block]
                self.evicted(entry[0])
                return block

    def evicted(self, rank: float) -> None:
        """Note the rank of a block that was evicted."""

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __len__(self) -> int:
        return len(self._entries)


class LFU(Ranked):
    """Evict the block whose content was used least often since it was computed."""

    def rank(self, key: Hashable, num_uses: int, num_lost: int) -> float:
        return num_uses


class CostAware(Ranked):
    """Evict the block that costs least to lose: its uses times the blocks to be computed again without it.

    What was not used for long loses its rank against what comes later: that begins at the rank of the block
    evicted last (GreedyDual; Cherkasova, 1998).
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def rank(self, key: Hashable, num_uses: int, num_lost: int) -> float:
        return self._age + num_uses * num_lost

    def evicted(self, rank: float) -> None:
        self._age = rank


EVICTION_POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "cost": CostAware}
MakePolicy = Callable[[], EvictionPolicy]


def make_policies(policy: str | MakePolicy) -> tuple[EvictionPolicy, EvictionPolicy]:
    """Return a policy for the GPU's blocks, and one for the swap space.

    Raises:
        ValueError: what is to make policies does not make two new ones.
    """
    make = EVICTION_POLICIES[policy] if isinstance(policy, str) else policy
    made = make(), make()
    for each in made:
        if not isinstance(each, EvictionPolicy) or len(each):
            raise ValueError(
                f"eviction_policy must make an EvictionPolicy without blocks, and made {each!r}: pass a "
                "class, or a function that returns a new object"
            )
    if made[0] is made[1]:
        raise ValueError(
            f"eviction_policy made {made[0]!r} twice, and every pool needs its own: pass a class, or a "
            "function that returns a new object"
        )
    return made
