"""Prefixes whose blocks stay in memory, used or not (paper, section 4.4, "Shared prefix"). No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .request import SequenceGroup


class PinnedPrefixes:
    """The prefixes that were added and not removed, computed or still to be."""

    def __init__(self) -> None:
        self.groups: dict[str, SequenceGroup] = {}
        self._keys: Counter[bytes] = Counter()  # of all their blocks

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def num_blocks(self) -> int:
        """Blocks they hold together when all are computed; what they share is one block."""
        return len(self._keys)

    def num_covered(self, keys: Iterable[bytes], more: Sequence[bytes] = ()) -> int:
        """How many of the first blocks with these keys are pinned, or would be with ``more``."""
        covered = 0
        for key in keys:
            if key not in self._keys and key not in more:
                break
            covered += 1
        return covered

    def num_blocks_with(self, keys: Iterable[bytes]) -> int:
        """`num_blocks` if a prefix of blocks with these keys were added."""
        return len(self._keys.keys() | set(keys))

    def add(self, group: SequenceGroup) -> None:
        self.groups[group.request_id] = group
        self._keys.update(group.seqs[0].keys)

    def remove(self, prefix_id: str) -> SequenceGroup:
        group = self.groups.pop(prefix_id)
        self._keys -= Counter(group.seqs[0].keys)
        return group
