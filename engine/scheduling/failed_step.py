"""Compute the parts of a step that failed one after the other. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..memory.block_manager import BlockManager
from .request import SequenceGroup, Status
from .step_plan import ScheduledSequence

Part = tuple[ScheduledSequence, ...]


class FailedStep:
    """Divide what failed into halves, down to single requests.

    A request that always fails is alone after at most ``ceil(log2(n))`` divisions of a step of ``n``; all
    others are computed on the way, each once.
    """

    def __init__(self) -> None:
        self._parts: deque[Part] = deque()

    def add(self, failed: Sequence[ScheduledSequence]) -> None:
        """Put back a part that failed: its halves come next, or the same part if it is one request."""
        groups = list(dict.fromkeys(item.group for item in failed))
        first = set(groups[: (len(groups) + 1) // 2])
        halves = (
            tuple(item for item in failed if item.group in first),
            tuple(item for item in failed if item.group not in first),
        )
        self._parts.extendleft(half for half in reversed(halves) if half)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def next(self) -> Part:
        """Return the next part, without sequences that have ended meanwhile; empty when none is left."""
        while self._parts:
            part = tuple(
                item
                for item in self._parts.popleft()
                if item.group.status is Status.RUNNING and not item.seq.finished
            )
            if part:
                return part
        return ()


def readers_of_others(scheduled: Sequence[ScheduledSequence], blocks: BlockManager) -> set[SequenceGroup]:
    """Return the groups of a step that read blocks which other groups write in the same step."""
    writers: dict[int, SequenceGroup] = {}
    for item in scheduled:
        first, end = item.start + item.num_stored, item.start + item.num_tokens
        for layer_group, size in enumerate(blocks.block_sizes):
            written = blocks.table(item.seq.seq_id, layer_group)[first // size : -(-end // size)]
            writers.update(dict.fromkeys(written, item.group))
    return {
        item.group
        for item in scheduled
        for layer_group in range(len(blocks.block_sizes))
        for block in blocks.table(item.seq.seq_id, layer_group)
        if writers.get(block, item.group) is not item.group
    }
