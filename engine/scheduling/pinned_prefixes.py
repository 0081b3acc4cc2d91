"""Keep track of prefixes whose blocks stay in memory (paper, section 4.4, "Shared prefix"). No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from .request import SequenceGroup


class PinnedPrefixes:
    """Hold the prefixes that were added and not removed, computed or not yet.

    Args:
        content: `BlockManager.content_keys`.
    """

    def __init__(self, content: Callable[[Sequence[bytes]], list[bytes]]) -> None:
        self._content_of = content
        self.groups: dict[str, SequenceGroup] = {}
        self._keys: Counter[bytes] = Counter()  # of all their tokens
        self._content: Counter[bytes] = Counter()  # of all their blocks

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def num_blocks(self) -> int:
        """Return the number of distinct blocks of all prefixes when they are computed."""
        return len(self._content)

    def num_covered(self, keys: Iterable[bytes], more: Sequence[bytes] = ()) -> int:
        """Return how many of the first blocks with these keys are pinned, or would be with ``more`` keys."""
        covered = 0
        for key in keys:
            if key not in self._keys and key not in more:
                break
            covered += 1
        return covered

    def num_blocks_with(self, keys: Sequence[bytes]) -> int:
        """Return what `num_blocks` would be with a further prefix of blocks with these keys."""
        return len(self._content.keys() | set(self._content_of(keys)))

    def add(self, group: SequenceGroup) -> None:
        """Add a prefix under the ID of its group."""
        self.groups[group.request_id] = group
        self._keys.update(group.seqs[0].keys)
        self._content.update(self._content_of(group.seqs[0].keys))

    def remove(self, prefix_id: str) -> SequenceGroup:
        """Remove a prefix and return its group.

        Raises:
            KeyError: there is none of this ID.
        """
        group = self.groups.pop(prefix_id)
        self._keys -= Counter(group.seqs[0].keys)
        self._content -= Counter(self._content_of(group.seqs[0].keys))
        return group
