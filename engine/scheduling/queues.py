"""The queues of the scheduler. No torch."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from .request import SequenceGroup, Status


class Queues:
    """Hold the unfinished sequence groups by status, each queue in order of rank.

    Running groups rank before preempted and waiting ones, except where a group that ranks before them has
    arrived and does not fit yet.
    """

    def __init__(self) -> None:
        self.waiting: list[SequenceGroup] = []
        self.preempted: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.preempted) + len(self.running)

    def add(self, group: SequenceGroup) -> None:
        """Insert a group into the queue of its status."""
        insort(self._queue_of(group), group, key=_rank)

    def remove(self, group: SequenceGroup) -> None:
        """Remove a group from the queue of its status."""
        self._queue_of(group).remove(group)

    def rerank(self, count: int, rank: Callable[[SequenceGroup], tuple[float, int]]) -> None:
        """Rank the first waiting groups again."""
        for group in self.waiting[:count]:
            group.rank = rank(group)
        self.waiting.sort(key=_rank)

    def next_to_admit(self) -> SequenceGroup | None:
        """Return the group without GPU blocks that ranks first; None where there is none."""
        if self.preempted and not (self.waiting and self.waiting[0].rank < self.preempted[0].rank):
            return self.preempted[0]
        return self.waiting[0] if self.waiting else None

    def _queue_of(self, group: SequenceGroup) -> list[SequenceGroup]:
        if group.status is Status.RUNNING:
            return self.running
        return self.waiting if group.status is Status.WAITING else self.preempted


def _rank(group: SequenceGroup) -> tuple[float, int]:
    return group.rank
