"""Remember which replicas have seen the beginning of a prompt, and choose one of them by that and by load.

Knows nothing of Ray.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

Replica = TypeVar("Replica", bound=Hashable)


class PrefixIndex(Generic[Replica]):
    """Hold the replicas that each beginning of recent prompts was sent to.

    A prompt is a sequence of chained hashes, each that of a chunk and all chunks before it, so that a
    beginning is known by its last hash. As in a block pool the least recently used beginnings are dropped,
    the longest of a prompt first: a replica that has a beginning has all shorter ones.

    Args:
        max_entries: maximum number of beginnings that are held.
    """

    def __init__(self, max_entries: int) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, got {max_entries}")
        self._max_entries = max_entries
        self._holders: OrderedDict[bytes, set[Replica]] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, hashes: Sequence[bytes], replica: Replica) -> None:
        """Record that a replica is sent a prompt."""
        for each in reversed(hashes[: self._max_entries]):
            self._holders.setdefault(each, set()).add(replica)
            self._holders.move_to_end(each)
        while len(self._holders) > self._max_entries:
            self._holders.popitem(last=False)

    def matches(self, hashes: Sequence[bytes]) -> dict[Replica, int]:
        """Return how many of the prompt's first chunks each replica has; those with none are left out."""
        lengths: dict[Replica, int] = {}
        for length, each in enumerate(hashes, 1):
            if not (holders := self._holders.get(each)):
                break
            lengths.update(dict.fromkeys(holders, length))
        return lengths

    def keep(self, replicas: set[Replica]) -> None:
        """Forget all replicas but these."""
        for each, holders in list(self._holders.items()):
            holders &= replicas
            if not holders:
                del self._holders[each]


class ReplicaChoice(Generic[Replica]):
    """Choose the replica of each prompt, and count the requests that each replica has.

    Args:
        max_imbalance: number of requests by which the replica with the longest beginning may be busier than
            the least loaded one and still get the prompt.
        max_entries: maximum number of beginnings that are remembered.
    """

    def __init__(self, max_imbalance: int, max_entries: int) -> None:
        if max_imbalance < 0:
            raise ValueError(f"max_imbalance must be at least 0, got {max_imbalance}")
        self._max_imbalance = max_imbalance
        self._index = PrefixIndex[Replica](max_entries)
        self._loads: dict[Replica, int] = {}  # the one that got a request least recently first

    @property
    def loads(self) -> Mapping[Replica, int]:
        """Return the number of unfinished requests of each replica."""
        return self._loads

    def update(self, replicas: set[Replica]) -> None:
        """Set the replicas that there are; a new one has no requests and no beginnings."""
        self._loads = {each: load for each, load in self._loads.items() if each in replicas}
        for each in replicas - self._loads.keys():
            self._loads = {each: 0, **self._loads}
        self._index.keep(replicas)

    def choose(self, hashes: Sequence[bytes], candidates: Sequence[Replica]) -> Replica:
        """Return the candidate that should get a prompt.

        It is the one that has the longest beginning, or, if that is too busy, the least loaded one. Of
        several with the longest beginning it is the least loaded, of several least loaded ones that with the
        longest beginning, and of equal ones that which got a request least recently.

        The prompt's last chunk does not count: it saves little, and a prompt without another one, such as
        "Hi", is that of many, who are to be spread.
        """
        ages = {each: age for age, each in enumerate(self._loads)}
        lengths = self._index.matches(hashes[:-1])

        def load(replica: Replica) -> int:
            return self._loads.get(replica, 0)

        def length(replica: Replica) -> int:
            return lengths.get(replica, 0)

        def age(replica: Replica) -> int:
            return ages.get(replica, -1)

        longest = min(candidates, key=lambda each: (-length(each), load(each), age(each)))
        least = min(candidates, key=lambda each: (load(each), -length(each), age(each)))
        return longest if load(longest) - load(least) <= self._max_imbalance else least

    def begin(self, hashes: Sequence[bytes], replica: Replica) -> None:
        """Record that a replica is sent a prompt."""
        self._loads[replica] = self._loads.pop(replica, 0) + 1
        self._index.add(hashes, replica)

    def end(self, replica: Replica) -> None:
        """Record that a request of a replica has ended; the replica may be gone."""
        if replica in self._loads:
            self._loads[replica] = max(self._loads[replica] - 1, 0)
